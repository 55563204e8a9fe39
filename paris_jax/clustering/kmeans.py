"""k-means in JAX: greedy k-means++ seeding, Lloyd's iterations with static shapes, distances in blocks of rows.

Everything is float32 at the highest matmul precision. A block is cut into lanes, which the devices of this machine
share; sums run over rows and lanes in a fixed order, so that the number of devices does not change the result. Memory
beyond the features is one block of distances, block x K, whatever the number of rows.

Letters: N rows, F features, K centroids, R candidates, G blocks of L lanes of M rows (G L M >= N, padded with rows of
weight 0).
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BLOCK_ROWS = 8192
LANES = 8


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
    rows_GLMF, weights_GLM = blocks(features, np.ones(len(features)) if weights is None else weights)
    best = None
    for key in jax.random.split(jax.random.key(seed), restarts):
        centroids, inertia = _run(rows_GLMF, weights_GLM, key, num_clusters, iterations)
        if best is None or float(inertia) < best[1]:
            best = (centroids, float(inertia))
        done()
    assert best is not None
    return Fit(np.asarray(best[0]), assign(features, np.asarray(best[0])), best[1])


def assign(features: np.ndarray, centroids: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """Returns the nearest centroid of each row (N, F), (N,) int32.

    `offsets` (K,) are added to the squared distances before the nearest is chosen (`balance`).
    """
    rows_GLMF, _ = blocks(np.asarray(features, np.float32), np.ones(len(features)))
    added = np.zeros(len(centroids)) if offsets is None else offsets
    found = _nearest(rows_GLMF, jnp.asarray(centroids, jnp.float32), jnp.asarray(added, jnp.float32))
    return np.asarray(found).reshape(-1)[: len(features)]


def distances(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Returns the distances (N, K) float32 of rows (N, F) to all centroids."""
    rows_GLMF, _ = blocks(np.asarray(features, np.float32), np.ones(len(features)))
    squared = np.asarray(_squared_distances(rows_GLMF, jnp.asarray(centroids, jnp.float32)))
    return np.sqrt(squared.reshape(-1, len(centroids))[: len(features)])


