"""A network that predicts noise on the cosine path is the velocity of the linear path, at the same ratio of noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.diffusion import path, predictions
from paris_jax.diffusion.losses import LARGEST_WEIGHT, data_prediction, flow_matching, noise_prediction

MEAN, STD = 0.4, 0.7


def exact_noise(x, s_B):
    """E[e | x_s] for data N(MEAN, STD^2)."""
    angle = path.per_sample(s_B, x) * jnp.pi / 2
    data, noise = jnp.cos(angle), jnp.sin(angle)
    return noise * (x - data * MEAN) / (data**2 * STD**2 + noise**2)


def exact_velocity(x, t_B):
    t = path.per_sample(t_B, x)
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def test_the_exact_noise_becomes_the_exact_velocity():
    """To the share of 0.01 of data; in heavier noise the division is cut off."""
    t = jnp.linspace(0.0, 0.989, 50)
    x = 1.5 * jax.random.normal(jax.random.key(0), (50, 2, 3))
    v = predictions.velocity("noise", exact_noise, x, t)
    np.testing.assert_allclose(v, exact_velocity(x, t), atol=5e-5)
    assert predictions.velocity("velocity", exact_velocity, x, t) is not v
    np.testing.assert_array_equal(predictions.velocity("velocity", exact_velocity, x, t), exact_velocity(x, t))


def test_points_of_both_paths_with_the_same_ratio_are_the_same_point():
    x_0, noise = jax.random.normal(jax.random.key(1), (2, 9, 4))
    t = jnp.linspace(0, 1, 9)
    asked = {}

    def spy(x, s):
        asked.update(x=x, s=s)
        return x

    predictions.velocity("noise", spy, path.interpolate(x_0, noise, t), t)
    np.testing.assert_allclose(asked["x"], predictions.cosine(x_0, noise, asked["s"]), atol=1e-6)
    np.testing.assert_allclose(asked["s"][jnp.array([0, 4, 8])], [0.0, 0.5, 1.0], atol=1e-6)
    assert bool((jnp.diff(asked["s"]) > 0).all())


@pytest.mark.parametrize("t, data", [(0.9, 0.2), (0.98, 1.0), (0.99, 2.0), (0.995, 2.0), (1.0, 2.0)])
def test_in_the_heaviest_noise_data_are_divided_by_a_hundredth(t, data):
    """A network that finds no noise in 0.02: the data are what is left over their share, or over 0.01."""
    x_t = jnp.full((1, 4), 0.02)
    v = predictions.velocity("noise", lambda x, s: jnp.zeros_like(x), x_t, jnp.array([t]))
    np.testing.assert_allclose(-v, jnp.full((1, 4), data), rtol=0.02)  # but for the norm of the point


@pytest.mark.parametrize("t", [0.0, 0.5, 0.99, 0.9999, 1.0])
def test_a_wrong_prediction_stays_bounded(t):
    x = jax.random.normal(jax.random.key(2), (3, 4))
    v = predictions.velocity("noise", lambda x, s: 100 * x, x, jnp.full(3, t))
    assert bool(jnp.isfinite(v).all())
    norm = np.sqrt(t**2 + (1 - t) ** 2)
    assert float(jnp.abs(v - 100 * x / norm).max()) <= predictions.LARGEST_DATA + 1e-3


def test_ddpms_loss_of_the_exact_noise_is_the_posterior_variance():
    """Var[e | x_s] = cos^2 S^2 / (cos^2 S^2 + sin^2) for data of spread S."""
    n, s = 400_000, 0.55
    keys = jax.random.split(jax.random.key(3))
    x_0, noise = MEAN + STD * jax.random.normal(keys[0], (n, 1)), jax.random.normal(keys[1], (n, 1))
    losses = noise_prediction(exact_noise, x_0, noise, jnp.full(n, s))
    data, rest = np.cos(s * np.pi / 2) ** 2 * STD**2, np.sin(s * np.pi / 2) ** 2
    assert losses.shape == (n,)
    np.testing.assert_allclose(losses.mean(), data / (data + rest), rtol=0.01)


def exact_data(x, t_B):
    """E[x_0 | x_t]."""
    return path.data_from_velocity(x, exact_velocity(x, t_B), t_B)


def test_the_exact_data_become_the_exact_velocity():
    t = jnp.linspace(predictions.SMALLEST_TIME, 1.0, 50)
    x = 1.5 * jax.random.normal(jax.random.key(0), (50, 2, 3))
    v = predictions.velocity("x0", exact_data, x, t)
    np.testing.assert_allclose(v, exact_velocity(x, t), atol=2e-5)
    # The velocity points at the predicted data, and below the bound a part of the way.
    for time, share in ((0.5, 1.0), (0.05, 1.0), (0.01, 0.2), (0.0, 0.0)):
        v = predictions.velocity("x0", lambda x, t: jnp.zeros_like(x), x[:1], jnp.array([time]))
        np.testing.assert_allclose(path.data_from_velocity(x[:1], v, jnp.array([time])), (1 - share) * x[:1], atol=1e-6)


def test_the_loss_of_data_is_that_of_the_velocity_up_to_a_bounded_weight():
    x_0, noise = jax.random.normal(jax.random.key(4), (2, 5, 2, 3))
    t = jnp.array([1.0, 0.6, 0.25, 0.1, 0.0])
    network = lambda x, t: jnp.tanh(x) + path.per_sample(t, x)  # noqa: E731
    given = data_prediction(network, x_0, noise, t)
    by_velocity = flow_matching(lambda x, t: predictions.velocity("x0", network, x, t), x_0, noise, t)
    np.testing.assert_allclose(given[:3], by_velocity[:3], rtol=1e-4)
    error = np.square(np.asarray(network(path.interpolate(x_0, noise, t), t) - x_0)).mean((1, 2))
    np.testing.assert_allclose(given[3:], LARGEST_WEIGHT * error[3:], rtol=1e-5)
