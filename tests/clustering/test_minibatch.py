"""k-means in mini-batches comes close to the exact one, from memory or from disk, on any number of devices."""

import os
import subprocess
import sys

import numpy as np
import pytest

from paris_jax.clustering import clusters, kmeans, minibatch
from paris_jax.clustering.clusters import Method
from paris_jax.clustering.rows import FeatureFile
from tests.clustering.test_kmeans import blobs

IDS = [f"clip {i}" for i in range(2000)]


def inertia(rows, centroids) -> float:
    return float(np.sum(kmeans.distances(rows, centroids).min(axis=1) ** 2, dtype=np.float64))


def test_mini_batches_reach_the_inertia_of_exact_k_means(monkeypatch):
    monkeypatch.setattr(minibatch, "SAMPLE", 200)  # a tenth of the rows
    rows = blobs(2000, 8, 6)
    exact = kmeans.fit(rows, 6, restarts=8)
    found = minibatch.fit(rows, 6, batch_size=256, restarts=8)
    assert inertia(rows, found) < 1.01 * exact.inertia
    seeds = kmeans.fit(rows[:200], 6, restarts=8).centroids
    assert inertia(rows, found) < inertia(rows, seeds)  # the batches beyond the first rows count


def test_a_file_and_memory_give_the_same_bits(tmp_path):
    features = blobs(2000, 8, 6)
    (tmp_path / "features").write_bytes(features.tobytes())
    method = Method(4, fine_clusters=12, batch_size=300, restarts=2)
    first, labels = clusters.fit(IDS, features, method)
    second, again = clusters.fit(IDS, FeatureFile(tmp_path / "features", features.shape), method)
    assert first.to_bytes() == second.to_bytes()
    assert np.array_equal(labels, again)


def test_the_result_does_not_depend_on_the_order_of_clips():
    features = blobs(2000, 8, 6)
    order = np.random.default_rng(1).permutation(len(IDS))
    method = Method(4, batch_size=300, restarts=2)
    first, labels = clusters.fit(IDS, features, method)
    second, again = clusters.fit([IDS[i] for i in order], features[order], method)
    assert first.to_bytes() == second.to_bytes() and np.array_equal(again, labels[order])


ON_DEVICES = """
import hashlib, jax, numpy as np
from paris_jax.clustering import clusters, kmeans
from paris_jax.clustering.clusters import Method
kmeans.BLOCK_ROWS = 512
IDS = [f"clip {i}" for i in range(2000)]
rows = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
placed = kmeans.blocks(rows, np.ones(2000))[0]
print(len(placed.sharding.device_set))
for batch in (0, 300):
    made, labels = clusters.fit(IDS, rows, Method(4, fine_clusters=12, batch_size=batch, restarts=2))
    print(hashlib.sha256(made.to_bytes() + labels.tobytes()).hexdigest())
"""


def test_the_number_of_devices_does_not_change_a_bit():
    printed = {}
    for count in (1, 8):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(
            [sys.executable, "-c", ON_DEVICES], env=environment, capture_output=True, text=True, check=True
        )
        used, *printed[count] = done.stdout.split()
        assert used == str(count)
    assert printed[1] == printed[8]


@pytest.mark.parametrize("fine", [0, 30])
@pytest.mark.parametrize("batch_size", [0, 300])
def test_balanced_clusters_have_equal_sizes_and_new_clips_follow(fine, batch_size):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 3)).astype(np.float32) ** 3  # dense in the middle
    method = Method(4, fine_clusters=fine, batch_size=batch_size, restarts=2)
    natural = np.bincount(clusters.fit(IDS, features, method)[1])
    made, labels = clusters.fit(
        IDS, features, Method(4, fine_clusters=fine, batch_size=batch_size, restarts=2, balance_tolerance=0.05)
    )
    sizes = np.bincount(labels)
    assert natural.max() > 1.3 * 500
    assert np.abs(sizes - 500).max() <= 0.05 * 500
    assert np.array_equal(made.assign(features), labels)
    new = np.bincount(made.assign(rng.normal(size=(4000, 3)).astype(np.float32) ** 3))
    assert np.abs(new - 1000).max() < 150


def test_identical_clips_cannot_be_balanced():
    from paris_jax.errors import UserError

    features = np.zeros((2000, 2), np.float32)
    features[:200] = np.random.default_rng(0).normal(size=(200, 2))
    with pytest.raises(UserError, match=r"balance_tolerance=0\.05: the clusters have .* 500 each were expected"):
        clusters.fit(IDS, features, Method(4, restarts=2, balance_tolerance=0.05))
