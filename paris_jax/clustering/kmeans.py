"""k-means in JAX: greedy k-means++ seeding, Lloyd's iterations with static shapes, distances in blocks of rows.

Everything is float32 at the highest matmul precision, and sums run over rows in a fixed order, so one machine gives one
result. Memory beyond the features is one block of distances, block x K, whatever the number of rows.

Letters: N rows, F features, K centroids, R candidates, G blocks of M rows (G M >= N, padded with rows of weight 0).
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

BLOCK_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class Fit:
    """The best of several runs: centroids (K, F) float32, labels (N,) int32, inertia (sum of squared distances)."""

    centroids: np.ndarray
    labels: np.ndarray
    inertia: float


def fit(
    features: np.ndarray,
    num_clusters: int,
    *,
    seed: int = 0,
    restarts: int = 8,
    iterations: int = 50,
    weights: np.ndarray | None = None,
    done: Callable[[], None] = lambda: None,
) -> Fit:
    """Clusters rows; of `restarts` runs from different seedings the one with the lowest inertia counts.

    Args:
      features: (N, F) float32, finite.
      num_clusters: K, at most N.
      seed, restarts, iterations: of the seeding, of the runs, and the most Lloyd iterations of a run.
      weights: (N,) how often a row counts; every row once by default.
      done: called after each run, for a progress bar.

    Raises:
      ValueError: K is not between 1 and N, or the shapes do not fit.
    """
    features = np.asarray(features, np.float32)
    if features.ndim != 2 or not 1 <= num_clusters <= len(features):
        raise ValueError(f"k-means of {features.shape} rows x features into {num_clusters} clusters")
    rows_GMF, weights_GM = _blocks(features, np.ones(len(features)) if weights is None else weights)
    best = None
    for key in jax.random.split(jax.random.key(seed), restarts):
        centroids, inertia = _run(rows_GMF, weights_GM, key, num_clusters, iterations)
        if best is None or float(inertia) < best[1]:
            best = (centroids, float(inertia))
        done()
    assert best is not None
    labels, _ = assign(features, np.asarray(best[0]))
    return Fit(np.asarray(best[0]), labels, best[1])


def assign(features: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest centroid of each row, (N,) int32, and the distances to all, (N, K) float32."""
    rows_GMF, _ = _blocks(np.asarray(features, np.float32), np.ones(len(features)))
    squared = np.asarray(_squared_distances(rows_GMF, jnp.asarray(centroids, jnp.float32)))
    squared = squared.reshape(-1, len(centroids))[: len(features)]
    return squared.argmin(axis=1).astype(np.int32), np.sqrt(squared)


