"""Three-axis rotary position embeddings (t, h, w), and sinusoidal embeddings of the timestep."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def video_positions(frames: int, rows: int, columns: int) -> np.ndarray:
    """Indices (t, h, w) of the tokens of a video in row-major order, (T * H * W, 3) float32."""
    axes = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, 3).astype(np.float32)


def rotary_table(positions_N3: np.ndarray, axes: tuple[int, int, int], theta: float) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines for `rotate`, each (N, sum(axes) // 2) float32: axis i rotates `axes[i]` features of a head.

    Su et al. 2021 per axis; position zero (the text of FLUX.1) is the identity.
    """
    angles = []
    for axis, width in enumerate(axes):
        frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        angles.append(positions_N3[:, axis, None] * frequencies)
    angle = np.concatenate(angles, axis=-1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x_BNHD: jax.Array, cos: jax.Array | np.ndarray, sin: jax.Array | np.ndarray) -> jax.Array:
    """Rotates neighbouring feature pairs (2i, 2i + 1) of each head by the table's angles, in float32."""
    pairs = x_BNHD.astype(jnp.float32).reshape(*x_BNHD.shape[:-1], -1, 2)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    first, second = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.reshape(x_BNHD.shape).astype(x_BNHD.dtype)


def time_features(t_B: jax.Array, width: int, scale: float = 1000.0, longest: float = 10000.0) -> jax.Array:
    """Sinusoids of scale * t, (B, width) float32: cosines, then sines, of log-spaced frequencies (as FLUX.1)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(longest) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = scale * t_B.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
