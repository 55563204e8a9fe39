"""Accumulated moments are those of all rows at once, on any number of devices, whatever the mean."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paris_jax.evaluation.estimates import mean
from paris_jax.evaluation.metrics.frechet import frechet_distance
from paris_jax.evaluation.metrics.moments import Moments, estimate_of, frechet_of_moments

ROOT = Path(__file__).parents[2]


def accumulated(rows: np.ndarray, sizes: list[int]) -> Moments:
    moments, start = Moments.empty(rows.shape[1]), 0
    for size in sizes:
        moments, start = moments.update(rows[start : start + size]), start + size
    assert start == len(rows)
    return moments


def test_batches_of_any_size_give_the_moments_of_all_rows():
    rows = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32) * [1, 10, 0.1, 3, 1] + 2
    found = accumulated(rows.astype(np.float32), [1, 7, 12, 20])
    exact = rows.astype(np.float32).astype(np.float64)
    assert float(found.count) == 40
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(exact.T), rtol=1e-12)


def test_a_large_mean_does_not_swallow_the_covariance():
    rows = (np.random.default_rng(1).standard_normal((64, 3)) + 1e4).astype(np.float32)
    found = accumulated(rows, [16] * 4)
    np.testing.assert_allclose(found.covariance, np.cov(rows.astype(np.float64).T), rtol=1e-9)


def test_rows_that_fill_a_batch_up_do_not_count():
    rows = np.random.default_rng(2).standard_normal((6, 3))
    filled = Moments.empty(3).update(np.concatenate([rows, 9 + rows[:2]]), np.arange(8) < 6)
    np.testing.assert_allclose(filled.covariance, np.cov(rows.T), rtol=1e-12)


def test_two_hosts_moments_merge():
    rows = np.random.default_rng(3).standard_normal((30, 4))
    both = accumulated(rows[:11], [11]).merge(accumulated(rows[11:], [19]))
    np.testing.assert_allclose(both.mean, rows.mean(0), atol=1e-14)
    np.testing.assert_allclose(both.covariance, np.cov(rows.T), rtol=1e-12)


def test_the_distance_of_moments_is_that_of_the_features():
    rng = np.random.default_rng(4)
    x, y = rng.standard_normal((50, 8)), rng.standard_normal((50, 8)) * 2 + 0.3
    assert frechet_of_moments(accumulated(x, [50]), accumulated(y, [20, 30])) == pytest.approx(
        frechet_distance(x, y), rel=1e-10
    )


def test_unequal_counts_and_values_that_are_not_finite_are_refused():
    rows = np.random.default_rng(5).standard_normal((8, 2))
    with pytest.raises(ValueError, match="must be equal"):
        frechet_of_moments(accumulated(rows, [8]), accumulated(rows[:7], [7]))
    bad = np.where(np.arange(8)[:, None] == 3, np.nan, rows)
    with pytest.raises(ValueError, match="not finite"):
        frechet_of_moments(accumulated(rows, [8]), accumulated(bad, [8]))


def test_a_batch_split_over_eight_devices_gives_the_same_moments():
    code = """
import numpy as np, jax
from jax.sharding import NamedSharding, PartitionSpec
from paris_jax.evaluation.metrics.moments import Moments
rows = np.random.default_rng(0).standard_normal((24, 5)).astype(np.float32) + 7
mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
batch = jax.device_put(rows, NamedSharding(mesh, PartitionSpec("rows")))
assert len(batch.sharding.device_set) == 8
found = Moments.empty(5).update(batch).update(batch)
twice = np.concatenate([rows, rows]).astype(np.float64)
np.testing.assert_allclose(found.covariance, np.cov(twice.T), rtol=1e-12)
"""
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PATH": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=ROOT)


def test_a_score_of_each_clip_accumulates_to_its_mean_and_error():
    scores = np.random.default_rng(6).standard_normal(30)
    found, expected = estimate_of(accumulated(scores[:, None], [13, 17])), mean(scores)
    assert found["n"] == 30 and found["value"] == pytest.approx(expected["value"], rel=1e-12)
    assert found["stderr"] == pytest.approx(expected["stderr"], rel=1e-12)
    with pytest.raises(ValueError, match="need 1"):
        estimate_of(accumulated(np.ones((4, 2)), [4]))
