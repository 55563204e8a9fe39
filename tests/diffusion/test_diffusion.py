"""The mathematics: the path, the times, the objectives, guidance, and the order of the solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.diffusion import guidance, objectives, path, randomness, solvers, times


def gaussian_velocity(x, t, mean, std):
    """Exact velocity of the flow to N(mean, std^2), and it is linear in x."""
    variance = (1 - t) ** 2 * std**2 + t**2
    return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)


def test_the_path_starts_at_data_ends_at_noise_and_its_slope_is_the_velocity():
    x_0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    for t, end in ((0.0, x_0), (1.0, noise)):
        np.testing.assert_array_equal(path.interpolate(x_0, noise, jnp.full(3, t)), end)
    slope = jax.jvp(lambda t: path.interpolate(x_0, noise, t), (jnp.full(3, 0.3),), (jnp.ones(3),))[1]
    np.testing.assert_allclose(slope, path.velocity(x_0, noise), rtol=1e-6)
    t = jnp.array([0.2, 0.5, 0.9])
    recovered = path.data_from_velocity(path.interpolate(x_0, noise, t), path.velocity(x_0, noise), t)
    np.testing.assert_allclose(recovered, x_0, atol=1e-6)


def test_each_sample_has_its_own_time():
    x_0, noise = jnp.zeros((2, 3)), jnp.ones((2, 3))
    np.testing.assert_allclose(path.interpolate(x_0, noise, jnp.array([0.25, 0.75])), [[0.25] * 3, [0.75] * 3])


def test_shift_keeps_the_ends_and_is_the_signal_to_noise_rule():
    t = jnp.linspace(0, 1, 11)
    moved = times.shift(t, 3.0)
    assert moved[0] == 0 and moved[-1] == 1 and bool((moved[1:-1] > t[1:-1]).all())
    # Odds of noise against data are multiplied by the factor (Esser et al. 2024).
    np.testing.assert_allclose(moved[1:-1] / (1 - moved[1:-1]), 3 * t[1:-1] / (1 - t[1:-1]), rtol=1e-5)
    np.testing.assert_allclose(times.shift(t, 1.0), t)


def test_open_sora_shift_at_its_published_ends():
    assert times.open_sora_shift(256, 1) == 1.0
    assert times.open_sora_shift(4096, 1) == 3.0
    assert times.open_sora_shift(256, 9) == 3.0
    assert times.open_sora_shift(25, 4) == 2.0


def test_the_grid_goes_from_noise_to_data():
    grid = times.grid(10, 2.0)
    assert grid.shape == (11,) and grid[0] == 1 and grid[-1] == 0 and bool((jnp.diff(grid) < 0).all())


def test_logit_normal_times_have_the_stated_law():
    drawn = times.logit_normal(jax.random.normal(jax.random.key(1), (200_000,)), 0.5, 0.8, 1.0)
    logits = jnp.log(drawn / (1 - drawn))
    assert abs(float(logits.mean()) - 0.5) < 0.01 and abs(float(logits.std()) - 0.8) < 0.01


def test_draws_belong_to_a_sample_whatever_stands_beside_it():
    alone = randomness.normal(randomness.sample_keys(7, 3, jnp.array([5])), (4, 2))
    among = randomness.normal(randomness.sample_keys(7, 3, jnp.array([9, 5, 0])), (4, 2))
    np.testing.assert_array_equal(alone[0], among[1])
    others = [randomness.normal(randomness.sample_keys(s, n, jnp.array([5])), (4, 2)) for s, n in ((8, 3), (7, 4))]
    assert all(bool((o[0] != alone[0]).all()) for o in others)


def test_flow_matching_loss_of_the_exact_velocity_is_the_posterior_variance():
    """For Gaussian data the least loss is known: Var[e - x_0 | x_t] = s^2 / ((1 - t)^2 s^2 + t^2)."""
    n, std, t = 400_000, 0.5, 0.6
    keys = jax.random.split(jax.random.key(2))
    x_0, noise = std * jax.random.normal(keys[0], (n, 1)), jax.random.normal(keys[1], (n, 1))
    losses = objectives.flow_matching(
        lambda x, t_B: gaussian_velocity(x, t_B[:, None], 0.0, std), x_0, noise, jnp.full(n, t)
    )
    assert losses.shape == (n,)
    np.testing.assert_allclose(losses.mean(), std**2 / ((1 - t) ** 2 * std**2 + t**2), rtol=0.01)


def test_a_loss_does_not_see_its_neighbours():
    x_0, noise = jax.random.normal(jax.random.key(3), (2, 4, 6))
    field = lambda x, t: jnp.sin(x) * t[:, None]  # noqa: E731
    t = jnp.array([0.1, 0.4, 0.6, 0.9])
    together = objectives.flow_matching(field, x_0, noise, t)
    alone = objectives.flow_matching(field, x_0[2:3], noise[2:3], t[2:3])
    np.testing.assert_array_equal(together[2], alone[0])


def test_cross_entropy_of_known_logits():
    np.testing.assert_allclose(
        objectives.cross_entropy(jnp.log(jnp.array([[0.2, 0.3, 0.5]])), jnp.array([1])), [-np.log(0.3)], rtol=1e-6
    )


def test_time_bins_hold_every_sample_once():
    sums, counts = objectives.by_time_bin(jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([0.0, 0.49, 0.5, 1.0]), 2)
    np.testing.assert_allclose(sums, [3, 12])
    np.testing.assert_allclose(counts, [2, 2])


@pytest.mark.parametrize("scale, expected", [(0.0, 5.0), (1.0, 2.0), (3.0, -4.0)])
def test_guidance_extrapolates_from_the_unconditional(scale, expected):
    assert guidance.classifier_free(jnp.array(2.0), jnp.array(5.0), scale) == expected


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("scale", [1.0, 4.0], ids=["without guidance", "with guidance"])
def test_solvers_converge_at_their_order(solver, order, scale):
    """Errors against a reference 64 times finer fall by 2^order when the steps double."""
    with jax.enable_x64(True):
        x = jnp.linspace(-2.0, 2.0, 9)

        def velocity(x, t, step):
            conditional, unconditional = gaussian_velocity(x, t, 1.5, 0.4), gaussian_velocity(x, t, 0.2, 0.9)
            return guidance.classifier_free(conditional, unconditional, scale), None

        def end(steps):
            grid = jnp.linspace(1.0, 0.0, steps + 1)
            return solvers.solve(velocity, x, grid, solver)[0]

        reference = solvers.solve(velocity, x, jnp.linspace(1.0, 0.0, 8193), "heun")[0]
        errors = [float(jnp.abs(end(steps) - reference).max()) for steps in (32, 64, 128)]
        rates = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert np.all(np.abs(rates - order) < 0.25), (errors, rates)


def test_the_unguided_flow_ends_at_the_exact_solution():
    with jax.enable_x64(True):
        z = jnp.linspace(-2.0, 2.0, 9)
        end = solvers.solve(
            lambda x, t, step: (gaussian_velocity(x, t, 1.5, 0.4), None), z, jnp.linspace(1.0, 0.0, 1025), "heun"
        )[0]
        np.testing.assert_allclose(end, 1.5 + 0.4 * z, atol=1e-5)


def test_heun_evaluates_guidance_afresh_at_both_ends():
    calls = []

    def velocity(x, t, step):
        calls.append(t)
        return x, t

    solvers.heun(velocity, jnp.array(1.0), jnp.array(1.0), jnp.array(0.5), jnp.array(0))
    assert [float(t) for t in calls] == [1.0, 0.5]
