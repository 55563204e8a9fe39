"""The kernel distance is the published estimator, and has no bias at any number of clips."""

import numpy as np
import pytest

from paris_jax.evaluation.metrics.kernel_distance import (
    KernelBlocks,
    kernel_distance,
)


def test_equals_the_sums_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((4, 3)) + 1

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    within_x = np.mean([kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    within_y = np.mean([kernel(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y) == pytest.approx(within_x + within_y - 2 * between, rel=1e-12)


@pytest.mark.parametrize("n", [4, 64])
def test_has_no_bias_at_any_number_of_clips(n):
    rng = np.random.default_rng(n)
    found = [kernel_distance(*rng.standard_normal((2, n, 6))) for _ in range(1500)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


def test_equals_the_distance_of_the_distributions():
    """For x = a and y = b always, the distance is k(a, a) + k(b, b) - 2 k(a, b)."""
    x, y = np.full((3, 2), 1.0), np.full((3, 2), -1.0)
    assert kernel_distance(x, y) == pytest.approx(8 + 8 - 0)


def test_wrong_features_are_refused():
    x = np.ones((10, 4))
    with pytest.raises(ValueError, match="must be"):
        kernel_distance(x, np.ones((10, 5)))
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(x, x * np.inf)


def test_blocks_accumulate_the_mean_of_their_distances():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((6, 16, 5)), rng.standard_normal((6, 16, 5)) + 0.3
    blocks = KernelBlocks()
    for first, second in zip(x, y, strict=True):
        blocks = blocks.update(first, second)
    each = np.array([kernel_distance(first, second) for first, second in zip(x, y, strict=True)])
    found = blocks.estimate()
    assert found["value"] == pytest.approx(each.mean(), rel=1e-12) and found["n"] == 6
    assert found["stderr"] == pytest.approx(each.std(ddof=1) / np.sqrt(6), rel=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        KernelBlocks().update(x[0], y[0]).estimate()
