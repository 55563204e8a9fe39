"""Timesteps: the training distribution, the sampling schedule and the shift of both."""

import math

import jax
import jax.numpy as jnp

CAPACITY_STEPS = 64  # compiled samplers hold a multiple of this, so that another number of steps does not recompile


def shift(t: jax.Array, factor: float) -> jax.Array:
    """Shifts timesteps towards noise, t <- a t / (1 + (a - 1) t) (Esser et al. 2024, section 5.3.2); 1 is no shift."""
    return factor * t / (1 + (factor - 1) * t)


def open_sora_shift(tokens_per_frame: int, latent_frames: int) -> float:
    """Open-Sora 2.0's shift: a line from 1 at 256 tokens a frame to 3 at 4096, times sqrt(latent frames).

    The line is clipped at 1, so that small latents are not shifted towards data.
    """
    line = 1 + (tokens_per_frame - 256) * (3 - 1) / (4096 - 256)
    return max(line, 1.0) * math.sqrt(latent_frames)


def resolve_shift(factor: float, video_tokens: int, latent_frames: int) -> float:
    """The shift for a latent of so many tokens: a constant factor, or Open-Sora 2.0's rule where the factor is 0."""
    return factor or open_sora_shift(video_tokens // latent_frames, latent_frames)


def logit_normal(normal_B: jax.Array, mean: float, std: float, factor: float) -> jax.Array:
    """Training timesteps from standard normal draws: sigmoid(mean + std n), shifted. Returns (B,) in (0, 1)."""
    return shift(jax.nn.sigmoid(mean + std * normal_B), factor)


def timestep_schedule(num_steps: int, factor: float) -> jax.Array:
    """Sampling timesteps from 1 to 0: num_steps + 1 evenly spaced points, shifted. Returns (num_steps + 1,) float32."""
    return shift(jnp.linspace(1.0, 0.0, num_steps + 1, dtype=jnp.float32), factor)


def capacity(num_steps: int) -> int:
    """Steps that the arrays of a compiled sampler hold: `num_steps` rounded up."""
    return -(-num_steps // CAPACITY_STEPS) * CAPACITY_STEPS


def padded(values: jax.Array, size: int) -> jax.Array:
    """Values per step or timestep, padded with zeros to (size,). A padded schedule still ends at its first 0."""
    return jnp.pad(values, (0, size - values.shape[0]))


def num_steps(timesteps: jax.Array) -> jax.Array:
    """The number of steps of a schedule, padded or not, () int32: the index of its first 0."""
    return jnp.argmin(timesteps).astype(jnp.int32)
