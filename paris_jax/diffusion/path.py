"""The linear path between data and noise, and the velocity a network is trained to predict.

    x_t = (1 - t) x_0 + t e        v = dx_t/dt = e - x_0        t = 0 data, t = 1 noise

Rectified flow (Liu et al. 2022), flow matching (Lipman et al. 2022); the convention of FLUX.1 and Open-Sora 2.0.
Arrays are (B, ...) with one timestep per sample, (B,).
"""

import jax


def per_sample(t_B: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes (B,) to (B, 1, ...), to broadcast against `like` (B, ...)."""
    return t_B.reshape(t_B.shape + (1,) * (like.ndim - t_B.ndim))


def interpolate(x_0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """The noised sample x_t at timestep t in [0, 1]."""
    t = per_sample(t_B, x_0)
    return (1 - t) * x_0 + t * noise


def velocity(x_0: jax.Array, noise: jax.Array) -> jax.Array:
    """The velocity of the path, v = e - x_0: the regression target."""
    return noise - x_0


def data_from_velocity(x_t: jax.Array, v: jax.Array, t_B: jax.Array) -> jax.Array:
    """The clean sample predicted by a velocity, x_0 = x_t - t v; `t_B` may be a scalar for all samples."""
    return x_t - per_sample(t_B, x_t) * v
