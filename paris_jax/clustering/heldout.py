"""The held-out split: hashes of the video's id decide it, before anything is learned from the clips.

All clips of one video are on one side. Held-out videos are for validation (settings are tuned on them) or for the test
(results are reported on them), never for both.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from paris_jax.data.sources.clip import video_of

TRAIN, VALIDATION, TEST = range(3)
SPLITS = ("train", "validation", "test")


def split(clip_ids: Iterable[str], heldout_fraction: float, validation_share: float, seed: int) -> np.ndarray:
    """Returns (N,) uint8, TRAIN, VALIDATION or TEST for each clip.

    The answer depends on the id of the clip's video and on the arguments, never on other clips: new clips move none, a
    larger fraction takes videos from training only, and no fraction moves one between validation and test.

    Args:
      clip_ids: N ids; clips of one video share the text before the last "#" (`data.sources.clip.video_of`).
      heldout_fraction: expected fraction of the videos that are not trained on.
      validation_share: expected share of those that are for validation.
      seed: of both draws.
    """
    return np.fromiter(
        (_split_of(video_of(clip_id), heldout_fraction, validation_share, seed) for clip_id in clip_ids), np.uint8
    )


def _split_of(video: str, heldout_fraction: float, validation_share: float, seed: int) -> int:
    if _draw("heldout", video, seed) >= heldout_fraction:
        return TRAIN
    return VALIDATION if _draw("validation", video, seed) < validation_share else TEST


def _draw(purpose: str, video: str, seed: int) -> float:
    """A number in [0, 1), uniform over videos, independent for each purpose."""
    digest = hashlib.sha256(f"{purpose}:{seed}:{video}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
