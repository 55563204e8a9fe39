"""k-means agrees with scikit-learn, is deterministic and does not depend on the block size."""

import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from sklearn.cluster import KMeans

from paris_jax.clustering import kmeans


def blobs(num_rows: int, width: int, num_clusters: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = 2.5 * rng.normal(size=(num_clusters, width))
    return (centres[rng.integers(num_clusters, size=num_rows)] + rng.normal(size=(num_rows, width))).astype(np.float32)


@pytest.mark.parametrize(("num_rows", "width", "num_clusters"), [(600, 2, 3), (1000, 12, 8), (300, 40, 1)])
def test_inertia_matches_scikit_learn(num_rows, width, num_clusters):
    rows = blobs(num_rows, width, num_clusters)
    # Both end in local optima, so both get enough restarts to find the best one.
    ours = kmeans.fit(rows, num_clusters, restarts=40, iterations=300)
    with threadpoolctl.threadpool_limits(1):  # threads only slow down such small inputs
        theirs = KMeans(num_clusters, n_init=40, max_iter=300, random_state=0).fit(rows)
    assert ours.inertia == pytest.approx(theirs.inertia_, rel=1e-5)
    exact = np.sum((rows.astype(np.float64) - ours.centroids[ours.labels]) ** 2)
    assert ours.inertia == pytest.approx(exact, rel=1e-5)


def test_every_run_converges_to_a_fixed_point_of_scikit_learn():
    rows = blobs(600, 2, 3)
    for seed in range(4):
        ours = kmeans.fit(rows, 3, seed=seed, restarts=1, iterations=300)
        theirs = KMeans(3, init=ours.centroids, n_init=1, max_iter=1, tol=0).fit(rows)
        np.testing.assert_allclose(theirs.cluster_centers_, ours.centroids, atol=1e-5)
        assert np.array_equal(theirs.labels_, ours.labels)


def test_the_same_call_is_bit_identical():
    rows = blobs(500, 6, 4)
    first, second = kmeans.fit(rows, 4, seed=3), kmeans.fit(rows, 4, seed=3)
    assert first.centroids.tobytes() == second.centroids.tobytes()
    assert np.array_equal(first.labels, second.labels)


def test_the_block_size_does_not_change_the_clusters(monkeypatch):
    rows = blobs(500, 6, 4)
    whole = kmeans.fit(rows, 4)
    monkeypatch.setattr(kmeans, "BLOCK_ROWS", 64)  # the last block is padded
    blocked = kmeans.fit(rows, 4)
    order_a, order_b = np.lexsort(whole.centroids.T), np.lexsort(blocked.centroids.T)
    np.testing.assert_allclose(whole.centroids[order_a], blocked.centroids[order_b], atol=1e-5)
    assert np.array_equal(np.argsort(order_a)[whole.labels], np.argsort(order_b)[blocked.labels])


def test_integer_weights_equal_repeated_rows():
    rows = blobs(80, 3, 3)
    weights = np.random.default_rng(1).integers(0, 4, size=len(rows))
    centroids = jnp.asarray(rows[:3])
    weighted, error = kmeans._lloyd(*kmeans.blocks(rows, weights), centroids)
    repeated = np.repeat(rows, weights, axis=0)
    moved, expected = kmeans._lloyd(*kmeans.blocks(repeated, np.ones(len(repeated))), centroids)
    np.testing.assert_allclose(weighted, moved, atol=1e-5)
    assert float(error) == pytest.approx(float(expected), rel=1e-5)


def test_no_cluster_stays_empty():
    # Nearly all rows coincide, so seeding often draws the same point twice; three rows are distinct.
    rows = np.zeros((200, 2), np.float32)
    rows[:3] = [[5, 0], [0, 5], [5, 5]]
    for seed in range(5):
        fit = kmeans.fit(rows, 4, seed=seed, restarts=1)
        assert np.bincount(fit.labels, minlength=4).min() > 0
        assert fit.inertia == pytest.approx(0, abs=1e-6)


def test_an_empty_cluster_moves_to_the_farthest_row():
    rows = np.array([[0.0], [0.1], [9.0]], np.float32)
    rows_GLMF, weights_GLM = kmeans.blocks(rows, np.ones(3))
    moved, _ = kmeans._lloyd(rows_GLMF, weights_GLM, jnp.array([[0.0], [100.0]]))
    assert np.asarray(moved)[1] == pytest.approx(9.0)


def test_assign_returns_the_nearest_centroid_and_all_distances():
    rows, centroids = blobs(50, 4, 3), blobs(3, 4, 3, seed=1)
    labels, distances = kmeans.assign(rows, centroids), kmeans.distances(rows, centroids)
    expected = np.linalg.norm(rows[:, None] - centroids, axis=-1)
    np.testing.assert_allclose(distances, expected, rtol=1e-4)
    assert np.array_equal(labels, expected.argmin(axis=1))


def test_more_clusters_than_rows_is_an_error():
    with pytest.raises(ValueError, match="into 4 clusters"):
        kmeans.fit(np.zeros((3, 2), np.float32), 4)
