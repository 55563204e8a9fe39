"""Solvers of x' = v(x, t) from noise (t = 1) to data (t = 0), and of the stochastic equation with the same marginals.

A solver is a function of one step. It carries its own `history` of the last step (multistep methods), and passes on
`guidance_state`, which only the velocity field reads and writes (the momentum of projected guidance).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paris_jax.diffusion import path

# Field(x, t, step, guidance_state) -> (v, guidance_state, trace): `t` a scalar, `step` its index, `trace` any record.
Field = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Interval:
    """One step between two timesteps, all scalars: its index, its start and end, and the start of the step before."""

    index: jax.Array
    t: jax.Array
    t_next: jax.Array
    t_before: jax.Array


Noise = Callable[[jax.Array], jax.Array]  # fresh standard normal noise like x, for the index of a step
# Step(velocity_of, x, interval, history, guidance_state, noise) -> (x, history, guidance_state), where `velocity_of` is
# the field without its trace.
VelocityField = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Step = Callable[[VelocityField, jax.Array, Interval, jax.Array, Any, Noise], tuple[jax.Array, jax.Array, Any]]


def euler(
    velocity_of: VelocityField, x: jax.Array, at: Interval, history: jax.Array, guidance_state: Any, noise: Noise
):
    """First order: x <- x + (t_next - t) v(x, t)."""
    v, guidance_state = velocity_of(x, at.t, at.index, guidance_state)
    return x + (at.t_next - at.t) * v, history, guidance_state


def heun(velocity_of: VelocityField, x: jax.Array, at: Interval, history: jax.Array, guidance_state: Any, noise: Noise):
    """Second order (explicit trapezoid): two evaluations of the guided velocity. The last step is Euler's.

    At t = 0 the velocity of concentrated data is undefined: half of it would leave noise of t / 2 in the samples
    (Karras et al. 2022, arXiv 2206.00364, algorithm 1). The second evaluation of that step is discarded.

    The second evaluation does not change the guidance state, which every solver updates once per step.
    """
    h, is_last = at.t_next - at.t, at.t_next == 0
    first, guidance_state = velocity_of(x, at.t, at.index, guidance_state)
    second, _ = velocity_of(
        jnp.where(is_last, x, x + h * first), jnp.where(is_last, at.t, at.t_next), at.index, guidance_state
    )
    return x + h * jnp.where(is_last, first, 0.5 * (first + second)), history, guidance_state


def adams_bashforth(
    velocity_of: VelocityField, x: jax.Array, at: Interval, history: jax.Array, guidance_state: Any, noise: Noise
):
    """Second order with one evaluation: extrapolates linearly from the last two velocities; steps of any size.

    x <- x + h ((1 + r/2) v_n - (r/2) v_{n-1}),  r = h_n / h_{n-1}; the first step is Euler's.
    """
    v, guidance_state = velocity_of(x, at.t, at.index, guidance_state)
    h, h_before = at.t_next - at.t, at.t - at.t_before
    half = jnp.where(at.index > 0, 0.5 * h / jnp.where(at.index > 0, h_before, 1.0), 0.0)
    return x + h * ((1 + half) * v - half * history), v, guidance_state


def dpm_solver(
    velocity_of: VelocityField, x: jax.Array, at: Interval, history: jax.Array, guidance_state: Any, noise: Noise
):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) on the linear path.

    Second order in l = log((1 - t) / t) for the predicted data D = x - t v, with one evaluation:
    x <- (t_next / t) x + (1 - t_next / t) (D_n + h_n / (2 h_{n-1}) (D_n - D_{n-1})),  h the steps of l.
    The first two steps and the last are of first order, as their steps of l are infinite.
    """
    v, guidance_state = velocity_of(x, at.t, at.index, guidance_state)
    data, ratio = path.data_from_velocity(x, v, at.t), at.t_next / at.t
    h, h_before = _log_snr(at.t_next) - _log_snr(at.t), _log_snr(at.t) - _log_snr(at.t_before)
    inner = (at.index > 0) & (at.t_next > 0)
    half = jnp.where(inner, 0.5 * jnp.where(inner, h, 1.0) / jnp.where(inner, h_before, 1.0), 0.0)
    return ratio * x + (1 - ratio) * (data + half * (data - history)), data, guidance_state


