"""Features for clustering: a fixed descriptor of appearance and motion, without trained weights."""

import dataclasses
from typing import Any, get_args

import numpy as np

from paris_jax.config.sections import FeaturesName
from paris_jax.errors import UserError, nearest

THUMBNAIL = 4  # cells along each side
BINS = 8  # of each colour channel's histogram
ANGLES = 8  # orientations of edges


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Thumbnail, colour histogram, edge orientations and temporal change, scaled to equal weight.

    Our own choice, for the embedded data and for machines without an accelerator. It uses no labels.
    """

    def __call__(self, videos: np.ndarray) -> np.ndarray:
        """Describes clips.

        Args:
          videos: (B, T, H, W, 3) uint8, at least 4 x 4 pixels.

        Returns:
          (B, F) float32, about unit length in each of the four blocks.
        """
        return np.stack([self._describe(video) for video in videos])

    def _describe(self, video: np.ndarray) -> np.ndarray:
        video = video.astype(np.float32) / 255.0
        thumbnail = _cells(video.mean(0)).ravel()
        blocks = [
            (thumbnail - 0.5) * 2 / np.sqrt(thumbnail.size),
            np.concatenate([np.sqrt(_histogram(video[..., c])) for c in range(3)]) / np.sqrt(3),
            np.sqrt(_edges(video.mean(-1))),
            np.sqrt(_cells(_change(video)).ravel() / THUMBNAIL**2),
        ]
        return np.concatenate(blocks).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {"name": "statistics"}


def _cells(image: np.ndarray) -> np.ndarray:
    """Averages (H, W, ...) over a THUMBNAIL x THUMBNAIL grid."""
    for axis in (0, 1):
        edges = np.linspace(0, image.shape[axis], THUMBNAIL + 1).round().astype(int)
        sums = np.add.reduceat(image, edges[:-1], axis=axis)
        shape = [1] * image.ndim
        shape[axis] = THUMBNAIL
        image = sums / np.diff(edges).reshape(shape)
    return image


def _histogram(values: np.ndarray) -> np.ndarray:
    """Returns the histogram (BINS,) of values in [0, 1], as fractions."""
    place = np.minimum((values * BINS).astype(np.intp), BINS - 1)
    return np.bincount(place.ravel(), minlength=BINS) / place.size


def _edges(grey: np.ndarray) -> np.ndarray:
    """Returns the mean strength of edges in (T, H, W) by orientation, (ANGLES,)."""
    down = grey[:, 1:, :-1] - grey[:, :-1, :-1]
    right = grey[:, :-1, 1:] - grey[:, :-1, :-1]
    angle = np.arctan2(down, right) % np.pi
    place = np.minimum((angle * (ANGLES / np.pi)).astype(np.intp), ANGLES - 1)
    return np.bincount(place.ravel(), np.hypot(down, right).ravel(), minlength=ANGLES) / place.size


def _change(video: np.ndarray) -> np.ndarray:
    """Returns the mean change (H, W) from frame to frame of (T, H, W, 3); 0 where there is only one frame."""
    if len(video) < 2:
        return np.zeros(video.shape[1:3], np.float32)
    return np.abs(np.diff(video, axis=0)).mean((0, -1))


def features(name: str, weights: str = "", store: Any = None) -> Any:
    """Returns the feature encoder of this name; `dinov2` from the folder `weights`."""
    if name == "dinov2":
        from paris_jax.encoders.published import Dinov2, EncoderStore

        return Dinov2(weights, store=store or EncoderStore())
    if name != "statistics":
        known = get_args(FeaturesName)
        raise UserError(f"features {name!r}: must be one of {', '.join(known)}{nearest(name, known)}")
    return Statistics()
