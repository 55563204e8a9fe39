"""Guidance: combines the velocities under several conditions into one.

Every method takes two velocities (B, ...), with and without the text, each merged over the experts. With conditioning
frames, both velocities use them, and a third velocity uses neither text nor frames (Open-Sora 2.0):

    v = v_00 + g_img (v_i0 - v_00) + g_txt (v_it - v_i0) = [v_i0 + g_txt (v_it - v_i0)] + (g_img - 1) (v_i0 - v_00)

Classifier-free guidance is linear in the velocities: guiding each expert or their weighted sum gives the same result.
The other methods are not linear; they apply to the velocity of the ensemble.
"""

import dataclasses

import jax
import jax.numpy as jnp

from paris_jax.diffusion import path

STEADY = 10  # first step at which a guidance scale may oscillate (Open-Sora 2.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Strength:
    """The strength of guidance: scalars that change without recompilation.

    Attributes:
      scale: text guidance scale; 1 disables guidance.
      low, high: the guidance interval of timesteps; outside it only the conditional branch is computed.
      rescale: fraction, in [0, 1], of the guided velocity that is rescaled to the conditional standard deviation.
      momentum, norm_threshold, eta: parameters of projected guidance (`projected`).
      image_scale: guidance scale of the conditioning frames; 1 disables image guidance.
      text_oscillates, image_oscillates: from step `STEADY` on, guide at every other step only.
      ramp: the image scale grows linearly over the frames, from 1 to a last value that decays to 1 over the steps.
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
        """Whether text and image guidance apply at each timestep and step: two (B,) bool.

        Guidance applies inside the interval (Kynkäänniemi et al. 2024, arXiv 2404.07724), except at the unguided steps
        of an oscillation.
        """
        within = (t_B >= self.low) & (t_B <= self.high)
        unguided = jnp.asarray((step >= STEADY) & (step % 2 == 1))
        return within & ~(unguided & self.text_oscillates), within & ~(unguided & self.image_oscillates)

    def image_scales(self, step: jax.Array | int, steps: jax.Array | int, frames: int) -> jax.Array:
        """The image guidance scale of each latent frame, (T,)."""
        last = self.image_scale + (1 - self.image_scale) * step / steps
        return jnp.where(self.ramp, jnp.linspace(1.0, last, frames), self.image_scale)


def classifier_free(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """v = v_null + scale (v_text - v_null) (Ho and Salimans 2022): the conditional velocity at scale 1."""
    return unconditional + scale * (conditional - unconditional)


def by_image(with_frames: jax.Array, without_frames: jax.Array, scales_T: jax.Array) -> jax.Array:
    """The image guidance term added to a guided velocity: (scale - 1) (v_i0 - v_00), (B, T, ...)."""
    return path.per_sample(scales_T - 1, with_frames[0]) * (with_frames - without_frames)


def rescaled(v: jax.Array, conditional: jax.Array, rescale: float | jax.Array) -> jax.Array:
    """Rescales a fraction of v to the conditional standard deviation of each sample, against overexposure.

    Lin et al. 2023 (arXiv 2305.08891), equations 15 and 16.
    """
    std, guided_std = _std(conditional), _std(v)
    return v * (1 + rescale * (std / jnp.maximum(guided_std, 1e-12) - 1))


def _std(v: jax.Array) -> jax.Array:
    return jnp.std(v.astype(jnp.float32), axis=tuple(range(1, v.ndim)), keepdims=True)


def projected(
    conditional: jax.Array,
    unconditional: jax.Array,
    x: jax.Array,
    t_B: jax.Array,
    strength: Strength,
    before: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416, algorithm 1), applied to the predicted data.

    The update is the difference D_text - D_null of the predictions D = x - t v plus `momentum` times the running sum of
    the earlier differences. Its norm over a sample is clipped to `norm_threshold`, and its component parallel to D_text
    is scaled by `eta`.

    Args:
      conditional, unconditional: (B, ...) velocities.
      x: (B, ...) noised samples.
      t_B: (B,) timesteps.
      before: (B, ...) running sum of the earlier steps; zeros at the first.

    Returns:
      The guided velocity (B, ...), and the running sum (B, ...) for the next step.
    """
    t = path.per_sample(t_B, x)
    data = path.data_from_velocity(x, conditional, t_B)
    difference = unconditional - conditional  # (D_text - D_null) / t
    running = t * difference + strength.momentum * before
    axes = tuple(range(1, x.ndim))

    def norm(a: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(a), axis=axes, keepdims=True))

    # From data to velocity: divided by t; the limit at t = 0 is the difference itself.
    update = jnp.where(t > 0, running / jnp.where(t > 0, t, 1.0), difference)
    update = update * jnp.minimum(1.0, strength.norm_threshold / jnp.maximum(norm(running), 1e-12))
    direction = data / jnp.maximum(norm(data), 1e-12)
    parallel = jnp.sum(update * direction, axis=axes, keepdims=True) * direction
    return conditional - (strength.scale - 1) * (update - parallel + strength.eta * parallel), running
