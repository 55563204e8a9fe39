"""From the router's logits to the experts that are used, and with which weight.

    w = softmax(logits of the experts that are present);  S by the rule;  weight_k = w_k / sum_{j in S} w_j for k in S

Decentralized Diffusion Models (arXiv 2501.05450); sparse rules as in Paris 2.0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from paris_jax.errors import UserError, nearest
from paris_jax.models import functional

RULES = ("top_k", "full", "threshold", "forced")


@dataclasses.dataclass(frozen=True)
class Routing:
    """A routing rule.

    Attributes:
      rule: "top_k" (the k heaviest), "full" (all), "threshold" (the smallest set whose weight reaches p) or "forced"
        (a given cluster at each step, whatever the router says).
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
        """The most experts a sample can use at a step."""
        return {"top_k": self.k, "forced": 1}.get(self.rule, experts)


def weights(logits_BE: jax.Array, routing: Routing, forced: jax.Array | None = None) -> jax.Array:
    """Weight of each expert, zero for those not chosen; rows sum to 1.

    Args:
      logits_BE: the router's logits for the experts that are present; an absent one is left out before the softmax.
      forced: () int32 position of the forced expert, for the rule "forced".

    Returns:
      (B, E) float32.
    """
    experts = logits_BE.shape[-1]
    if routing.rule == "forced":
        return jnp.broadcast_to(jax.nn.one_hot(forced, experts), logits_BE.shape)
    w = jax.nn.softmax(logits_BE.astype(jnp.float32))
    if routing.rule == "full":
        return w
    order = jnp.argsort(-w, axis=-1)  # stable: among equals the first expert is chosen
    ranked = jnp.take_along_axis(w, order, axis=-1)
    if routing.rule == "top_k":
        keep_ranked = jnp.arange(experts) < routing.k
    else:  # an expert is needed as long as those before it do not reach p
        keep_ranked = (jnp.cumsum(ranked, -1) - ranked < routing.p).at[:, 0].set(True)
    keep_ranked = jnp.broadcast_to(keep_ranked, w.shape)
    keep = jnp.take_along_axis(keep_ranked, jnp.argsort(order, axis=-1), axis=-1)
    kept = jnp.where(keep, w, 0.0)
    return kept / kept.sum(-1, keepdims=True)


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
    condition = (pooled, cond) if config.kept_frames else (pooled,)
    return functional.apply(config, params, x, t_B, *condition)[:, clusters_E]
