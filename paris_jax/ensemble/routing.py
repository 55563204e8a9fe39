"""Routing: from the router's logits to the selected experts and their weights.

    w = softmax(logits of the present experts);  S by the rule;  weight_k = w_k / sum_{j in S} w_j for k in S

Decentralized Diffusion Models (arXiv 2501.05450); sparse rules as in Paris 2.0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from paris_jax.errors import UserError, nearest
from paris_jax.models import functional

RULES = ("top_k", "full", "threshold", "fixed")


@dataclasses.dataclass(frozen=True)
class Routing:
    """A routing rule.

    Attributes:
      rule: "top_k" (the k largest weights), "full" (all), "threshold" (the smallest set with weight >= p) or "fixed"
        (a given expert at each step, regardless of the router).
      k: for top_k.
      p: for threshold, in [0, 1].
    """

    rule: str = "top_k"
    k: int = 1
    p: float = 0.9

    def check(self, experts: int) -> None:
        """Refuses a rule that `experts` experts cannot follow."""
        if self.rule not in RULES:
            raise UserError(f"routing={self.rule!r}: must be one of {', '.join(RULES)}{nearest(self.rule, RULES)}")
        if self.rule == "top_k" and not 1 <= self.k <= experts:
            raise UserError(f"top_k={self.k}: this ensemble has {experts} experts, so it must be from 1 to {experts}")
        if self.rule == "threshold" and not 0 <= self.p <= 1:
            raise UserError(f"threshold={self.p}: must be from 0 to 1")

    def most(self, experts: int) -> int:
        """The largest number of experts that a sample can use at a step."""
        return {"top_k": self.k, "fixed": 1}.get(self.rule, experts)


def weights(logits_BE: jax.Array, routing: Routing, fixed_expert: jax.Array | None = None) -> jax.Array:
    """Weight of each expert, zero for those not selected; rows sum to 1.

    Args:
      logits_BE: the router's logits of the experts; -inf for an absent one.
      fixed_expert: () int32, index of the fixed expert, for the rule "fixed".

    Returns:
      (B, E) float32.
    """
    experts = logits_BE.shape[-1]
    if routing.rule == "fixed":
        return jnp.broadcast_to(jax.nn.one_hot(fixed_expert, experts), logits_BE.shape)
    w = jax.nn.softmax(logits_BE.astype(jnp.float32))
    if routing.rule == "full":
        return w
    order = jnp.argsort(-w, axis=-1)  # stable: the first of equal experts is selected
    ranked = jnp.take_along_axis(w, order, axis=-1)
    if routing.rule == "top_k":
        selected_ranked = jnp.arange(experts) < routing.k
    else:  # an expert is selected while the larger ones together do not reach p
        selected_ranked = (jnp.cumsum(ranked, -1) - ranked < routing.p).at[:, 0].set(True)
    selected_ranked = jnp.broadcast_to(selected_ranked, w.shape)
    selected = jnp.take_along_axis(selected_ranked, jnp.argsort(order, axis=-1), axis=-1)
    w = jnp.where(selected, w, 0.0)
    return w / w.sum(-1, keepdims=True)


def router_logits(
    config: Any,
    params: functional.Params | None,
    clusters_E: jax.Array,
    x: jax.Array,
    t_B: jax.Array,
    pooled: jax.Array,
    cond: jax.Array | None = None,
) -> jax.Array:
    """The router's logits for the experts of these clusters, (B, E); zeros without a router (`config` None)."""
    if config is None or params is None:
        return jnp.zeros((x.shape[0], clusters_E.shape[0]), jnp.float32)
    condition = (pooled, cond) if config.cond_frames else (pooled,)
    return functional.apply(config, params, x, t_B, *condition)[:, clusters_E]