def _log_snr(t: jax.Array) -> jax.Array:
    return jnp.log1p(-t) - jnp.log(t)


def ancestral(
    velocity_of: VelocityField, x: jax.Array, at: Interval, history: jax.Array, guidance_state: Any, noise: Noise
):
    """The stochastic sampler with the flow's marginals: part of the noise is replaced by fresh noise at every step.

    x <- (1 - t') D + t' (r e + sqrt(1 - r^2) z),  r = (1 - t) t' / ((1 - t') t)
    with the predicted data D and noise e: a draw from the posterior of x_t' given x_t and D (DDIM with eta = 1, Song et
    al. 2020, arXiv 2010.02502, equation 16), written for the linear path.
    """
    v, guidance_state = velocity_of(x, at.t, at.index, guidance_state)
    data, e, t_next = path.data_from_velocity(x, v, at.t), x + (1 - at.t) * v, at.t_next
    remaining = (1 - at.t) * t_next / ((1 - t_next) * at.t)
    fresh = jnp.sqrt(jnp.maximum(1 - remaining**2, 0.0))
    return (1 - t_next) * data + t_next * (remaining * e + fresh * noise(at.index)), history, guidance_state


SOLVERS: dict[str, Step] = {
    "euler": euler,
    "heun": heun,
    "ab2": adams_bashforth,
    "dpm++2m": dpm_solver,
    "ancestral": ancestral,
}
EVALUATIONS = {"euler": 1, "heun": 2, "ab2": 1, "dpm++2m": 1, "ancestral": 1}  # per step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of a solver between two steps.

    Attributes:
      x: (B, ...) noised samples.
      history: array that a multistep method keeps from the last step, with the shape of x.
      guidance_state: carried by the velocity field, any pytree.
      data: x_0 as predicted at the last step, with the shape of x; zeros before the first.
      traces: traces of the field at every step and evaluation, stacked on two leading axes (S, EVALUATIONS); zeros for
        later steps.
    """

    x: jax.Array
    history: jax.Array
    guidance_state: Any
    data: jax.Array
    traces: Any


def begin(x: jax.Array, guidance_state: Any, traces: Any) -> State:
    """The state before the first step."""
    return State(x, jnp.zeros_like(x), guidance_state, jnp.zeros_like(x), traces)


def integrate(
    field: Field,
    state: State,
    timesteps: jax.Array,
    first: jax.Array | int,
    last: jax.Array | int,
    solver: str,
    noise: Noise,
) -> State:
    """Takes steps `first` to `last` - 1 of `timesteps` (S + 1 values from 1 to 0), in one loop."""
    step_of = SOLVERS[solver]

    def step(index: jax.Array, state: State) -> State:
        predicted, traces_of_step = [], []

        def velocity_of(x: jax.Array, t: jax.Array, step: jax.Array, guidance_state: Any) -> tuple[jax.Array, Any]:
            v, guidance_state, trace = field(x, t, step, guidance_state)
            predicted.append(path.data_from_velocity(x, v, t))
            traces_of_step.append(trace)
            return v, guidance_state

        at = Interval(index, timesteps[index], timesteps[index + 1], timesteps[jnp.maximum(index - 1, 0)])
        x, history, guidance_state = step_of(velocity_of, state.x, at, state.history, state.guidance_state, noise)
        traces = jax.tree.map(
            lambda all_steps, *each: all_steps.at[index].set(jnp.stack(each)), state.traces, *traces_of_step
        )
        return State(x, history, guidance_state, predicted[0], traces)

    return jax.lax.fori_loop(first, last, step, state)
