"""Guidance: from a network's answers to several conditions to one velocity.

Every method takes two velocities (B, ...), with the condition and without it, each merged over the experts.
Classifier-free guidance is linear in them, so that it makes no difference whether each expert is guided or their sum;
the others are not linear, and are applied to what the ensemble as a whole would do.
"""

import dataclasses

import jax
import jax.numpy as jnp

from paris_jax.diffusion import path

METHODS = ("classifier_free", "projected")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strength:
    """How strong guidance is: scalars that may change without a new compilation.

    Attributes:
      scale: 1 is none.
      low, high: guided at times from `low` to `high`; outside, the unconditional branch is not computed.
      rescale: share, in [0, 1], of the guided velocity that is brought back to the conditional one's spread.
      momentum, radius, parallel: of projected guidance.
    """

    scale: jax.Array | float
    low: jax.Array | float = 0.0
    high: jax.Array | float = 1.0
    rescale: jax.Array | float = 0.0
    momentum: jax.Array | float = -0.5
    radius: jax.Array | float = 15.0
    parallel: jax.Array | float = 0.0

    def at(self, t_B: jax.Array) -> jax.Array:
        """Whether guidance is on at each time (Kynkäänniemi et al. 2024, arXiv 2404.07724)."""
        return (t_B >= self.low) & (t_B <= self.high)


def classifier_free(
    conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array, rescale: float | jax.Array = 0.0
) -> jax.Array:
    """v = v_null + scale (v_text - v_null) (Ho and Salimans 2022). Scale 1 is the conditional velocity, 0 the other.

    `rescale` brings that share of v to the spread of the conditional velocity over each sample, against overexposure
    (Lin et al. 2023, arXiv 2305.08891, equations 15 and 16).
    """
    v = unconditional + scale * (conditional - unconditional)
    spread, guided = _spread(conditional), _spread(v)
    return v * (1 + rescale * (spread / jnp.maximum(guided, 1e-12) - 1))


def _spread(v: jax.Array) -> jax.Array:
    return jnp.std(v.astype(jnp.float32), axis=tuple(range(1, v.ndim)), keepdims=True)


def projected(
    conditional: jax.Array,
    unconditional: jax.Array,
    x: jax.Array,
    t_B: jax.Array,
    strength: Strength,
    before: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1), in the predicted data.

    The difference D_text - D_null of the predictions D = x - t v, plus `momentum` times the running sum of the earlier
    ones, cut to at most `radius` in norm over a sample, goes on without its part along D_text (`parallel` times it).

    Args:
      conditional, unconditional, x: (B, ...).
      t_B: (B,) times.
      before: (B, ...) the running sum; start it at zero.

    Returns:
      The guided velocity, and the running sum.
    """
    t = path.per_sample(t_B, x)
    data = path.data_from_velocity(x, conditional, t_B)
    difference = unconditional - conditional  # of the predicted data, by t
    running = t * difference + strength.momentum * before
    axes = tuple(range(1, x.ndim))

    def norm(a: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(a), axis=axes, keepdims=True))

    # By t again, whose limit at t = 0 is the difference itself.
    update = jnp.where(t > 0, running / jnp.where(t > 0, t, 1.0), difference)
    update = update * jnp.minimum(1.0, strength.radius / jnp.maximum(norm(running), 1e-12))
    direction = data / jnp.maximum(norm(data), 1e-12)
    along = jnp.sum(update * direction, axis=axes, keepdims=True) * direction
    return conditional - (strength.scale - 1) * (update - along + strength.parallel * along), running
