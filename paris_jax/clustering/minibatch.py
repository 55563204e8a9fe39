"""k-means in mini-batches (Sculley 2010), for features that do not fit into memory.

The seeds are the centroids of exact k-means on the first rows; then batches of consecutive rows move them, each
centroid by the share of its new rows among all that it has had. Rows have to come in random order.
"""

from collections.abc import Callable
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from paris_jax.clustering import kmeans

SAMPLE = 65_536  # rows that seed the centroids
STILL = 1e-3  # a pass that moves no centroid farther than this, in spreads of a feature, is the last


class Rows(Protocol):
    """Rows of features, of which a slice is (n, F) float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice) -> np.ndarray: ...


def fit(
    rows: Rows,
    num_clusters: int,
    *,
    batch_size: int,
    seed: int = 0,
    restarts: int = 8,
    iterations: int = 50,
    done: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Clusters rows and returns the centroids (K, F) float32.

    Args:
      rows: N rows in random order.
      num_clusters: K, at most N.
      batch_size: rows per batch.
      seed, restarts: of the exact k-means on the first rows.
      iterations: the most Lloyd iterations of that, and the most passes over all rows.
      done: called after each run on the first rows.
    """
    sample = rows[: min(len(rows), max(SAMPLE, num_clusters))]
    start = kmeans.fit(sample, num_clusters, seed=seed, restarts=restarts, iterations=iterations, done=done)
    centroids_KF = start.centroids
    counts_K = np.bincount(start.labels, minlength=num_clusters).astype(np.float32)
    for _ in range(iterations):
        before_KF = centroids_KF
        for begin in range(0, len(rows), batch_size):
            batch = rows[begin : begin + batch_size]
            # The last batch is padded, so that one program serves all.
            padded = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
            counted = np.arange(batch_size) < len(batch)
            sums_KF, new_K, _ = kmeans.sums(*kmeans.blocks(padded, counted), jnp.asarray(centroids_KF))
            sums_KF, new_K = np.asarray(sums_KF), np.asarray(new_K)
            counts_K = counts_K + new_K
            rate_K1 = 1 / np.maximum(counts_K, 1)[:, None]
            centroids_KF = centroids_KF + rate_K1 * (sums_KF - new_K[:, None] * centroids_KF)
        if np.abs(centroids_KF - before_KF).max() < STILL:
            break
    return centroids_KF.astype(np.float32)
