"""Words that distinguish the captions of a cluster from those of the others."""

from collections import Counter

import numpy as np

from paris_jax.encoders.words import split

SHOWN = 12  # words of each cluster
LARGEST = 200_000  # distinct words that are counted; beyond, those that came once are forgotten
PRIOR = 10.0  # captions that the prior weighs
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

        The measure is the log odds ratio that a caption has the word, with a prior at its share of all captions, in
        standard errors (after Monroe, Colaresi & Quinn 2008, "Fightin' Words").
        """
        everywhere: Counter[str] = Counter()
        for words in self.words:
            everywhere.update(words)
        return [self._of(k, everywhere) for k in range(len(self.words))]

    def _of(self, cluster: int, everywhere: Counter[str]) -> list[dict[str, float | str]]:
        words = sorted(self.words[cluster])
        here = np.array([self.words[cluster][word] for word in words], float)
        there = np.array([everywhere[word] for word in words], float) - here
        num_here = self.captions[cluster]
        num_there = sum(self.captions) - num_here
        z = _log_odds(here, num_here, there, num_there)
        chosen = [i for i in sorted(range(len(words)), key=lambda i: (-z[i], words[i])) if z[i] > SURE][:SHOWN]
        return [
            {"word": words[i], "share": float(here[i] / num_here), "others": float(there[i] / max(num_there, 1))}
            for i in chosen
        ]


def _log_odds(here: np.ndarray, num_here: int, there: np.ndarray, num_there: int) -> np.ndarray:
    """Log odds ratio, in standard errors, of words in so many captions here and there."""
    with_word = PRIOR * (here + there) / max(num_here + num_there, 1)
    without = PRIOR - with_word
    counts = here + with_word, num_here - here + without, there + with_word, num_there - there + without
    a, b, c, d = (np.maximum(count, 1e-9) for count in counts)
    return (np.log(a / b) - np.log(c / d)) / np.sqrt(1 / a + 1 / b + 1 / c + 1 / d)
