"""Distances of any features have errors that match repeated draws, differences that are paired, and frames of clips."""

import numpy as np
import pytest

from paris_jax.evaluation import distances
from paris_jax.evaluation.metrics.frechet import frechet_distance, frechet_limit
from paris_jax.evaluation.metrics.kernel_distance import kernel_distance

OF = {"frechet": frechet_distance, "limit": frechet_limit, "kernel": kernel_distance}


@pytest.mark.parametrize("kind", OF)
def test_standard_errors_match_the_spread_over_repeated_draws(kind):
    rng = np.random.default_rng(1)

    def draw():
        return rng.standard_normal((128, 8)), rng.standard_normal((128, 8)) + 0.4

    repeats = [OF[kind](*draw()) for _ in range(200)]
    found = [distances.estimate(kind, *draw())["stderr"] for _ in range(30)]
    assert np.mean(found) == pytest.approx(np.std(repeats), rel=0.3)


@pytest.mark.parametrize("kind", OF)
def test_the_difference_of_two_models_is_paired(kind):
    rng = np.random.default_rng(2)
    real, first = rng.standard_normal((96, 8)), rng.standard_normal((96, 8)) + 0.4
    second = first + 0.1
    found = distances.difference(kind, first, second, real)
    assert found["value"] == pytest.approx(OF[kind](first, real) - OF[kind](second, real))
    assert found["stderr"] < distances.estimate(kind, first, real)["stderr"]


def test_frames_are_one_set_for_a_frechet_distance_and_never_a_pair_for_a_kernel_distance():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((20, 3, 4)), rng.standard_normal((20, 3, 4)) + 0.2
    assert distances.estimate("frechet", a, b)["value"] == pytest.approx(
        frechet_distance(a.reshape(60, 4), b.reshape(60, 4))
    )
    by_frame = np.mean([kernel_distance(a[:, t], b[:, t]) for t in range(3)])
    assert distances.estimate("kernel", a, b)["value"] == pytest.approx(by_frame)
    assert distances.estimate("kernel", a, b)["n"] == 20  # clips, not frames


def test_distances_that_need_more_clips_are_left_out_with_the_reason():
    rng = np.random.default_rng(4)
    assert distances.distances(rng.standard_normal((15, 4)), rng.standard_normal((15, 4))) == (
        {}, ["Distances are left out: they need 16 clips, there are 15."]
    )  # fmt: skip
    found, left_out = distances.distances(rng.standard_normal((20, 12)), rng.standard_normal((20, 12)))
    assert found.keys() == {"frechet", "kernel"} and "12 features need 24 clips, there are 20" in left_out[0]


def test_sets_of_unequal_size_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        distances.estimate("kernel", np.ones((5, 2)), np.ones((4, 2)))
