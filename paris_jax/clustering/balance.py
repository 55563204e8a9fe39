"""Balanced clusters: an offset for each cluster, added to squared distances, makes all of about the same size.

The cells of such distances are a power diagram, and the offsets solve the optimal transport of the rows to K centroids
of equal capacity (Aurenhammer, Hoffmann & Aronov 1998). New clips are assigned by the same offsets.
"""

from collections.abc import Sequence

import numpy as np

from paris_jax.errors import UserError

ROWS = 1 << 17  # rows that the offsets are found on; their shares differ from those of all by about sqrt(K / ROWS)
SWEEPS = 200  # of setting the offset of one cluster, for each cluster


def find_offsets(squared_NK: np.ndarray, tolerance: float) -> np.ndarray:
    """Returns offsets (K,) float32 with which every cluster has N / K rows, within `tolerance` of that.

    The cluster farthest from its share is set to it exactly, again and again; that raises the dual of the transport
    problem each time (Oliker & Prussner 1989). Where rows coincide, the tolerance may be out of reach: the best offsets
    that were seen are returned.

    Args:
      squared_NK: squared distances of N rows to K clusters.
      tolerance: largest relative deviation of a size from N / K.
    """
    costs_NK = np.array(squared_NK, np.float64)
    num_rows, num_clusters = costs_NK.shape
    offsets_K = np.zeros(num_clusters)
    best, best_offsets_K = np.inf, offsets_K.copy()
    for _ in range(SWEEPS * num_clusters):
        sizes_K = np.bincount(costs_NK.argmin(axis=1), minlength=num_clusters)
        deviation_K = np.abs(sizes_K * num_clusters / num_rows - 1)
        worst = int(deviation_K.argmax())
        if deviation_K[worst] < best:
            best, best_offsets_K = deviation_K[worst], offsets_K.copy()
        if best <= tolerance or num_clusters == 1:
            break
        others_N = np.delete(costs_NK, worst, axis=1).min(axis=1)
        # A row is the cluster's while its gap is larger than the change of the offset.
        gaps_N = np.sort(others_N - costs_NK[:, worst])[::-1]
        size = min(max(round(num_rows / num_clusters), 1), num_rows - 1)
        change = (gaps_N[size - 1] + gaps_N[size]) / 2
        offsets_K[worst] += change
        costs_NK[:, worst] += change
    return best_offsets_K.astype(np.float32)


def check(sizes: Sequence[int], tolerance: float) -> None:
    """Raises UserError for sizes that deviate from their mean by more than `tolerance` of it, or one clip."""
    mean = sum(sizes) / len(sizes)
    if max(abs(size - mean) for size in sizes) > max(tolerance * mean, 1):
        raise UserError(
            f"config.clustering.balance_tolerance={tolerance}: the clusters have {', '.join(map(str, sizes))} clips, "
            f"where {mean:.0f} each were expected; raise it, remove clips that are there several times, or set it to 0 "
            "for clusters of natural sizes, with a new --workdir"
        )
