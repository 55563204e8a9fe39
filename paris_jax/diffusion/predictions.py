"""Prediction types of a network, and their conversion to the velocity of the linear path.

A noise-predicting network (DDPM; Ho et al. 2020, Nichol and Dhariwal 2021) is trained on the cosine path

    x_s = cos(pi s / 2) x_0 + sin(pi s / 2) e        e^(x_s, s)        s in [0, 1], s = 0 data, s = 1 noise

A point of the linear path divided by sqrt((1 - t)^2 + t^2) is the point of the cosine path with the same
signal-to-noise ratio: tan(pi s / 2) = t / (1 - t). The network predicts the noise at that point, and the prediction is
converted to a velocity before the merge (Heterogeneous experts, arXiv 2603.06741):

    x_0^ = clip((x_s - sin e^) / max(cos, 0.01), -20, 20)        v = e^ - x_0^

A data-predicting network (x_0^(x_t, t), on the linear path) has the velocity

    v = (x_t - x_0^) / max(t, 0.05)

The velocity contains the noise, which has full rank; the data need not: a network that predicts them may be narrower
than its tokens (Back to basics, arXiv 2511.13720, which bounds t by 0.05 as well).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from paris_jax.diffusion import path

# Prediction type -> its description in the manifest of an exported network.
PREDICTIONS = {
    "velocity": "velocity v = e - x_0",
    "noise": "noise e at x_s = cos(pi s / 2) x_0 + sin(pi s / 2) e",
    "x0": "clean sample x_0",
}
SMALLEST_SHARE = 0.01  # lower bound of the data coefficient, by which a prediction is divided
SMALLEST_TIME = 0.05  # lower bound of the timestep by which the noise in x_t is divided
LARGEST_DATA = 20.0  # clipping bound of the predicted data, in standard deviations of the data
Predictor = Callable[[jax.Array, jax.Array], jax.Array]  # (x (B, ...), t (B,)) -> prediction (B, ...)


def cosine(x_0: jax.Array, noise: jax.Array, s_B: jax.Array) -> jax.Array:
    """The noised sample x_s of the cosine path at timestep s in [0, 1]."""
    angle = path.per_sample(s_B, x_0) * (jnp.pi / 2)
    return jnp.cos(angle) * x_0 + jnp.sin(angle) * noise


def velocity_from_noise(network: Predictor, x_t: jax.Array, t_B: jax.Array) -> jax.Array:
    """The velocity of the linear path at (x_t, t) from a network that predicts noise on the cosine path."""
    norm = jnp.sqrt(jnp.square(1 - t_B) + jnp.square(t_B))
    data_coefficient, angle = (1 - t_B) / norm, jnp.arctan2(t_B, 1 - t_B)
    x_s = x_t / path.per_sample(norm, x_t)
    noise = network(x_s, angle * (2 / jnp.pi))
    data = x_s - path.per_sample(t_B / norm, x_t) * noise
    data = data / path.per_sample(jnp.maximum(data_coefficient, SMALLEST_SHARE), x_t)
    return noise - jnp.clip(data, -LARGEST_DATA, LARGEST_DATA)


def velocity_from_data(network: Predictor, x_t: jax.Array, t_B: jax.Array) -> jax.Array:
    """The velocity of the linear path at (x_t, t) from a network that predicts the clean sample."""
    return (x_t - network(x_t, t_B)) / path.per_sample(jnp.maximum(t_B, SMALLEST_TIME), x_t)


def velocity(prediction_type: str, network: Predictor, x_t: jax.Array, t_B: jax.Array) -> jax.Array:
    """The velocity at (x_t, t) from a network with a prediction type of `PREDICTIONS`."""
    convert = {"noise": velocity_from_noise, "x0": velocity_from_data}.get(prediction_type)
    return convert(network, x_t, t_B) if convert else network(x_t, t_B)
