"""From noise (t = 1) to data (t = 0): solvers of x' = v(x, t), and one of the stochastic equation with the same law.

A solver is a function of one step, to walk a grid of times with. What it must remember of the step before is its
`past`; what the field must remember (the momentum of guidance) is its `memory`. Neither is looked at by the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paris_jax.diffusion import path

# Field(x, t, step, memory) -> (v, memory, trace): `t` a scalar, `step` its index, `trace` anything to record.
Field = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Interval:
    """One step of a grid, all scalars: its number, where it begins and ends, and where the one before began."""

    index: jax.Array
    t: jax.Array
    t_next: jax.Array
    t_before: jax.Array


Noise = Callable[[jax.Array], jax.Array]  # fresh standard normal noise like x, by the step's number
# Step(look, x, interval, past, memory, noise) -> (x, past, memory); `look` is the field without its trace.
Look = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
Step = Callable[[Look, jax.Array, Interval, jax.Array, Any, Noise], tuple[jax.Array, jax.Array, Any]]


def euler(look: Look, x: jax.Array, at: Interval, past: jax.Array, memory: Any, noise: Noise):
    """First order: x <- x + (t_next - t) v(x, t)."""
    v, memory = look(x, at.t, at.index, memory)
    return x + (at.t_next - at.t) * v, past, memory


def heun(look: Look, x: jax.Array, at: Interval, past: jax.Array, memory: Any, noise: Noise):
    """Second order (explicit trapezoid): both slopes are evaluated afresh, guidance included.

    The memory is that of the first: it moves once a step, as with every solver.
    """
    first, memory = look(x, at.t, at.index, memory)
    second, _ = look(x + (at.t_next - at.t) * first, at.t_next, at.index, memory)
    return x + (at.t_next - at.t) * 0.5 * (first + second), past, memory


def adams_bashforth(look: Look, x: jax.Array, at: Interval, past: jax.Array, memory: Any, noise: Noise):
    """Second order from one evaluation: the line through this slope and the last one, on a grid of any spacing.

    x <- x + h ((1 + r/2) v_n - (r/2) v_{n-1}),  r = h_n / h_{n-1}; the first step is Euler's.
    """
    v, memory = look(x, at.t, at.index, memory)
    h, h_before = at.t_next - at.t, at.t - at.t_before
    half = jnp.where(at.index > 0, 0.5 * h / jnp.where(at.index > 0, h_before, 1.0), 0.0)
    return x + h * ((1 + half) * v - half * past), v, memory


def dpm_solver(look: Look, x: jax.Array, at: Interval, past: jax.Array, memory: Any, noise: Noise):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) on the linear path.

    Second order in l = log((1 - t) / t) for the predicted data D = x - t v, from one evaluation:
    x <- (t_next / t) x + (1 - t_next / t) (D_n + h_n / (2 h_{n-1}) (D_n - D_{n-1})),  h the steps of l.
    The first two steps and the last, where a step of l is infinite, are of first order.
    """
    v, memory = look(x, at.t, at.index, memory)
    data, ratio = path.data_from_velocity(x, v, at.t), at.t_next / at.t
    h, h_before = _log_snr(at.t_next) - _log_snr(at.t), _log_snr(at.t) - _log_snr(at.t_before)
    inner = (at.index > 0) & (at.t_next > 0)
    half = jnp.where(inner, 0.5 * jnp.where(inner, h, 1.0) / jnp.where(inner, h_before, 1.0), 0.0)
    return ratio * x + (1 - ratio) * (data + half * (data - past)), data, memory


def _log_snr(t: jax.Array) -> jax.Array:
    return jnp.log1p(-t) - jnp.log(t)


def ancestral(look: Look, x: jax.Array, at: Interval, past: jax.Array, memory: Any, noise: Noise):
    """The stochastic sampler with the flow's marginals: part of the noise is replaced by fresh noise at every step.

    x <- (1 - t') D + t' (r e + sqrt(1 - r^2) z),  r = (1 - t) t' / ((1 - t') t)
    with the predicted data D and noise e: a draw from the posterior of x_t' given x_t and D (DDIM with eta = 1, Song et
    al. 2020, arXiv 2010.02502, equation 16), written for the linear path.
    """
    v, memory = look(x, at.t, at.index, memory)
    data, e, t_next = path.data_from_velocity(x, v, at.t), x + (1 - at.t) * v, at.t_next
    kept = (1 - at.t) * t_next / ((1 - t_next) * at.t)
    fresh = jnp.sqrt(jnp.maximum(1 - kept**2, 0.0))
    return (1 - t_next) * data + t_next * (kept * e + fresh * noise(at.index)), past, memory


SOLVERS: dict[str, Step] = {
    "euler": euler,
    "heun": heun,
    "ab2": adams_bashforth,
    "dpm++2m": dpm_solver,
    "ancestral": ancestral,
}
EVALUATIONS = {"euler": 1, "heun": 2, "ab2": 1, "dpm++2m": 1, "ancestral": 1}  # a step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Where a solver stands.

    Attributes:
      x: the point.
      past: what the next step needs of this one.
      memory: what the field remembers.
      data: as the last step predicted them (at first zeros).
      traces: of the field at every step and evaluation, stacked on two leading axes (S, EVALUATIONS); zeros for the
        steps to come.
    """

    x: jax.Array
    past: jax.Array
    memory: Any
    data: jax.Array
    traces: Any


def begin(x: jax.Array, memory: Any, traces: Any) -> State:
    """Before the first step."""
    return State(x, jnp.zeros_like(x), memory, jnp.zeros_like(x), traces)


def integrate(
    field: Field,
    state: State,
    times: jax.Array,
    first: jax.Array | int,
    last: jax.Array | int,
    solver: str,
    noise: Noise,
) -> State:
    """Takes the steps from `first` up to `last` of the grid `times` (S + 1 points from 1 to 0), in one loop."""
    step_of = SOLVERS[solver]

    def step(index: jax.Array, state: State) -> State:
        predicted, traces_of_step = [], []

        def look(x: jax.Array, t: jax.Array, step: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
            v, memory, trace = field(x, t, step, memory)
            predicted.append(path.data_from_velocity(x, v, t))
            traces_of_step.append(trace)
            return v, memory

        at = Interval(index, times[index], times[index + 1], times[jnp.maximum(index - 1, 0)])
        x, past, memory = step_of(look, state.x, at, state.past, state.memory, noise)
        traces = jax.tree.map(
            lambda all_steps, *each: all_steps.at[index].set(jnp.stack(each)), state.traces, *traces_of_step
        )
        return State(x, past, memory, predicted[0], traces)

    return jax.lax.fori_loop(first, last, step, state)
