"""Held-out losses are the known ones for known velocities, on points that depend on (seed, clip id) alone."""

import numpy as np
import pytest

from paris_jax.evaluation.metrics import flow_loss
from paris_jax.evaluation.metrics.flow_loss import Points, by_cluster, by_time, heldout_losses

SHAPE = (2, 4, 4, 3)


def points(n: int = 10, bins: int = 4, seed: int = 0) -> Points:
    latents = np.random.default_rng(1).standard_normal((n, *SHAPE)).astype(np.float32)
    return Points.draw(latents, [f"clip-{i}" for i in range(n)], bins, seed)


def test_times_are_one_in_each_bin():
    times = points(50, 5).times
    assert times.shape == (50, 5)
    assert (np.floor(times * 5).astype(int) == np.arange(5)).all()


def test_points_do_not_depend_on_the_other_clips():
    all_of_them = points()
    alone = Points.draw(all_of_them.latents[7:8], ["clip-7"], 4, 0)
    np.testing.assert_array_equal(alone.times[0], all_of_them.times[7])
    np.testing.assert_array_equal(alone.noise(0, 2), all_of_them.noise(7, 2))
    assert (alone.noise(0, 2) != alone.noise(0, 1)).all()
    assert (points(seed=1).noise(7, 2) != all_of_them.noise(7, 2)).all()


def test_points_lie_on_the_path_and_the_truth_has_no_loss():
    given = points()

    def truth(x, t, index):  # v = e - x_0 = (x_t - x_0) / t
        return (x - given.latents[index]) / t.reshape(-1, 1, 1, 1, 1)

    made = heldout_losses(truth, given, batch=4)
    np.testing.assert_allclose(made.loss, 0, atol=1e-6)


def test_zero_velocity_has_the_loss_of_the_target_and_an_error_of_one():
    given = points()
    made = heldout_losses(lambda x, t, index: np.zeros_like(x), given, batch=4)
    expected = np.mean((given.noise(3, 1) - given.latents[3]) ** 2)
    assert made.loss[3, 1] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(made.error, 1)


@pytest.mark.parametrize("batch", [1, 3, 10, 64])
def test_the_batch_does_not_change_the_result(batch):
    given = points()

    def velocity(x, t, index):
        return x * t.reshape(-1, 1, 1, 1, 1)

    np.testing.assert_allclose(
        heldout_losses(velocity, given, batch).loss, heldout_losses(velocity, given, 5).loss, rtol=1e-6
    )


def test_every_batch_has_one_size_and_is_counted():
    given, sizes = points(), []
    heldout_losses(lambda x, t, index: sizes.append(len(x)) or x, given, batch=4)
    assert set(sizes) == {4}
    assert len(sizes) == flow_loss.num_batches(given, 4)


def test_a_velocity_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        heldout_losses(lambda x, t, index: x * np.nan, points())


def test_by_time_and_by_cluster():
    values = np.array([[1.0, 3.0], [3.0, 5.0], [10.0, 20.0]])
    assert [e["value"] for e in by_time(values)] == pytest.approx([14 / 3, 28 / 3])
    first, second, empty = by_cluster(values, np.array([0, 0, 1]), 3)
    assert first is not None
    assert second is not None
    assert (first["value"], first["n"], second["value"], empty) == (3.0, 2, 15.0, None)


def test_expert_use_is_the_mean_over_clips():
    routing = np.zeros((3, 4, 2))
    routing[:, :3, 0] = 1
    routing[:, 3:, 1] = 1
    np.testing.assert_allclose(flow_loss.expert_use(routing), [[0.75, 0.25]] * 3)
