"""Frames as the networks' inputs: which frames of a video, and their size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def evenly(frames: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` frames spread evenly from the first to the last; some repeat where there are fewer."""
    return np.linspace(0, frames - 1, wanted).round().astype(int)


@functools.partial(jax.jit, static_argnames="side")
def scale_and_crop(frames_BHW3: jax.Array, side: int) -> jax.Array:
    """Scales frames (B, H, W, 3) uint8 to `side` at the shorter side: their middle (B, side, side, 3) in [0, 1].

    Bicubic and antialiased, as the preparation of CLIP and its like.
    """
    _, H, W, _ = frames_BHW3.shape
    scale = side / min(H, W)
    rows, columns = max(side, round(H * scale)), max(side, round(W * scale))
    pixels = frames_BHW3.astype(jnp.float32) / 255
    scaled = jax.image.resize(pixels, (len(pixels), rows, columns, 3), "cubic", antialias=True)
    top, left = (rows - side) // 2, (columns - side) // 2
    return jnp.clip(scaled[:, top : top + side, left : left + side], 0, 1)
