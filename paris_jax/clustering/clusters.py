"""The partition of the clips: standardised features, k-means in one or two stages, canonical labels."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import safetensors.numpy

from paris_jax.clustering import balance, kmeans, minibatch
from paris_jax.clustering.rows import FeatureFile, Rows
from paris_jax.data import index

ROUNDS = 10  # of balancing clusters and moving their centroids


@dataclasses.dataclass(frozen=True)
class Clustering:
    """The clustering: assigns a clip to the cluster of its nearest fine centroid.

    mean, spread: (F,) float32, standardise features. fine: (J, F) float32, centroids of the k-means; merge: (J,) int32,
    the cluster of each; offsets: (J,) float32, added to squared distances, which balance the clusters (zeros where they
    are not balanced). centroids: (K, F) float32, mean of each cluster's clips, for the report. With one stage J = K and
    merge is the identity.
    """

    mean: np.ndarray
    spread: np.ndarray
    fine: np.ndarray
    merge: np.ndarray
    centroids: np.ndarray
    offsets: np.ndarray

    def standardise(self, features: np.ndarray) -> np.ndarray:
        return ((np.asarray(features, np.float32) - self.mean) / self.spread).astype(np.float32)

    def assign(self, features: np.ndarray) -> np.ndarray:
        """Clusters (N,) int32 of raw features (N, F); also of clips that were not there when the clusters were made."""
        return self.merge[kmeans.assign(self.standardise(features), self.fine, self.offsets)]

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Distances (N, K) float32 of raw features to the clusters' centroids, in spreads of a feature."""
        return kmeans.distances(self.standardise(features), self.centroids)

    def to_bytes(self) -> bytes:
        return safetensors.numpy.save(
            {f.name: np.ascontiguousarray(getattr(self, f.name)) for f in dataclasses.fields(self)}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Clustering":
        arrays = safetensors.numpy.load(data)
        arrays.setdefault("offsets", np.zeros(len(arrays["fine"]), np.float32))  # not in files of earlier versions
        return cls(**arrays)


@dataclasses.dataclass(frozen=True)
class Method:
    """How clusters are found.

    Attributes:
      num_clusters, fine_clusters: K; with J > 0 fine clusters, k-means finds J first and k-means on their centroids,
        weighted by their sizes, merges them to K (as Paris 1.0 does).
      iterations, restarts, seed: of k-means.
      batch_size: rows per mini-batch; 0 for exact k-means, with all features in memory.
      balance_tolerance: largest relative deviation of a cluster's size from N / K; 0 for clusters of natural sizes.
    """

    num_clusters: int
    fine_clusters: int = 0
    iterations: int = 50
    restarts: int = 8
    seed: int = 0
    batch_size: int = 0
    balance_tolerance: float = 0.0

    @property
    def rounds(self) -> int:
        """Runs of k-means, for a progress bar."""
        return self.restarts * (2 if self.fine_clusters else 1)


def fit(
    clip_ids: Sequence[str],
    features: np.ndarray | FeatureFile,
    method: Method,
    done: Callable[[], None] = lambda: None,
) -> tuple[Clustering, np.ndarray]:
    """Clusters clips by their features.

    Clips are taken in the order of hashes of their ids and clusters are numbered by size (largest first), so that the
    order in which clips arrive changes nothing.

    Args:
      clip_ids: N different names.
      features: (N, F) float32.
      method: how.
      done: called after each run of k-means.

    Returns:
      The partition, and the cluster (N,) int32 of each clip in the order given.
    """
    if len(set(clip_ids)) != len(clip_ids):
        raise ValueError("clip ids must be different from each other")
    order = index.order(index.digests(clip_ids))
    partition, found = fit_rows(Rows.of(features, order), method, done)
    labels = np.empty(len(order), np.int32)
    labels[order] = found
    return partition, labels


def fit_rows(rows: Rows, method: Method, done: Callable[[], None] = lambda: None) -> tuple[Clustering, np.ndarray]:
    """Clusters rows in canonical order; returns the partition and the cluster (N,) int32 of each row.

    Raises:
      UserError: the clusters cannot be balanced as asked for.
    """
    num_clusters = method.num_clusters
    fine = _centroids(rows, method.fine_clusters or num_clusters, method, done)
    merge = np.arange(num_clusters, dtype=np.int32)
    if method.fine_clusters:
        sizes = np.bincount(_labels(rows, fine, None), minlength=len(fine))
        options = {"seed": method.seed, "restarts": method.restarts, "iterations": method.iterations, "done": done}
        merge = kmeans.fit(fine, num_clusters, weights=sizes, **options).labels
    offsets = np.zeros(len(fine), np.float32)
    if method.balance_tolerance:
        fine, offsets = _balance(rows, fine, merge, method)
    labels = merge[_labels(rows, fine, offsets)]
    if method.balance_tolerance:
        balance.check(np.bincount(labels, minlength=num_clusters).tolist(), method.balance_tolerance)

    names, centroids = _canonical(rows, labels, num_clusters)
    merge = names[merge]
    if not method.fine_clusters:  # with one stage, the centroids are in the clusters' order
        fine, offsets, merge = (
            fine[np.argsort(names)],
            offsets[np.argsort(names)],
            np.arange(num_clusters, dtype=np.int32),
        )
    return Clustering(rows.mean, rows.spread, fine, merge, centroids, offsets), names[labels]


def _centroids(rows: Rows, count: int, method: Method, done: Callable[[], None]) -> np.ndarray:
    """Centroids (count, F) of k-means, exact or in mini-batches."""
    options = {"seed": method.seed, "restarts": method.restarts, "iterations": method.iterations, "done": done}
    if method.batch_size:
        return minibatch.fit(rows, count, batch_size=method.batch_size, **options)
    return kmeans.fit(rows[:], count, **options).centroids


def _labels(rows: Rows, centroids: np.ndarray, offsets: np.ndarray | None) -> np.ndarray:
    """The nearest centroid (N,) int32 of each row, block by block."""
    labels = np.empty(len(rows), np.int32)
    for part, block in rows.blocks():
        labels[part] = kmeans.assign(block, centroids, offsets)
    return labels


def _balance(rows: Rows, fine: np.ndarray, merge: np.ndarray, method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Returns fine centroids (J, F) and their offsets (J,), found on at most `balance.ROWS` rows.

    With one stage, centroids move to the means of the balanced clusters, in turn with the offsets.
    """
    sample, num_clusters = rows[: balance.ROWS], method.num_clusters
    tolerance = method.balance_tolerance / 2  # the other half is for the rows beyond the sample
    offsets = np.zeros(len(fine), np.float32)
    before = None
    for _ in range(1 if method.fine_clusters else ROUNDS):
        squared_NJ = kmeans.distances(sample, fine) ** 2
        squared_NK = np.stack([squared_NJ[:, merge == k].min(axis=1) for k in range(num_clusters)], axis=1)
        offsets_K = balance.find_offsets(squared_NK, tolerance)
        offsets = offsets_K[merge]
        labels = (squared_NK + offsets_K).argmin(axis=1)
        settled = before is not None and np.array_equal(labels, before)
        if method.fine_clusters or settled or np.bincount(labels, minlength=num_clusters).min() == 0:
            break
        before = labels
        fine = np.stack([sample[labels == k].mean(axis=0) for k in range(num_clusters)])
    else:  # the offsets of the last centroids
        offsets = balance.find_offsets(kmeans.distances(sample, fine) ** 2, tolerance)[merge]
    return fine, offsets


def _canonical(rows: Rows, labels: np.ndarray, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the new number of each label (K,), largest cluster first, and the centroids (K, F) in the new order."""
    sizes = np.bincount(labels, minlength=num_clusters)
    sums = np.zeros((num_clusters, len(rows.mean)))
    for part, block in rows.blocks():
        for k in np.unique(labels[part]):
            sums[k] += block[labels[part] == k].sum(axis=0, dtype=np.float64)
    centroids = sums / np.maximum(sizes, 1)[:, None]
    old_order = sorted(range(num_clusters), key=lambda k: (-sizes[k], centroids[k].tolist()))
    names = np.empty(num_clusters, np.int32)
    names[old_order] = np.arange(num_clusters, dtype=np.int32)
    return names, centroids[old_order].astype(np.float32)
