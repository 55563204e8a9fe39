"""Guidance: from a network's answers to several conditions to one velocity.

Every method takes two velocities (B, ...), with the text and without it, each merged over the experts. Where frames are
given, both know them, and a third velocity, which knows neither, says where the frames lead (Open-Sora 2.0):

    v = v_00 + g_img (v_i0 - v_00) + g_txt (v_it - v_i0) = [v_i0 + g_txt (v_it - v_i0)] + (g_img - 1) (v_i0 - v_00)

Classifier-free guidance is linear in them, so that it makes no difference whether each expert is guided or their sum;
the others are not linear, and are applied to what the ensemble as a whole would do.
"""

import dataclasses

import jax
import jax.numpy as jnp

from paris_jax.diffusion import path

STEADY = 10  # steps before anything oscillates, as in Open-Sora 2.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strength:
    """How strong guidance is: scalars that may change without a new compilation.

    Attributes:
      scale: 1 is none.
      low, high: guided at times from `low` to `high`; outside, the other branches are not computed.
      rescale: share, in [0, 1], of the guided velocity that is brought back to the conditional one's spread.
      momentum, norm_threshold, eta: of projected guidance.
      image_scale: of frames that are given; 1 is none.
      text_oscillates, image_oscillates: from step `STEADY` on, guided at every other step only.
      ramp: the scale of the image grows along the video's frames, from 1 to a last one that falls to 1 over the steps.
    """

    scale: jax.Array | float
    low: jax.Array | float = 0.0
    high: jax.Array | float = 1.0
    rescale: jax.Array | float = 0.0
    momentum: jax.Array | float = -0.5
    norm_threshold: jax.Array | float = 15.0
    eta: jax.Array | float = 0.0
    image_scale: jax.Array | float = 1.0
    text_oscillates: jax.Array | bool = False
    image_oscillates: jax.Array | bool = False
    ramp: jax.Array | bool = False

    def at(self, t_B: jax.Array, step: jax.Array | int = 0) -> tuple[jax.Array, jax.Array]:
        """Whether the text guides at each time and step, and whether the image does, two (B,) bool.

        In an interval of time (Kynkäänniemi et al. 2024, arXiv 2404.07724), and not in the lows of an oscillation.
        """
        within = (t_B >= self.low) & (t_B <= self.high)
        low = jnp.asarray((step >= STEADY) & (step % 2 == 1))
        return within & ~(low & self.text_oscillates), within & ~(low & self.image_oscillates)

    def image_scales(self, step: jax.Array | int, steps: int, frames: int) -> jax.Array:
        """The scale of the image at each latent frame, (T,)."""
        last = self.image_scale + (1 - self.image_scale) * step / steps
        return jnp.where(self.ramp, jnp.linspace(1.0, last, frames), self.image_scale)


def classifier_free(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """v = v_null + scale (v_text - v_null) (Ho and Salimans 2022). Scale 1 is the conditional velocity, 0 the other."""
    return unconditional + scale * (conditional - unconditional)


def by_image(known: jax.Array, unknown: jax.Array, scales_T: jax.Array) -> jax.Array:
    """What frames that are given add to a guided velocity: (scale - 1) times what knowing them changes, (B, T, ...)."""
    return path.per_sample(scales_T - 1, known[0]) * (known - unknown)


def rescaled(v: jax.Array, conditional: jax.Array, rescale: float | jax.Array) -> jax.Array:
    """Brings a share of v to the spread of the conditional velocity over each sample, against overexposure.

    Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16.
    """
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
    ones, cut to at most `norm_threshold` in norm over a sample, goes on without its part along D_text (`eta` times it).

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
    update = update * jnp.minimum(1.0, strength.norm_threshold / jnp.maximum(norm(running), 1e-12))
    direction = data / jnp.maximum(norm(data), 1e-12)
    along = jnp.sum(update * direction, axis=axes, keepdims=True) * direction
    return conditional - (strength.scale - 1) * (update - along + strength.eta * along), running