def _blocks(features: np.ndarray, weights: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Rows (N, F) -> (G, M, F) and weights (N,) -> (G, M), padded with rows of weight 0."""
    num_rows, width = features.shape
    block = min(BLOCK_ROWS, max(num_rows, 1))
    padding = -num_rows % block
    rows = np.pad(features, ((0, padding), (0, 0)))
    counted = np.pad(np.asarray(weights, np.float32), (0, padding))
    return jnp.asarray(rows.reshape(-1, block, width)), jnp.asarray(counted.reshape(-1, block))


def _block_distances(rows_MF: jax.Array, centroids_KF: jax.Array) -> jax.Array:
    """Squared distances (M, K) of one block."""
    product = jnp.einsum("mf,kf->mk", rows_MF, centroids_KF, precision="highest")
    squared = jnp.sum(rows_MF**2, -1)[:, None] - 2 * product + jnp.sum(centroids_KF**2, -1)
    return jnp.maximum(squared, 0.0)


@jax.jit
def _squared_distances(rows_GMF: jax.Array, centroids_KF: jax.Array) -> jax.Array:
    """Squared distances (G, M, K), block by block."""
    return jax.lax.map(lambda rows_MF: _block_distances(rows_MF, centroids_KF), rows_GMF)


@partial(jax.jit, static_argnames=("num_clusters", "iterations"))
def _run(
    rows_GMF: jax.Array, weights_GM: jax.Array, key: jax.Array, num_clusters: int, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """One seeding and its Lloyd iterations: centroids (K, F) and their inertia."""

    def unfinished(state):
        step, _, moved = state
        return (step < iterations) & moved

    def iterate(state):
        step, centroids_KF, _ = state
        moved_KF, _ = _lloyd(rows_GMF, weights_GM, centroids_KF)
        return step + 1, moved_KF, jnp.any(moved_KF != centroids_KF)

    seeds_KF = _seed(rows_GMF, weights_GM, key, num_clusters)
    _, centroids_KF, _ = jax.lax.while_loop(unfinished, iterate, (0, seeds_KF, True))
    return centroids_KF, _lloyd(rows_GMF, weights_GM, centroids_KF)[1]


def _lloyd(rows_GMF: jax.Array, weights_GM: jax.Array, centroids_KF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One iteration: the mean of every cluster (K, F), and the inertia of the centroids given."""
    num_clusters = len(centroids_KF)

    def block(carry, rows_weights):
        sums_KF, counts_K = carry
        rows_MF, weights_M = rows_weights
        labels_M = jnp.argmin(_block_distances(rows_MF, centroids_KF), axis=-1)
        members_MK = jax.nn.one_hot(labels_M, num_clusters) * weights_M[:, None]
        # A product with one-hot rows, not a scatter: its order of summation does not change from run to run.
        sums_KF += jnp.einsum("mk,mf->kf", members_MK, rows_MF, precision="highest")
        error_M = jnp.sum((rows_MF - centroids_KF[labels_M]) ** 2, axis=-1) * weights_M
        return (sums_KF, counts_K + members_MK.sum(axis=0)), error_M

    zeros = (jnp.zeros_like(centroids_KF), jnp.zeros(num_clusters))
    (sums_KF, counts_K), error_GM = jax.lax.scan(block, zeros, (rows_GMF, weights_GM))
    means_KF = sums_KF / jnp.maximum(counts_K, 1e-9)[:, None]
    moved_KF = jax.lax.cond(
        jnp.any(counts_K == 0), partial(_reseed, rows_GMF, error_GM), lambda means, _: means, means_KF, counts_K
    )
    return moved_KF, jnp.sum(error_GM)


def _reseed(rows_GMF: jax.Array, error_GM: jax.Array, means_KF: jax.Array, counts_K: jax.Array) -> jax.Array:
    """Puts empty clusters on the rows that are farthest from their centroids, one each."""
    _, farthest_K = jax.lax.top_k(error_GM.ravel(), min(len(counts_K), error_GM.size))
    empty_K = counts_K == 0
    rank_K = jnp.clip(jnp.cumsum(empty_K) - 1, 0, len(farthest_K) - 1)
    rows = rows_GMF.reshape(-1, rows_GMF.shape[-1])
    return jnp.where(empty_K[:, None], rows[farthest_K[rank_K]], means_KF)


def _seed(rows_GMF: jax.Array, weights_GM: jax.Array, key: jax.Array, num_clusters: int) -> jax.Array:
    """Greedy k-means++: each next centroid is the best of a few rows drawn in proportion to their squared distance."""
    rows = rows_GMF.reshape(-1, rows_GMF.shape[-1])
    candidates = 2 + int(np.log(num_clusters))

    def draw(key: jax.Array, mass_GM: jax.Array) -> jax.Array:
        noise = jax.random.gumbel(key, (candidates, mass_GM.size))
        return jnp.argmax(jnp.log(mass_GM.ravel()) + noise, axis=-1)

    first = draw(jax.random.fold_in(key, 0), weights_GM)[0]
    centroids_KF = jnp.zeros((num_clusters, rows.shape[-1])).at[0].set(rows[first])
    nearest_GM = _squared_distances(rows_GMF, rows[first][None])[..., 0]

    def add(k, state):
        centroids_KF, nearest_GM = state
        drawn_R = draw(jax.random.fold_in(key, k), nearest_GM * weights_GM)
        distances_GMR = jnp.minimum(_squared_distances(rows_GMF, rows[drawn_R]), nearest_GM[..., None])
        best = jnp.argmin(jnp.einsum("gmr,gm->r", distances_GMR, weights_GM, precision="highest"))
        return centroids_KF.at[k].set(rows[drawn_R[best]]), distances_GMR[..., best]

    return jax.lax.fori_loop(1, num_clusters, add, (centroids_KF, nearest_GM))[0]
