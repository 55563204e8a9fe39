"""The clip: the item that every source of video yields."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Clip:
    """One captioned clip.

    Attributes:
      id: unique within its source, the same on every machine.
      video: (T, H, W, 3) uint8.
      fps: frames per second.
      caption: text that describes the video.
      attributes: ground-truth attributes of the video; {} if the source provides none.
    """

    id: str
    video: np.ndarray
    fps: float
    caption: str
    attributes: dict[str, str] = dataclasses.field(default_factory=dict)
