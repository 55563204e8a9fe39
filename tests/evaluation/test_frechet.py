"""The Frechet distance is the analytic one, needs no matrix square root, and has the known bias."""

import numpy as np
import pytest
import scipy.linalg

from paris_jax.evaluation.estimates import jackknife
from paris_jax.evaluation.metrics.frechet import (
    frechet_difference,
    frechet_distance,
    frechet_estimate,
    frechet_limit,
)


def exact_gaussian(n: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """(n, F) features whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(seed).standard_normal((n, len(mean)))
    x -= x.mean(0)
    x = np.linalg.qr(x)[0] * np.sqrt(n - 1)
    return x @ np.linalg.cholesky(covariance).T + mean


def test_equals_the_distance_of_two_gaussians_with_known_moments():
    # Diagonal covariances commute: |m1 - m2|^2 + sum (s1 - s2)^2.
    mean1, mean2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    spread1, spread2 = np.array([1.0, 2.0, 0.5]), np.array([2.0, 1.0, 0.5])
    x = exact_gaussian(50, mean1, np.diag(spread1**2), 0)
    y = exact_gaussian(50, mean2, np.diag(spread2**2), 1)
    expected = ((mean1 - mean2) ** 2).sum() + ((spread1 - spread2) ** 2).sum()
    assert frechet_distance(x, y) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("n", [200, 40])  # more clips than features, and fewer
def test_equals_the_matrix_square_root_in_float64(n):
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, 64)) @ rng.standard_normal((64, 64)), rng.standard_normal((n, 64)) * 2 + 0.5
    c1, c2 = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(c1 @ c2 + (0 if n > 64 else 1e-9) * np.eye(64)).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6 if n > 64 else 1e-3)


def test_is_zero_for_the_same_clips_in_another_order_and_symmetric():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 8)), rng.standard_normal((30, 8)) + 1
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-12)


def test_float32_features_are_computed_in_float64():
    x = np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32) + 1000
    y = np.random.default_rng(1).standard_normal((100, 16)).astype(np.float32) + 1000
    assert frechet_distance(x, y) == frechet_distance(x.astype(np.float64), y.astype(np.float64))


def test_real_against_real_falls_as_one_over_n():
    """The floor that has to stand beside every figure: two samples of one distribution are not at distance zero."""

    def floor(n: int) -> float:
        rng = np.random.default_rng(n)
        return float(np.mean([frechet_distance(*rng.standard_normal((2, n, 20))) for _ in range(20)]))

    small, large = floor(100), floor(400)
    assert small > 0
    assert small / large == pytest.approx(4, rel=0.15)


def test_unequal_counts_are_refused():
    with pytest.raises(ValueError, match="must both be"):
        frechet_distance(np.zeros((10, 4)), np.zeros((12, 4)))


def test_features_that_are_not_finite_are_refused():
    x = np.ones((10, 4))
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(x, np.ones((10, 4)))


def test_jackknife_of_a_mean_is_its_standard_error():
    x = np.random.default_rng(0).standard_normal(64)
    made = jackknife(lambda kept: float(x[kept].mean()), 64, groups=64)
    assert made["value"] == pytest.approx(x.mean())
    assert made["stderr"] == pytest.approx(x.std(ddof=1) / 8, rel=1e-9)


def test_standard_error_matches_the_spread_over_repeated_draws():
    rng = np.random.default_rng(3)

    def draw():
        return rng.standard_normal((256, 4)), rng.standard_normal((256, 4)) + 0.5

    repeats = [frechet_distance(*draw()) for _ in range(200)]
    errors = [frechet_estimate(*draw())["stderr"] for _ in range(20)]
    assert np.mean(errors) == pytest.approx(np.std(repeats), rel=0.25)


def test_the_difference_of_two_arms_is_paired():
    """Models that share what is random about a prompt differ by less than their own errors."""
    rng = np.random.default_rng(4)
    real, base = rng.standard_normal((96, 8)), rng.standard_normal((96, 8)) + 0.4
    first, second = base, base + 0.1
    made = frechet_difference(first, second, real)
    assert made["value"] == pytest.approx(frechet_distance(first, real) - frechet_distance(second, real))
    assert made["stderr"] < 0.5 * frechet_estimate(first, real)["stderr"]


def test_the_limit_of_many_clips_is_the_true_distance():
    """At 256 clips of 64 features the distance itself is more than four times the true one."""
    rng = np.random.default_rng(5)
    pairs = [(rng.standard_normal((256, 64)), rng.standard_normal((256, 64)) + 0.2) for _ in range(12)]
    true = 64 * 0.2**2
    assert np.mean([frechet_distance(*pair) for pair in pairs]) > 4 * true
    limits = [frechet_limit(*pair) for pair in pairs]
    assert abs(np.mean(limits) - true) < 3 * np.std(limits) / np.sqrt(len(limits)) + 0.15 * true


def test_the_limit_needs_twice_as_many_clips_as_features():
    with pytest.raises(ValueError, match="at least 128 clips"):
        frechet_limit(np.zeros((100, 64)), np.zeros((100, 64)))
