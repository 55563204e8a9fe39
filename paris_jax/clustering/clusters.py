"""The partition of the clips: standardised features, k-means in one or two stages, canonical labels."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import safetensors.numpy

from paris_jax.clustering import kmeans

# A feature that varies less than this over the clips carries no information; standardising it would amplify noise.
SMALLEST_SPREAD = 1e-6


@dataclasses.dataclass(frozen=True)
class Clustering:
    """The clustering: assigns a clip to the cluster of its nearest fine centroid.

    mean, spread: (F,) float32, standardise features. fine: (J, F) float32, centroids of the k-means; merge: (J,) int32,
    the cluster of each. centroids: (K, F) float32, mean of each cluster's clips, for the report. With one stage J = K
    and merge is the identity.
    """

    mean: np.ndarray
    spread: np.ndarray
    fine: np.ndarray
    merge: np.ndarray
    centroids: np.ndarray

    def standardise(self, features: np.ndarray) -> np.ndarray:
        return ((np.asarray(features, np.float32) - self.mean) / self.spread).astype(np.float32)

    def assign(self, features: np.ndarray) -> np.ndarray:
        """Clusters (N,) int32 of raw features (N, F)."""
        return self.merge[kmeans.assign(self.standardise(features), self.fine)[0]]

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Distances (N, K) float32 of raw features to the clusters' centroids, in spreads of a feature."""
        return kmeans.assign(self.standardise(features), self.centroids)[1]

    def to_bytes(self) -> bytes:
        return safetensors.numpy.save(
            {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in dataclasses.fields(self)}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Clustering":
        return cls(**safetensors.numpy.load(data))


def fit(
    clip_ids: Sequence[str],
    features: np.ndarray,
    *,
    num_clusters: int,
    fine_clusters: int = 0,
    iterations: int = 50,
    restarts: int = 8,
    seed: int = 0,
    done: Callable[[], None] = lambda: None,
) -> tuple[Clustering, np.ndarray]:
    """Clusters clips by their features.

    Clips are taken in the order of their ids and clusters are numbered by size (largest first), so that the order in
    which clips arrive changes nothing.

    Args:
      clip_ids: N different names.
      features: (N, F) float32.
      num_clusters, fine_clusters: K; with J > 0 fine clusters, k-means finds J first and k-means on their centroids,
        weighted by their sizes, merges them to K (as Paris 1.0 does).
      iterations, restarts, seed: of k-means.
      done: called after each run of k-means, `restarts` times for each stage.

    Returns:
      The partition, and the cluster (N,) int32 of each clip in the order given.
    """
    if len(set(clip_ids)) != len(clip_ids):
        raise ValueError("clip ids must be different from each other")
    order = np.argsort(np.asarray(clip_ids))
    rows = np.asarray(features, np.float32)[order]
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    spread = rows.std(axis=0, dtype=np.float64).astype(np.float32)
    spread[spread < SMALLEST_SPREAD] = 1.0
    rows = (rows - mean) / spread

    options = {"seed": seed, "restarts": restarts, "iterations": iterations, "done": done}
    if fine_clusters:
        first = kmeans.fit(rows, fine_clusters, **options)
        sizes = np.bincount(first.labels, minlength=len(first.centroids))
        merge = kmeans.fit(first.centroids, num_clusters, weights=sizes, **options).labels
    else:
        first = kmeans.fit(rows, num_clusters, **options)
        merge = np.arange(num_clusters, dtype=np.int32)

    labels = merge[first.labels]
    names, centroids = _canonical(rows, labels, num_clusters)
    merge = names[merge]
    fine = first.centroids
    if not fine_clusters:  # with one stage, the centroids are in the clusters' order
        fine, merge = fine[np.argsort(names)], np.arange(num_clusters, dtype=np.int32)
    partition = Clustering(mean, spread, fine, merge, centroids)
    clusters = np.empty(len(rows), np.int32)
    clusters[order] = names[labels]
    return partition, clusters


def _canonical(rows: np.ndarray, labels: np.ndarray, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the new number of each label (K,), largest cluster first, and the centroids (K, F) in the new order."""
    sizes = np.bincount(labels, minlength=num_clusters)
    centroids = np.stack(
        [rows[labels == k].mean(axis=0) if sizes[k] else np.zeros(rows.shape[1]) for k in range(num_clusters)]
    )
    old_order = sorted(range(num_clusters), key=lambda k: (-sizes[k], centroids[k].tolist()))
    names = np.empty(num_clusters, np.int32)
    names[old_order] = np.arange(num_clusters, dtype=np.int32)
    return names, centroids[old_order].astype(np.float32)
