"""Distances of a set of videos to reference videos, in the features of any network, with errors and the floor."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paris_jax.evaluation import estimates
from paris_jax.evaluation.estimates import Estimate
from paris_jax.evaluation.features import FeatureNetwork
from paris_jax.evaluation.metrics import frechet, kernel_distance

MIN_CLIPS = 16  # clips needed for a meaningful distance
Distances = dict[str, Estimate]


def distances(features: np.ndarray, reference: np.ndarray) -> tuple[Distances, list[str]]:
    """Frechet distance, its limit for many clips, and kernel distance.

    Args:
      features, reference: (N, F) of as many clips each, or (N, T, F) with features for each frame.
    Returns:
      {"frechet", "limit", "kernel"} as far as N allows, and a sentence for each that is left out.
    """
    N, F = len(features), features.shape[-1]
    if N < MIN_CLIPS:
        return {}, [f"Distances are left out: they need {MIN_CLIPS} clips, there are {N}."]
    a, b = (np.asarray(x, np.float64).reshape(N, -1, F) for x in (features, reference))
    frames = a.shape[1]

    def rows(x: np.ndarray, kept: np.ndarray) -> np.ndarray:
        return x[kept].reshape(-1, F)

    found = {
        "frechet": estimates.jackknife(lambda kept: frechet.frechet_distance(rows(a, kept), rows(b, kept)), N),
        "kernel": _kernel(a, b),
    }
    left_out = []
    parts = frechet.limit_parts(N * frames, F)
    if parts >= 2:
        found["limit"] = estimates.jackknife(
            lambda kept: frechet.frechet_limit(rows(a, kept), rows(b, kept), parts), N, groups=8
        )
    else:
        left_out.append(f"The limit for many clips is left out: {F} features need {2 * F} clips, there are {N}.")
    return found, left_out


def _kernel(a: np.ndarray, b: np.ndarray) -> Estimate:
    """Kernel distance; of frames, the mean over their positions, so that frames of one clip are not taken as pairs."""
    if a.shape[1] == 1:
        return kernel_distance.kernel_estimate(a[:, 0], b[:, 0])
    by_frame = [kernel_distance.Kernels(a[:, t], b[:, t]) for t in range(a.shape[1])]
    return estimates.jackknife(lambda kept: float(np.mean([k(kept, kept) for k in by_frame])), len(a))


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
    """Scores of a set as rows {id, label, better, score, floor, floor_clips}, and sentences on what is left out.

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
