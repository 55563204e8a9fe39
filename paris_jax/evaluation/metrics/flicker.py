"""Temporal flicker: how much a video changes where nothing moves."""

import numpy as np

from paris_jax.evaluation.metrics.motion import optical_flow

STILL = 0.5  # pixels of flow per frame, below which a pixel counts as still: our choice


def temporal_flicker(videos: np.ndarray, levels: int = 2) -> np.ndarray:
    """Mean absolute change between neighbouring frames of the pixels that do not move.

    VBench's "temporal flickering" takes the mean change of all pixels of videos that are known to be still; here, still
    pixels are found by optical flow, so that moving videos have a score, too. Lower is steadier, and the value of real
    clips is the one to reach. The numbers compare only with each other.

    Args:
      videos: (N, T, H, W, 3) float in [-1, 1].
      levels: see `mean_motion`.
    Returns:
      (N,) float64 in gray levels of 0 to 255; zero for a single frame, or where every pixel moves.
    """
    if videos.ndim != 5 or videos.shape[-1] != 3:
        raise ValueError(f"videos has shape {videos.shape}: must be (N, T, H, W, 3)")
    if videos.shape[1] == 1:
        return np.zeros(len(videos))
    return np.array([_flicker(video, levels) for video in videos])


def _flicker(video: np.ndarray, levels: int) -> float:
    change = np.abs(video[1:].astype(np.float64) - video[:-1]).mean(-1) * 127.5
    still = np.linalg.norm(optical_flow(video[:-1], video[1:], levels), axis=-1) < STILL
    return float(change[still].mean()) if still.any() else 0.0
