"""Cuts between scenes, found by PySceneDetect while a video is decoded."""

from typing import Any

import numpy as np

from paris_jax.data.decoding.footage import Frame
from paris_jax.errors import UserError


def check_installed() -> None:
    """Raises UserError where PySceneDetect is not installed."""
    try:
        import scenedetect.detectors  # noqa: F401
    except ImportError as error:
        raise UserError(
            "curation.scene_cuts=True needs PySceneDetect; pip install 'paris-jax[curation]', or leave it out"
        ) from error


class SceneCuts:
    """Called with one frame after another; tells whether a scene starts with it."""

    def __init__(self, threshold: float):
        from scenedetect.detectors import ContentDetector

        self.detector: Any = ContentDetector(threshold, min_scene_len=1)
        self.count = 0

    def __call__(self, frame: Frame) -> bool:
        from scenedetect import FrameTimecode

        # Frames are numbered, because their times are not those of a constant rate; BGR, as OpenCV has it.
        timecode = FrameTimecode(self.count, 25.0)
        self.count += 1
        return bool(self.detector.process_frame(timecode, np.ascontiguousarray(frame.image[:, :, ::-1])))
