"""The values that sources of video yield: captioned clips, videos to cut into clips, and dropped ones of both."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from paris_jax.config.sections import CurationSettings

OFF = CurationSettings()  # clips end to end, all of them
STAGES = ("list", "read", "decode", "caption", "encode", "curate")
_NUMBER = re.compile(r"#[0-9]+(#flipped)?\Z")  # and of its mirror image


@dataclasses.dataclass(frozen=True)
class Clip:
    """One captioned clip.

    Attributes:
      id: unique within its source, the same on every machine; "VIDEO#0003" for one of several clips of a video.
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


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A clip, a video or a line of a caption table that is not used.

    Attributes:
      id: of the clip or video; the place of a line.
      stage: one of STAGES; "curate" is a choice of the config, the others are faults.
      reason: the kind of fault, the same words for all of a kind.
      detail: the finding in this one.
    """

    id: str
    stage: str
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.id} {self.reason}{f' ({self.detail})' if self.detail else ''}"


class Video(Protocol):
    """A video that is not decoded yet; picklable, because a worker process decodes it."""

    @property
    def id(self) -> str: ...

    def clips(self, first: int = 0, curation: CurationSettings = OFF) -> Iterator[tuple[int, Clip | Dropped]]:
        """Decodes the clips in order, each with its number in the video, from number `first` on.

        `curation` says how they are cut; `data.curation` applies the rest of it.
        """
        ...


def video_of(clip_id: str) -> str:
    """Returns the id of the video that a clip was cut from: the clip's id without its number, "#0003"."""
    return _NUMBER.sub("", clip_id)
