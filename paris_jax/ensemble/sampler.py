"""The ensemble's velocity, and the whole solver loop in one compiled call.

    v(x, t, c) = sum_k weight_k(x, t, c) v_k(x, t, c)

Guidance stands inside the sum, with the same weights for both branches.

Experts have one architecture and stand stacked on a leading axis, so that the expert of a sample is an index.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paris_jax.diffusion import guidance as guidances
from paris_jax.diffusion import solvers
from paris_jax.ensemble.routing import Routing, weights
from paris_jax.models import functional


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Arrays of an ensemble: stacked experts (leading axis E), the router, and the experts' clusters.

    Attributes:
      experts: parameters, each (E, ...).
      router: parameters, or None for one expert on its own.
      clusters: (E,) int32, the router's class of each expert.
    """

    experts: functional.Params
    router: functional.Params | None
    clusters: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Text:
    """Encoded prompts: tokens (B, L, X) padded at the end, length (B,) int32, pooled (B, P)."""

    tokens: jax.Array
    length: jax.Array
    pooled: jax.Array

    def null(self) -> "Text":
        """The same number of empty prompts, as training drops them: zeros, one token long."""
        return Text(jnp.zeros_like(self.tokens), jnp.ones_like(self.length), jnp.zeros_like(self.pooled))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What decides the compiled code: new values of anything else do not recompile."""

    network: functional.Config
    router: functional.Config | None
    routing: Routing
    solver: str = "euler"
    guided: bool = True


def expert_velocity(network: functional.Config, params: functional.Params, x, t_B, text: Text, scale: jax.Array | None):
    """One expert's velocity, guided where a scale is given (both branches in one batch)."""
    if scale is None:
        return functional.apply(network, params, x, t_B, text.tokens, text.length, text.pooled)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), text, text.null())
    v = functional.apply(
        network, params, jnp.concatenate([x, x]), jnp.concatenate([t_B, t_B]), both.tokens, both.length, both.pooled
    )
    conditional, unconditional = jnp.split(v, 2)
    return guidances.classifier_free(conditional, unconditional, scale)


def route(plan: Plan, arrays: Weights, x: jax.Array, t_B: jax.Array, text: Text) -> jax.Array:
    """The router's logits for the experts that are present, (B, E)."""
    experts = arrays.clusters.shape[0]
    if plan.router is None or arrays.router is None:
        return jnp.zeros((x.shape[0], experts), jnp.float32)
    return functional.apply(plan.router, arrays.router, x, t_B, text.pooled)[:, arrays.clusters]


def merge(plan: Plan, arrays: Weights, weight_BE: jax.Array, x, t_B, text: Text, scale: jax.Array | None) -> jax.Array:
    """The weighted sum of the chosen experts' velocities.

    Sparse rules run one (sample, expert) pair after another, each reading its expert's parameters by index: k passes a
    sample whatever the number of experts, and no sample sees its neighbours. The full rule runs each expert on the
    whole batch.
    """
    batch, experts = weight_BE.shape
    if plan.routing.rule == "full":

        def add(total: jax.Array, expert: tuple[functional.Params, jax.Array]) -> tuple[jax.Array, None]:
            params, weight_B = expert
            v = expert_velocity(plan.network, params, x, t_B, text, scale)
            return total + weight_B[:, None, None, None, None] * v, None

        return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), (arrays.experts, weight_BE.T))[0]

    most = plan.routing.most(experts)
    weight_BS, expert_BS = jax.lax.top_k(weight_BE, most)

    def pair(i: jax.Array) -> jax.Array:
        sample, chosen = i // most, expert_BS.reshape(-1)[i]

        def run() -> jax.Array:
            params = jax.tree.map(lambda a: a[chosen], arrays.experts)
            x_1, t_1, text_1 = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, sample, 1), (x, t_B, text))
            return expert_velocity(plan.network, params, x_1, t_1, text_1, scale)[0]

        skip = plan.routing.rule == "threshold"  # only there may a slot be empty
        return jax.lax.cond(weight_BS.reshape(-1)[i] > 0, run, lambda: jnp.zeros(x.shape[1:])) if skip else run()

    v_BS = jax.lax.map(pair, jnp.arange(batch * most)).reshape(batch, most, *x.shape[1:])
    return jnp.einsum("bs,bs...->b...", weight_BS, v_BS)


@functools.partial(jax.jit, static_argnames=("plan",))
def velocity(plan: Plan, arrays: Weights, x, t_B, text: Text, scale: jax.Array, forced: jax.Array) -> tuple[Any, Any]:
    """The ensemble's velocity (B, T, H, W, C) and the weights it used (B, E)."""
    weight_BE = weights(route(plan, arrays, x, t_B, text), plan.routing, forced)
    return merge(plan, arrays, weight_BE, x, t_B, text, scale if plan.guided else None), weight_BE


@functools.partial(jax.jit, static_argnames=("plan", "on_step"))
def sample(
    plan: Plan,
    arrays: Weights,
    noise: jax.Array,
    times: jax.Array,
    text: Text,
    scale: jax.Array,
    forced_S: jax.Array,
    on_step: Callable[[jax.Array], None] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Solves from noise to data.

    Args:
      noise: (B, T, H, W, C) standard normal.
      times: (S + 1,) from 1 to 0.
      scale: () guidance scale; not read when the plan is not guided.
      forced_S: (S,) int32, the expert of each step for the rule "forced".
      on_step: called on the host with each step's index, for progress.

    Returns:
      The latent (B, T, H, W, C) in units of the training data's spread, and the weights of each step (S, B, E).
    """

    def field(x: jax.Array, t: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        if on_step is not None:
            jax.debug.callback(on_step, step)
        return velocity(plan, arrays, x, jnp.full(x.shape[:1], t), text, scale, forced_S[step])

    return solvers.solve(field, noise, times, plan.solver)
