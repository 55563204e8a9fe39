"""Cuts decoded frames into clips at a fixed frame rate, in one pass over the video: end to end, sliding, by scene."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from paris_jax.data import video
from paris_jax.data.decoding.footage import Frame

STILL = 10.0  # seconds that a frame may stay; a longer gap is not part of the video


@dataclasses.dataclass(frozen=True)
class Window:
    """One clip's time span of a video.

    Attributes:
      number: of the clip in its video.
      frames: (T, H, W, 3) uint8; None where the span cannot be used.
      fault: why it cannot.
    """

    number: int
    frames: np.ndarray | None
    fault: str = ""


class Cutter:
    """Collects the frames that are displayed at the instants of clips.

    Args:
      num_frames: frames of a clip.
      fps: instants per second.
      stride: instants from the start of one clip to that of the next; fewer than num_frames make clips overlap.
      first: number of the first clip that is wanted.
      is_cut: called with each frame; whether a new scene starts with it. No clip then spans two scenes.
    """

    def __init__(
        self,
        num_frames: int,
        fps: float,
        stride: int = 0,
        first: int = 0,
        is_cut: Callable[[Frame], bool] | None = None,
    ):
        self.num_frames, self.fps, self.stride = num_frames, fps, stride or num_frames
        self.first, self.is_cut = first, is_cut
        self.number = first if is_cut is None else 0  # scenes are counted from the start of the video
        self.origin = 0.0  # seconds from which instants are counted
        self.instant = self.number * self.stride
        self.chosen: list[Frame] = []

    def cut(self, frames: Iterator[Frame], height: int, width: int) -> Iterator[Window]:
        """Yields the whole windows; frames are cropped to the centre.

        The last window may lack a thousandth of a second of its end.

        Raises:
          BadVideo: raised by `frames`, after the windows before.
        """
        shown: Frame | None = None
        for frame in frames:
            frame = frame._replace(image=video.crop(frame.image, height, width))
            if shown is not None:
                gap = frame.seconds - shown.seconds
                slack = 0.25 * min(gap, 1 / self.fps)  # for rounded times
                if gap > max(STILL, 2 * self.num_frames / self.fps):
                    yield Window(self.number, None, "has a gap between its frames")
                    self._skip_to(frame.seconds - slack)
                else:
                    yield from self._until(frame.seconds - slack, shown)
            if self.is_cut is not None and self.is_cut(frame):
                self.origin, self.instant, self.chosen = frame.seconds, 0, []
            shown = frame
        if shown is not None:
            end = shown.seconds + shown.duration + 1e-3 - 1 / self.fps  # of the last instant that is whole
            yield from self._until(end, shown, inclusive=True)

    def _until(self, seconds: float, shown: Frame, inclusive: bool = False) -> Iterator[Window]:
        """Gives all instants before a time to the frame that is on show."""
        while (now := self.origin + self.instant / self.fps) < seconds or (inclusive and now == seconds):
            self.instant += 1
            self.chosen.append(shown)
            if len(self.chosen) == self.num_frames:
                yield from self._window(self.chosen)
            if len(self.chosen) == max(self.num_frames, self.stride):
                self.chosen = self.chosen[self.stride :]

    def _window(self, frames: list[Frame]) -> Iterator[Window]:
        number = self.number
        self.number += 1
        if number < self.first:
            return
        if any(frame.damaged for frame in frames):
            yield Window(number, None, "has damaged frames")
        else:
            yield Window(number, np.stack([frame.image for frame in frames]))

    def _skip_to(self, seconds: float) -> None:
        """Goes on with the first whole window from a time on."""
        self.chosen = []
        windows = int(np.ceil(max(seconds - self.origin, 0.0) * self.fps / self.stride))
        self.number = windows if self.is_cut is None else self.number + 1
        self.instant = windows * self.stride
