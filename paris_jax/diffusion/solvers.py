"""ODE solvers for x' = v(x, t), from noise (t = 1) to data (t = 0), as pure steps to scan over a time grid."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Velocity(x, t, step) -> (v, trace): `t` a scalar, `step` its index, `trace` anything to record (routing weights).
Velocity = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def euler(velocity: Velocity, x: jax.Array, t: jax.Array, t_next: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
    """First order: x <- x + (t_next - t) v(x, t). One evaluation a step."""
    v, trace = velocity(x, t, step)
    return x + (t_next - t) * v, trace


def heun(velocity: Velocity, x: jax.Array, t: jax.Array, t_next: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
    """Second order (explicit trapezoid): both slopes evaluated afresh, guidance included. Two evaluations a step."""
    first, trace = velocity(x, t, step)
    second, _ = velocity(x + (t_next - t) * first, t_next, step)
    return x + (t_next - t) * 0.5 * (first + second), trace


SOLVERS = {"euler": euler, "heun": heun}
EVALUATIONS = {"euler": 1, "heun": 2}


def solve(velocity: Velocity, x: jax.Array, times: jax.Array, solver: str) -> tuple[jax.Array, Any]:
    """Walks x along `times` (S + 1 points) in one `lax.scan`.

    Returns:
      The final x, and the traces of the S steps, stacked on a leading axis.
    """
    step_fn = SOLVERS[solver]

    def body(x: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        return step_fn(velocity, x, times[step], times[step + 1], step)

    return jax.lax.scan(body, x, jnp.arange(times.shape[0] - 1))
