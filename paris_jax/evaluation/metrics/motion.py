"""Amount of motion, and flicker where nothing moves, by optical flow: coarse-to-fine dense Lucas-Kanade.

Frechet distances are insensitive to bad motion, so motion is reported beside them. Neither more nor less motion is
better: closest to the held-out clips is best. The estimator is our own choice, so its numbers compare only with each
other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

_LUMA = (0.299, 0.587, 0.114)
_WINDOW = 5  # pixels; the flow is taken as constant within it
_ITERATIONS = 4
# Added to the structure tensor, so that pixels without texture, whose motion is undetermined, get a flow of zero.
_FLATNESS = 1e-3
STILL = 0.5  # pixels of flow per frame, below which a pixel counts as still: our choice
_PIXELS = 2**21  # of the frames whose flow is computed at once


def mean_motion(videos: np.ndarray, levels: int = 2) -> np.ndarray:
    """Mean length of the optical flow of each clip.

    Args:
      videos: (N, T, H, W, 3) float in [-1, 1].
      levels: levels of the image pyramid; each doubles the largest detectable displacement (about 2 pixels at one).
    Returns:
      (N,) float64, pixels per frame, averaged over pixels and frame pairs; zero for a single frame.
    """
    return motion_and_flicker(videos, levels)[0]


def temporal_flicker(videos: np.ndarray, levels: int = 2) -> np.ndarray:
    """Mean absolute change between neighbouring frames of the pixels that do not move.

    VBench's "temporal flickering" takes the mean change of all pixels of videos that are known to be still; here, still
    pixels are found by optical flow, so that moving videos have a score, too. Lower is steadier, and the value of real
    clips is the one to reach. The numbers compare only with each other.

    Args: as of `mean_motion`.

    Returns:
      (N,) float64 in gray levels of 0 to 255; zero for a single frame, or where every pixel moves.
    """
    return motion_and_flicker(videos, levels)[1]


def motion_and_flicker(videos: np.ndarray, levels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """`mean_motion` and `temporal_flicker` of each clip, from one flow."""
    if videos.ndim != 5 or videos.shape[-1] != 3:
        raise ValueError(f"videos has shape {videos.shape}: must be (N, T, H, W, 3)")
    N, T, H, W, _ = videos.shape
    if T == 1 or not N:
        return np.zeros(N), np.zeros(N)
    size = min(N, max(1, _PIXELS // (T * H * W)))
    found = []
    for start in range(0, N, size):  # the last clip is repeated, so that one shape is compiled
        clips = videos[np.minimum(np.arange(start, start + size), N - 1)].astype(np.float32)
        found.append(np.asarray(_of_clips(clips, levels), np.float64))
    motion, flicker = np.concatenate(found, axis=1)[:, :N]
    return motion, flicker


@functools.partial(jax.jit, static_argnames="levels")
def _of_clips(clips: jax.Array, levels: int) -> jax.Array:
    """Motion and flicker of clips (N, T, H, W, 3): (2, N)."""
    N, T, H, W, C = clips.shape
    first, second = clips[:, :-1], clips[:, 1:]
    flow = optical_flow(first.reshape(-1, H, W, C), second.reshape(-1, H, W, C), levels)
    length = jnp.linalg.norm(flow, axis=-1).reshape(N, T - 1, H, W)
    change, still = jnp.abs(second - first).mean(-1) * 127.5, length < STILL
    pixels = (1, 2, 3)
    flicker = jnp.where(still, change, 0).sum(pixels) / jnp.maximum(still.sum(pixels), 1)
    return jnp.stack([length.mean(pixels), flicker])


@functools.partial(jax.jit, static_argnames="levels")
def optical_flow(first: jax.typing.ArrayLike, second: jax.typing.ArrayLike, levels: int = 2) -> jax.Array:
    """Flow u with second(p + u(p)) = first(p).

    Args:
      first, second: (B, H, W, 3) float in [-1, 1].
    Returns:
      (B, H, W, 2) float32: displacement in pixels, (rows, columns).
    """
    luma = jnp.array(_LUMA, jnp.float32)
    gray = lambda image: (jnp.asarray(image, jnp.float32) * luma).sum(-1)  # noqa: E731
    pyramid = [(gray(first), gray(second))]
    for _ in range(levels - 1):
        if min(pyramid[-1][0].shape[1:]) < 2 * _WINDOW:
            break
        pyramid.append((_halve(pyramid[-1][0]), _halve(pyramid[-1][1])))
    flow = jnp.zeros((*pyramid[-1][0].shape, 2))
    for level, (a, b) in enumerate(reversed(pyramid)):
        if level:
            flow = 2 * _grow(flow, a.shape[1:])
        flow = jax.lax.fori_loop(
            0, _ITERATIONS, lambda _, flow, a=a, b=b: flow + _lucas_kanade_step(a, *_warp(b, flow)), flow
        )
    return flow


def _lucas_kanade_step(a: jax.Array, b: jax.Array, inside: jax.Array) -> jax.Array:
    """Least-squares flow from a to b in windows, (B, H, W) -> (B, H, W, 2); at most one pixel per iteration.

    Pixels that left the frame in b, where `inside` is false, do not count.
    """
    rows, columns = (inside * slope for slope in jnp.gradient((a + b) / 2, axis=(1, 2)))
    change = b - a
    rr, cc, rc = _box(rows * rows) + _FLATNESS, _box(columns * columns) + _FLATNESS, _box(rows * columns)
    rt, ct = _box(rows * change), _box(columns * change)
    det = rr * cc - rc * rc
    step = jnp.stack([(rc * ct - cc * rt) / det, (rc * rt - rr * ct) / det], axis=-1)
    return jnp.clip(step, -1, 1)


def _box(image: jax.Array) -> jax.Array:
    """Mean over a window around each pixel, edges repeated; (B, H, W)."""
    half = _WINDOW // 2
    for axis in (1, 2):
        width = [(0, 0)] * 3
        width[axis] = (half, half)
        padded, size = jnp.pad(image, width, mode="edge"), image.shape[axis]
        shifted = [jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(_WINDOW)]
        image = functools.reduce(jnp.add, shifted) / _WINDOW
    return image


def _halve(image: jax.Array) -> jax.Array:
    """Mean of 2 x 2 pixels; an odd last row or column is repeated. (B, H, W)."""
    _, height, width = image.shape
    image = jnp.pad(image, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    return (image[:, ::2, ::2] + image[:, 1::2, ::2] + image[:, ::2, 1::2] + image[:, 1::2, 1::2]) / 4


def _grow(flow: jax.Array, size: tuple[int, ...]) -> jax.Array:
    """Repeats each vector 2 x 2 and cuts to `size`."""
    return flow.repeat(2, axis=1).repeat(2, axis=2)[:, : size[0], : size[1]]


def _warp(image: jax.Array, flow: jax.Array) -> tuple[jax.Array, jax.Array]:
    """image(p + flow(p)) by bilinear interpolation, edges repeated, and whether p + flow(p) is inside the frame."""
    batch, height, width = image.shape
    row = jnp.arange(height)[:, None] + flow[..., 0]
    column = jnp.arange(width) + flow[..., 1]
    inside = (row >= -0.5) & (row <= height - 0.5) & (column >= -0.5) & (column <= width - 0.5)
    row, column = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
    r, c = (jnp.minimum(x.astype(int), size - 2) for x, size in ((row, height), (column, width)))
    dr, dc = row - r, column - c
    b = jnp.arange(batch)[:, None, None]
    top = image[b, r, c] * (1 - dc) + image[b, r, c + 1] * dc
    bottom = image[b, r + 1, c] * (1 - dc) + image[b, r + 1, c + 1] * dc
    return top * (1 - dr) + bottom * dr, inside
