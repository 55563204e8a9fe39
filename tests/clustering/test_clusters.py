"""The partition does not depend on the order of clips and assigns the same clusters after saving and loading."""

import dataclasses

import numpy as np
import pytest

from paris_jax.clustering import clusters
from paris_jax.clustering.clusters import Method

SIZES = (90, 60, 30)


@pytest.fixture
def clips():
    """Shuffled ids and features of three blobs of different sizes; one feature is large, one is constant."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(3), SIZES))
    features = np.eye(3, 5)[truth] * 8 + rng.normal(size=(len(truth), 5))
    features[:, 3] *= 1e4
    features[:, 4] = 7.0
    return [f"clip-{i:04d}" for i in range(len(truth))], features.astype(np.float32), truth


def test_finds_the_blobs_and_orders_them_by_size(clips):
    ids, features, truth = clips
    _, found = clusters.fit(ids, features, Method(3))
    assert np.array_equal(found, truth)


@pytest.mark.parametrize("fine", [0, 12])
def test_the_partition_does_not_depend_on_the_order_of_clips(clips, fine):
    ids, features, _ = clips
    partition, found = clusters.fit(ids, features, Method(3, fine))
    order = np.random.default_rng(1).permutation(len(ids))
    again, found_again = clusters.fit([ids[i] for i in order], features[order], Method(3, fine))
    assert np.array_equal(found_again, found[order])
    assert again.to_bytes() == partition.to_bytes()


def test_two_stages_merge_fine_clusters(clips):
    ids, features, truth = clips
    partition, found = clusters.fit(ids, features, Method(3, 12))
    assert partition.fine.shape == (12, 5)
    assert sorted(set(partition.merge.tolist())) == [0, 1, 2]
    assert np.mean(found == truth) > 0.98


@pytest.mark.parametrize("fine", [0, 12])
def test_assign_reproduces_the_fitted_clusters_after_saving(clips, fine):
    ids, features, _ = clips
    partition, found = clusters.fit(ids, features, Method(3, fine))
    read = clusters.Clustering.from_bytes(partition.to_bytes())
    assert np.array_equal(read.assign(features), found)
    for field in dataclasses.fields(partition):
        np.testing.assert_array_equal(getattr(read, field.name), getattr(partition, field.name))


def test_centroids_are_the_means_of_the_clusters(clips):
    ids, features, truth = clips
    partition, _ = clusters.fit(ids, features, Method(3))
    expected = [partition.standardise(features)[truth == k].mean(axis=0) for k in range(3)]
    np.testing.assert_allclose(partition.centroids, expected, atol=1e-5)


def test_duplicate_ids_are_an_error(clips):
    ids, features, _ = clips
    with pytest.raises(ValueError, match="different"):
        clusters.fit([ids[0], *ids[:-1]], features, Method(3))
