"""Cuts decoded frames into consecutive clips at a fixed frame rate, in one pass over the video."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from paris_jax.data import video
from paris_jax.data.footage import Frame

STILL = 10.0  # seconds that a frame may stay; what a longer gap covers is no video


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


def cut(
    frames: Iterator[Frame], num_frames: int, height: int, width: int, fps: float, first: int = 0
) -> Iterator[Window]:
    """Yields the whole windows of num_frames / fps seconds, end to end, from window `first` on.

    Each instant gets the frame that is displayed then; frames are cropped to the centre. The last window may lack a
    thousandth of a second of its end.

    Raises:
      BadVideo: raised by `frames`, after the windows before.
    """
    chosen: list[np.ndarray] = []
    number, damaged = first, False
    shown: Frame | None = None

    def instant() -> float:
        return (number * num_frames + len(chosen)) / fps

    def window() -> Window:
        nonlocal number, chosen, damaged
        done = Window(number, np.stack(chosen)) if not damaged else Window(number, None, "has damaged frames")
        number, chosen, damaged = number + 1, [], shown is not None and shown.damaged
        return done

    for frame in frames:
        frame = frame._replace(image=video.crop(frame.image, height, width))
        if shown is not None:
            slack = 0.25 * min(frame.seconds - shown.seconds, 1 / fps)  # for rounded times
            if frame.seconds - shown.seconds > max(STILL, 2 * num_frames / fps):
                yield Window(number, None, "has a gap between its frames")
                # The next whole window after the gap.
                number, chosen = int(np.ceil((frame.seconds - slack) * fps / num_frames)), []
                damaged = False
            while instant() < frame.seconds - slack:
                damaged |= shown.damaged
                chosen.append(shown.image)
                if len(chosen) == num_frames:
                    yield window()
        shown = frame
    if shown is None:
        return
    length = num_frames / fps
    whole = int((shown.seconds + shown.duration + 1e-3) / length)
    while number < whole:
        damaged |= shown.damaged
        chosen.append(shown.image)
        if len(chosen) == num_frames:
            yield window()
