"""Amount of motion: mean optical flow in pixels per frame, by coarse-to-fine dense Lucas-Kanade.

Frechet distances are insensitive to bad motion, so motion is reported beside them. Neither more nor less motion is
better: closest to the held-out clips is best. The estimator is our own choice, so its numbers compare only with each
other.
"""

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114])
_WINDOW = 5  # pixels; the flow is taken as constant within it
_ITERATIONS = 4
# Added to the structure tensor, so that pixels without texture, whose motion is undetermined, get a flow of zero.
_FLATNESS = 1e-3


def mean_motion(videos: np.ndarray, levels: int = 2) -> np.ndarray:
    """Mean length of the optical flow of each clip.

    Args:
      videos: (N, T, H, W, 3) float in [-1, 1].
      levels: levels of the image pyramid; each doubles the largest detectable displacement (about 2 pixels at one).
    Returns:
      (N,) float64, pixels per frame, averaged over pixels and frame pairs; zero for a single frame.
    """
    if videos.ndim != 5 or videos.shape[-1] != 3:
        raise ValueError(f"videos has shape {videos.shape}: must be (N, T, H, W, 3)")
    if videos.shape[1] == 1:
        return np.zeros(len(videos))
    return np.array([np.linalg.norm(optical_flow(v[:-1], v[1:], levels), axis=-1).mean() for v in videos])


def optical_flow(first: np.ndarray, second: np.ndarray, levels: int = 2) -> np.ndarray:
    """Flow u with second(p + u(p)) = first(p).

    Args:
      first, second: (B, H, W, 3) float in [-1, 1].
    Returns:
      (B, H, W, 2) float64: displacement in pixels, (rows, columns).
    """
    pyramid = [(first.astype(np.float64) @ _LUMA, second.astype(np.float64) @ _LUMA)]
    for _ in range(levels - 1):
        if min(pyramid[-1][0].shape[1:]) < 2 * _WINDOW:
            break
        pyramid.append((_halve(pyramid[-1][0]), _halve(pyramid[-1][1])))
    flow = np.zeros((*pyramid[-1][0].shape, 2))
    for level, (a, b) in enumerate(reversed(pyramid)):
        if level:
            flow = 2 * _grow(flow, a.shape[1:])
        for _ in range(_ITERATIONS):
            flow = flow + _lucas_kanade_step(a, *_warp(b, flow))
    return flow


def _lucas_kanade_step(a: np.ndarray, b: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Least-squares flow from a to b in windows, (B, H, W) -> (B, H, W, 2); at most one pixel per iteration.

    Pixels that left the frame in b, where `inside` is false, do not count.
    """
    rows, columns = (inside * slope for slope in np.gradient((a + b) / 2, axis=(1, 2)))
    change = b - a
    rr, cc, rc = _box(rows * rows) + _FLATNESS, _box(columns * columns) + _FLATNESS, _box(rows * columns)
    rt, ct = _box(rows * change), _box(columns * change)
    det = rr * cc - rc * rc
    step = np.stack([(rc * ct - cc * rt) / det, (rc * rt - rr * ct) / det], axis=-1)
    return np.clip(step, -1, 1)


def _box(image: np.ndarray) -> np.ndarray:
    """Mean over a window around each pixel, edges repeated; (B, H, W)."""
    half = _WINDOW // 2
    for axis in (1, 2):
        width = [(0, 0)] * 3
        width[axis] = (half, half)
        image = np.lib.stride_tricks.sliding_window_view(np.pad(image, width, mode="edge"), _WINDOW, axis).mean(-1)
    return image


def _halve(image: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels; an odd last row or column is repeated. (B, H, W)."""
    _, height, width = image.shape
    image = np.pad(image, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    return (image[:, ::2, ::2] + image[:, 1::2, ::2] + image[:, ::2, 1::2] + image[:, 1::2, 1::2]) / 4


def _grow(flow: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Repeats each vector 2 x 2 and cuts to `size`."""
    return flow.repeat(2, axis=1).repeat(2, axis=2)[:, : size[0], : size[1]]


def _warp(image: np.ndarray, flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """image(p + flow(p)) by bilinear interpolation, edges repeated, and whether p + flow(p) is inside the frame."""
    batch, height, width = image.shape
    row = np.arange(height)[:, None] + flow[..., 0]
    column = np.arange(width) + flow[..., 1]
    inside = (row >= -0.5) & (row <= height - 0.5) & (column >= -0.5) & (column <= width - 0.5)
    row, column = np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)
    r, c = np.minimum(row.astype(int), height - 2), np.minimum(column.astype(int), width - 2)
    dr, dc = row - r, column - c
    b = np.arange(batch)[:, None, None]
    top = image[b, r, c] * (1 - dc) + image[b, r, c + 1] * dc
    bottom = image[b, r + 1, c] * (1 - dc) + image[b, r + 1, c + 1] * dc
    return top * (1 - dr) + bottom * dr, inside
