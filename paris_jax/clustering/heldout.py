"""The held-out split: a hash of the clip id decides it, before anything is learned from the clips."""

import hashlib
from collections.abc import Sequence

import numpy as np


def is_heldout(clip_ids: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """Returns (N,) bool: True for about `fraction` of the clips.

    A clip's answer depends on its id, the fraction and the seed, never on the other clips: adding clips moves none, and
    a larger fraction only adds.
    """
    return np.array([_draw(clip_id, seed) < fraction for clip_id in clip_ids], bool)


def _draw(clip_id: str, seed: int) -> float:
    """A number in [0, 1), uniform over clip ids."""
    digest = hashlib.sha256(f"heldout:{seed}:{clip_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
