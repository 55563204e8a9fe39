"""Words that distinguish the captions of a cluster from those of the others."""

from collections import Counter

import numpy as np

from paris_jax.encoders.words import split

SHOWN = 12  # words of each cluster
LARGEST = 200_000  # distinct words that are counted; beyond, those that came once are forgotten
PRIOR = 100.0  # words that the prior weighs
SURE = 1.96  # standard errors by which a word's log odds are above 0


class WordCounts:
    """In how many captions of each cluster a word occurs."""

    def __init__(self, num_clusters: int):
        self.captions = [0] * num_clusters
        self.words: list[Counter[str]] = [Counter() for _ in range(num_clusters)]

    def add(self, cluster: int, caption: str) -> None:
        self.captions[cluster] += 1
        words = self.words[cluster]
        words.update(set(split(caption)))
        if len(words) > LARGEST:
            self.words[cluster] = Counter({word: count for word, count in words.items() if count > 1})

    def distinctive(self) -> list[list[dict[str, float | str]]]:
        """For each cluster its distinctive words, with their share of its captions and of all others.

        The measure is the log odds ratio with an informative Dirichlet prior, in standard errors (Monroe, Colaresi &
        Quinn 2008, "Fightin' Words").
        """
        return [self._of(k) for k in range(len(self.words))]

    def _of(self, cluster: int) -> list[dict[str, float | str]]:
        own = self.words[cluster]
        words = sorted(own)
        if not words:
            return []
        here = np.array([own[word] for word in words], float)
        everywhere = np.array([sum(counts[word] for counts in self.words) for word in words], float)
        num_here, num_all = self.captions[cluster], sum(self.captions)
        z = _log_odds(here, everywhere - here, float(sum(own.values())), self._total() - sum(own.values()), everywhere)
        chosen = [i for i in sorted(range(len(words)), key=lambda i: (-z[i], words[i])) if z[i] > SURE][:SHOWN]
        others = max(num_all - num_here, 1)
        return [
            {
                "word": words[i],
                "share": float(here[i] / num_here),
                "others": float((everywhere[i] - here[i]) / others),
            }
            for i in chosen
        ]

    def _total(self) -> float:
        return float(sum(sum(counts.values()) for counts in self.words))


def _log_odds(here: np.ndarray, there: np.ndarray, n_here: float, n_there: float, prior: np.ndarray) -> np.ndarray:
    """Log odds ratio of each word in standard errors; `prior` has the counts of both."""
    total = n_here + n_there
    prior = prior * (PRIOR / max(total, 1))
    weight = prior.sum()

    def log_odds(counts: np.ndarray, total: float) -> np.ndarray:
        return np.log((counts + prior) / np.maximum(total + weight - counts - prior, 1e-9))

    difference = log_odds(here, n_here) - log_odds(there, n_there)
    return difference / np.sqrt(1 / (here + prior) + 1 / (there + prior))