def blocks(features: np.ndarray, weights: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Rows (N, F) -> (G, L, M, F) and weights (N,) -> (G, L, M), padded with rows of weight 0; lanes on the devices."""
    num_rows, width = features.shape
    # Powers of two, so that few numbers of rows are compiled for.
    lane = min(max(BLOCK_ROWS // LANES, 1), 1 << max(-(-num_rows // LANES) - 1, 0).bit_length())
    padding = -num_rows % (LANES * lane) if num_rows else LANES * lane
    rows = np.pad(features, ((0, padding), (0, 0))).reshape(-1, LANES, lane, width)
    counted = np.pad(np.asarray(weights, np.float32), (0, padding)).reshape(-1, LANES, lane)
    return jax.device_put(rows, _sharding(None, "lanes")), jax.device_put(counted, _sharding(None, "lanes"))


def _sharding(*axes: str | None) -> NamedSharding:
    """Arrays split over the devices of this machine, of which the largest number that divides the lanes is used."""
    devices = jax.local_devices()
    count = max(n for n in range(1, LANES + 1) if LANES % n == 0 and n <= len(devices))
    mesh = Mesh(np.asarray(devices[:count]), ("lanes",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def _over_lanes(parts_L: jax.Array) -> jax.Array:
    """Sums over the first axis in the same order on any number of devices."""
    return jnp.sum(jax.lax.with_sharding_constraint(parts_L, _sharding()), axis=0)


def _block_distances(rows_LMF: jax.Array, centroids_KF: jax.Array) -> jax.Array:
    """Squared distances (L, M, K) of one block."""
    product = jnp.einsum("lmf,kf->lmk", rows_LMF, centroids_KF, precision="highest")
    squared = jnp.sum(rows_LMF**2, -1)[..., None] - 2 * product + jnp.sum(centroids_KF**2, -1)
    return jnp.maximum(squared, 0.0)


@jax.jit
def _squared_distances(rows_GLMF: jax.Array, centroids_KF: jax.Array) -> jax.Array:
    """Squared distances (G, L, M, K), block by block."""
    return jax.lax.map(lambda rows_LMF: _block_distances(rows_LMF, centroids_KF), rows_GLMF)


@jax.jit
def _nearest(rows_GLMF: jax.Array, centroids_KF: jax.Array, offsets_K: jax.Array) -> jax.Array:
    """Labels (G, L, M) int32, block by block."""

    def block(rows_LMF: jax.Array) -> jax.Array:
        return jnp.argmin(_block_distances(rows_LMF, centroids_KF) + offsets_K, axis=-1).astype(jnp.int32)

    return jax.lax.map(block, rows_GLMF)


@partial(jax.jit, static_argnames=("num_clusters", "iterations"))
def _run(
    rows_GLMF: jax.Array, weights_GLM: jax.Array, key: jax.Array, num_clusters: int, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """One seeding and its Lloyd iterations: centroids (K, F) and their inertia."""

    def unfinished(state):
        step, _, moved = state
        return (step < iterations) & moved

    def iterate(state):
        step, centroids_KF, _ = state
        moved_KF, _ = _lloyd(rows_GLMF, weights_GLM, centroids_KF)
        return step + 1, moved_KF, jnp.any(moved_KF != centroids_KF)

    seeds_KF = _seed(rows_GLMF, weights_GLM, key, num_clusters)
    _, centroids_KF, _ = jax.lax.while_loop(unfinished, iterate, (0, seeds_KF, True))
    return centroids_KF, _lloyd(rows_GLMF, weights_GLM, centroids_KF)[1]


@jax.jit
def sums(
    rows_GLMF: jax.Array, weights_GLM: jax.Array, centroids_KF: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums over rows by nearest centroid: features (K, F), weights (K,); and squared distances (G, L, M), weighted."""
    num_clusters = len(centroids_KF)

    def block(carry, rows_weights):
        sums_LKF, counts_LK = carry
        rows_LMF, weights_LM = rows_weights
        labels_LM = jnp.argmin(_block_distances(rows_LMF, centroids_KF), axis=-1)
        members_LMK = jax.nn.one_hot(labels_LM, num_clusters) * weights_LM[..., None]
        # A product with one-hot rows, not a scatter: its order of summation does not change from run to run.
        sums_LKF += jnp.einsum("lmk,lmf->lkf", members_LMK, rows_LMF, precision="highest")
        error_LM = jnp.sum((rows_LMF - centroids_KF[labels_LM]) ** 2, axis=-1) * weights_LM
        return (sums_LKF, counts_LK + members_LMK.sum(axis=1)), error_LM

    zeros = (jnp.zeros((LANES, *centroids_KF.shape)), jnp.zeros((LANES, num_clusters)))
    (sums_LKF, counts_LK), error_GLM = jax.lax.scan(block, zeros, (rows_GLMF, weights_GLM))
    return _over_lanes(sums_LKF), _over_lanes(counts_LK), error_GLM


def _lloyd(rows_GLMF: jax.Array, weights_GLM: jax.Array, centroids_KF: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One iteration: the mean of every cluster (K, F), and the inertia of the centroids given."""
    sums_KF, counts_K, error_GLM = sums(rows_GLMF, weights_GLM, centroids_KF)
    means_KF = sums_KF / jnp.maximum(counts_K, 1e-9)[:, None]
    moved_KF = jax.lax.cond(
        jnp.any(counts_K == 0), partial(_reseed, rows_GLMF, error_GLM), lambda means, _: means, means_KF, counts_K
    )
    return moved_KF, inertia_of(error_GLM)


def inertia_of(error_GLM: jax.Array) -> jax.Array:
    """The sum of the squared distances that `sums` returns."""
    return _over_lanes(error_GLM.sum(axis=(0, 2)))


def _reseed(rows_GLMF: jax.Array, error_GLM: jax.Array, means_KF: jax.Array, counts_K: jax.Array) -> jax.Array:
    """Puts empty clusters on the rows that are farthest from their centroids, one each."""
    _, farthest_K = jax.lax.top_k(error_GLM.ravel(), min(len(counts_K), error_GLM.size))
    empty_K = counts_K == 0
    rank_K = jnp.clip(jnp.cumsum(empty_K) - 1, 0, len(farthest_K) - 1)
    rows = rows_GLMF.reshape(-1, rows_GLMF.shape[-1])
    return jnp.where(empty_K[:, None], rows[farthest_K[rank_K]], means_KF)


def _seed(rows_GLMF: jax.Array, weights_GLM: jax.Array, key: jax.Array, num_clusters: int) -> jax.Array:
    """Greedy k-means++: each next centroid is the best of a few rows drawn in proportion to their squared distance."""
    rows = rows_GLMF.reshape(-1, rows_GLMF.shape[-1])
    candidates = 2 + int(np.log(num_clusters))

    def draw(key: jax.Array, mass_GLM: jax.Array) -> jax.Array:
        noise = jax.random.gumbel(key, (candidates, mass_GLM.size))
        return jnp.argmax(jnp.log(mass_GLM.ravel()) + noise, axis=-1)

    first = draw(jax.random.fold_in(key, 0), weights_GLM)[0]
    centroids_KF = jnp.zeros((num_clusters, rows.shape[-1])).at[0].set(rows[first])
    nearest_GLM = _squared_distances(rows_GLMF, rows[first][None])[..., 0]

    def add(k, state):
        centroids_KF, nearest_GLM = state
        drawn_R = draw(jax.random.fold_in(key, k), nearest_GLM * weights_GLM)
        distances_GLMR = jnp.minimum(_squared_distances(rows_GLMF, rows[drawn_R]), nearest_GLM[..., None])
        parts_LR = jnp.einsum("glmr,glm->lr", distances_GLMR, weights_GLM, precision="highest")
        best = jnp.argmin(_over_lanes(parts_LR))
        return centroids_KF.at[k].set(rows[drawn_R[best]]), distances_GLMR[..., best]

    return jax.lax.fori_loop(1, num_clusters, add, (centroids_KF, nearest_GLM))[0]
