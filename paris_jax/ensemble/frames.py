"""Frames that a caller gives, to be kept: the first image, the last, or the beginning of a video."""

import collections
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax import checks
from paris_jax.data import video as video_io
from paris_jax.diffusion import masks
from paris_jax.encoders import codecs
from paris_jax.errors import Refused

logger = logging.getLogger(__name__)

FITS = ("crop", "letterbox")
Picture = Any  # a file, or (height, width, 3): uint8, or float in [-1, 1]


@dataclasses.dataclass(frozen=True)
class Given:
    """What `Ensemble.sample` is given besides prompts: each one for all samples, or a list with one for each.

    Attributes:
      image, last_image: the first and the last frame.
      video: what the video begins with: a file, or (frames, height, width, 3).
      video_frames: how many of its frames, its last ones, are kept; by default all.
      fit: what to do with another aspect: "crop" what is over, or "letterbox" with black bars.
    """

    image: Picture | Sequence[Picture] | None = None
    last_image: Picture | Sequence[Picture] | None = None
    video: Picture | Sequence[Picture] | None = None
    video_frames: int | None = None
    fit: str | None = None

    def __bool__(self) -> bool:
        return not (self.image is None and self.last_image is None and self.video is None)

    def check(self, told_otherwise: bool) -> None:
        """Refuses what says nothing, or two things at once."""
        if told_otherwise and self:
            raise Refused("kept and images or videos both say which frames are given; give one of them")
        if self.image is not None and self.video is not None:
            raise Refused("image and video both say how the video begins; give one of them")
        for name, value, needed in (
            ("video_frames", self.video_frames, self.video is not None),
            ("fit", self.fit, bool(self)),
        ):
            if value is not None and not needed:
                raise Refused(f"{name}={value}: there is {'no video' if name == 'video_frames' else 'nothing'} to keep")
        for problem in checks.choice("fit", self.fit or "crop", FITS):
            raise Refused(problem)

    def kept(
        self, codec: codecs.Codec, scale: codecs.LatentScale, shape: tuple[int, ...], count: int, fps: float
    ) -> jax.Array:
        """What the networks are told of these frames, (count, T, H, W, 1 + C), for latents of `shape` (T, H, W, C).

        Raises:
          Refused: a file that cannot be read, another aspect without `fit`, or more frames than there is room for.
        """
        T, H, W, _ = shape
        latent, mask = np.zeros((count, *shape), np.float32), np.zeros((count, T), bool)
        size = H * codec.height, W * codec.width
        one = codec.first or codec.time  # frames that make the first latent frame
        if one > 1 and not (self.image is None and self.last_image is None):
            logger.warning("an image stands still for %d frames, which this codec packs into one latent frame", one)
        for name, place in (("image", 0), ("last_image", T - 1)):
            for row, picture in enumerate(_each(name, getattr(self, name), count, 3)):
                image = self._fitted(_pixels(name, picture, 3), size, name)
                latent[row, place] = scale.normalise(codec.encode(np.stack([image] * one)))[0]
                mask[row, place] = True
        for row, beginning in enumerate(_each("video", self.video, count, 4)):
            frames = self._beginning(beginning, codec, T, fps)
            encoded = codec.encode(np.stack([self._fitted(frame, size, "video") for frame in frames]))
            latent[row, : len(encoded)] = scale.normalise(encoded)
            mask[row, : len(encoded)] = True
        if mask.all():
            raise Refused(f"All {T} latent frames are given, so there is none to make; give fewer, or raise frames")
        return masks.kept(jnp.asarray(latent), jnp.asarray(mask))

    def _beginning(self, given: Picture, codec: codecs.Codec, T: int, fps: float) -> np.ndarray:
        """The frames of a video that are kept, (F, h, w, 3) uint8: as many as make whole latent frames."""
        allowed = [codec.first + n * codec.time for n in range(not codec.first, T - codec.first)]
        most, length = max(allowed, default=0), 0
        if _is_path(given):  # no more of it is held than could be kept
            frames: Any = collections.deque(maxlen=most + 1)
            for frame in video_io.at_rate(given, fps):
                frames.append(frame)
                length += 1
        else:
            frames = _pixels("video", given, 4)
            length = len(frames)
        count = length if self.video_frames is None else self.video_frames
        if count not in allowed or count > length:
            found = f"video has {length} frames"
            told = found if self.video_frames is None else f"video_frames={count} where the {found}"
            there = [n for n in allowed if n <= length]
            near = f"{', '.join(map(str, there[:8]))}{', ...' if len(there) > 8 else ''}" if there else "more frames"
            raise Refused(f"{told}: the number of its last frames to keep must be one of {near}; give video_frames")
        return np.stack(list(frames)[len(frames) - count :])

    def _fitted(self, image: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
        """(h, w, 3) uint8 as (height, width, 3)."""
        if self.fit == "letterbox":
            return video_io.letterbox(image, *size)
        rows, columns = video_io.cover(image.shape[0], image.shape[1], *size)
        if self.fit is None and (rows, columns) != size:
            raise Refused(
                f"{name} is {image.shape[1]} x {image.shape[0]} and the video {size[1]} x {size[0]} (width x height): "
                "another aspect; give fit='crop' to cut what is over, 'letterbox' to add bars, or another size"
            )
        return video_io.fit(image, *size)


def _is_path(given: Any) -> bool:
    return not isinstance(given, np.ndarray | jax.Array)


def _each(name: str, given: Any, count: int, axes: int) -> list[Any]:
    """One of what is given for each of `count` samples; none where nothing is."""
    if given is None:
        return []
    several = isinstance(given, list | tuple) or (not _is_path(given) and given.ndim == axes + 1)
    found = list(given) if several else [given] * count
    if len(found) != count:
        raise Refused(f"{name} names {len(found)} for {count} prompts; give one for all, or one for each")
    return found


def _pixels(name: str, given: Any, axes: int) -> np.ndarray:
    """A picture (h, w, 3), or a video (F, h, w, 3), as uint8."""
    pixels = video_io.read_image(given) if _is_path(given) else np.asarray(given)
    if pixels.ndim != axes or pixels.shape[-1] != 3 or not pixels.size:
        wanted = "(height, width, 3)" if axes == 3 else "(frames, height, width, 3)"
        raise Refused(f"{name} has shape {pixels.shape}; must be {wanted}, or a file")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating) or not (np.abs(pixels) <= 1).all():
        raise Refused(f"{name} must be uint8, or floats from -1 to 1")
    return codecs.to_uint8(pixels)
