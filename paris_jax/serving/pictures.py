"""Uploaded pictures: decoded by a process of their own, with limits of time and memory."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from paris_jax.config.sections import CurationSettings
from paris_jax.data.decoding import footage
from paris_jax.data.decoding.decoders import Decoders, Limits
from paris_jax.data.decoding.display import BadVideo
from paris_jax.data.sources.clip import OFF, Clip, Dropped
from paris_jax.errors import UserError

LIMITS = Limits(seconds=20.0, megabytes=1024)


@dataclasses.dataclass(frozen=True)
class Picture:
    """The bytes of a file that a browser sent; a `Video` of one clip of one frame, at its own size."""

    data: bytes
    id: str = "The picture"

    def clips(self, first: int = 0, curation: CurationSettings = OFF) -> Iterator[tuple[int, Clip | Dropped]]:
        if first:
            return
        try:
            image = footage.read_image(self.data, name=self.id)
        except BadVideo as bad:
            yield 0, Dropped(self.id, "decode", bad.reason, bad.detail)
        else:
            yield 0, Clip(self.id, image[None], 1.0, "")


def decode(data: bytes, decoders: Decoders) -> np.ndarray:
    """The picture (H, W, 3) uint8.

    Raises:
      UserError: it cannot be decoded, or not within the limits.
    """
    (found,) = list(decoders.clips([Picture(data)]))[:1]
    if isinstance(found, Dropped):
        raise UserError(f"The picture {found.reason}{f' ({found.detail})' if found.detail else ''}; choose another")
    return found.video[0]
