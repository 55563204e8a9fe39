"""The linear path between data and noise, and what it says about the network's target.

    x_t = (1 - t) x_0 + t e        v = dx_t/dt = e - x_0        t = 0 data, t = 1 noise

Rectified flow (Liu et al. 2022), flow matching (Lipman et al. 2022); the convention of FLUX.1 and Open-Sora 2.0.
Arrays are (B, ...) with one time per sample, (B,).
"""

import jax


def per_sample(t_B: jax.Array, like: jax.Array) -> jax.Array:
    """(B,) as (B, 1, ...), to stand beside `like`."""
    return t_B.reshape(t_B.shape + (1,) * (like.ndim - t_B.ndim))


def interpolate(x_0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """The point x_t of the path at time t in [0, 1]."""
    t = per_sample(t_B, x_0)
    return (1 - t) * x_0 + t * noise


def velocity(x_0: jax.Array, noise: jax.Array) -> jax.Array:
    """The slope of the path, v = e - x_0: what a network regresses on."""
    return noise - x_0


def data_from_velocity(x_t: jax.Array, v: jax.Array, t_B: jax.Array) -> jax.Array:
    """The clean sample a velocity points at, x_0 = x_t - t v; one time, (), may serve all samples."""
    return x_t - per_sample(t_B, x_t) * v
