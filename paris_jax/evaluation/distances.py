"""Distances of a set of videos to reference videos, in the features of any network, with errors and the floor."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from paris_jax.evaluation import estimates
from paris_jax.evaluation.estimates import Estimate
from paris_jax.evaluation.features import FeatureNetwork
from paris_jax.evaluation.metrics import frechet
from paris_jax.evaluation.metrics.kernel_distance import Kernels

MIN_CLIPS = 16  # clips needed for a meaningful distance
GROUPS = {"frechet": 16, "limit": 8, "kernel": 16}  # of the jackknife, by kind of distance
Distances = dict[str, Estimate]


def statistic(kind: str, features: np.ndarray, reference: np.ndarray) -> Callable[[np.ndarray], float]:
    """The distance of subsets of two sets, as a function of the indices of the clips that are kept in both.

    Args:
      kind: "frechet", "limit" or "kernel".
      features, reference: (N, F) of as many clips each, or (N, T, F) with features for each frame. A Frechet distance
        is then one of all frames; a kernel distance the mean over the T positions, so that frames of one clip, which
        are alike, are never a pair.
    """
    N, F = len(features), features.shape[-1]
    if len(reference) != N:
        raise ValueError(f"sets have {N} and {len(reference)} clips: must be equally many")
    a, b = (np.asarray(x, np.float64).reshape(N, -1, F) for x in (features, reference))
    if kind == "kernel":
        by_frame = [Kernels(a[:, t], b[:, t]) for t in range(a.shape[1])]
        return lambda kept: float(np.mean([kernels(kept, kept) for kernels in by_frame]))
    if kind == "limit":
        distance = functools.partial(frechet.frechet_limit, parts=frechet.limit_parts(N * a.shape[1], F))
    else:
        distance = frechet.frechet_distance
    return lambda kept: distance(a[kept].reshape(-1, F), b[kept].reshape(-1, F))


def estimate(kind: str, features: np.ndarray, reference: np.ndarray) -> Estimate:
    """A distance with its jackknife standard error, clip i left out of both sets together; see `statistic`."""
    return estimates.jackknife(statistic(kind, features, reference), len(features), GROUPS[kind])


def difference(kind: str, first: np.ndarray, second: np.ndarray, reference: np.ndarray) -> Estimate:
    """d(first, reference) - d(second, reference) with its jackknife standard error, paired by prompt."""
    of_first, of_second = statistic(kind, first, reference), statistic(kind, second, reference)
    return estimates.jackknife(lambda kept: of_first(kept) - of_second(kept), len(reference), GROUPS[kind])


def available(features: np.ndarray) -> tuple[list[str], list[str]]:
    """The kinds of distances that the number of clips allows, and a sentence for each that is left out."""
    N, F = len(features), features.shape[-1]
    if N < MIN_CLIPS:
        return [], [f"Distances are left out: they need {MIN_CLIPS} clips, there are {N}."]
    count = features.size // F
    if frechet.limit_parts(count, F) >= 2:
        return list(GROUPS), []
    return ["frechet", "kernel"], [
        f"The limit for many clips is left out: {F} features need {2 * F} clips, there are {count}."
    ]


def distances(features: np.ndarray, reference: np.ndarray) -> tuple[Distances, list[str]]:
    """Frechet distance, its limit for many clips, and kernel distance.

    Returns:
      {"frechet", "limit", "kernel"} as far as N allows, and a sentence for each that is left out.
    """
    kinds, left_out = available(features)
    return {kind: estimate(kind, features, reference) for kind in kinds}, left_out


def labels(network: FeatureNetwork) -> dict[str, str]:
    """Names of the distances of a network's features."""
    inside = network.label.partition("(")[2].rstrip(")")
    return {
        "frechet": network.label,
        "limit": f"{network.label}, extrapolated to many clips",
        "kernel": f"Kernel distance ({inside})",
    }


def halves(reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two disjoint halves of reference features, whose distance is the floor at half as many clips."""
    size = len(reference) // 2
    return reference[:size], reference[size : 2 * size]


def rows(
    networks: Sequence[FeatureNetwork],
    features: dict[str, np.ndarray],
    reference: dict[str, np.ndarray],
    others: dict[str, np.ndarray] | None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Scores of a set as rows {id, label, better, score, floor, floor_clips}, and sentences on omitted ones.

    Args:
      features, reference: of the set and of as many reference videos, by network.
      others: of as many other reference videos, whose distance to `reference` is the floor; None halves `reference`.
    """
    found, left_out = [], []
    for network in networks:
        scores, missing = distances(features[network.name], reference[network.name])
        left_out += [f"{network.label}: {sentence}" for sentence in missing]
        pair = halves(reference[network.name]) if others is None else (others[network.name], reference[network.name])
        floors, _ = distances(*pair) if len(pair[0]) >= MIN_CLIPS else ({}, [])
        for kind, label in labels(network).items():
            if kind in scores:
                found.append(
                    {
                        "id": f"{network.name}_{kind}",
                        "label": label,
                        "better": "lower",
                        "score": scores[kind],
                        "floor": floors.get(kind),
                        "floor_clips": len(pair[0]),
                    }
                )
    return found, left_out
