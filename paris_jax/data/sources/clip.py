"""A clip: the item that every source of video yields."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Clip:
    """One captioned video cut.

    Attributes:
      id: unique within its source, the same on every machine.
      video: (T, H, W, 3) uint8.
      fps: frames a second.
      caption: what is seen, in words.
      attributes: what is truly in it, where the source knows; {} otherwise.
    """

    id: str
    video: np.ndarray
    fps: float
    caption: str
    attributes: dict[str, str] = dataclasses.field(default_factory=dict)
