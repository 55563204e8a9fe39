"""Conditioning of the sampler: encoded prompts, negative prompts and conditioning frames."""

import collections
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.config import checks
from paris_jax.data import video as video_io
from paris_jax.diffusion import cond_masks, guidance
from paris_jax.encoders import codecs, published
from paris_jax.encoders.words import TextEncoding
from paris_jax.ensemble.routing import Routing, weights
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
FITS = ("crop", "letterbox")
Image = Any  # a file, or (height, width, 3): uint8, or float in [-1, 1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Encoded prompts: tokens (B, L, X) padded at the end, length (B,) int32, pooled (B, P)."""

    tokens: jax.Array
    length: jax.Array
    pooled: jax.Array

    def padded(self, length: int) -> "EncodedText":
        """The same prompts with room for `length` tokens."""
        more = length - self.tokens.shape[1]
        return dataclasses.replace(self, tokens=jnp.pad(self.tokens, ((0, 0), (0, more), (0, 0))))


@dataclasses.dataclass(frozen=True)
class CondFrames:
    """What `Ensemble.sample` is given besides prompts: each one for all samples, or a list with one for each.

    Attributes:
      image, last_image: the first and the last frame.
      video: what the video begins with: a file, or (frames, height, width, 3).
      video_frames: how many of its frames, its last ones, are kept; by default all.
      fit: what to do with another aspect: "crop" what is over, or "letterbox" with black bars.
    """

    image: Image | Sequence[Image] | None = None
    last_image: Image | Sequence[Image] | None = None
    video: Image | Sequence[Image] | None = None
    video_frames: int | None = None
    fit: str | None = None

    def __bool__(self) -> bool:
        return not (self.image is None and self.last_image is None and self.video is None)

    def check(self, told_otherwise: bool) -> None:
        """Refuses what says nothing, or two things at once."""
        if told_otherwise and self:
            raise UserError("kept and images or videos both say which frames are given; give one of them")
        if self.image is not None and self.video is not None:
            raise UserError("image and video both say how the video begins; give one of them")
        for name, value, needed in (
            ("video_frames", self.video_frames, self.video is not None),
            ("fit", self.fit, bool(self)),
        ):
            if value is not None and not needed:
                raise UserError(
                    f"{name}={value}: there is {'no video' if name == 'video_frames' else 'nothing'} to keep"
                )
        for problem in checks.choice("fit", self.fit or "crop", FITS):
            raise UserError(problem)

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
            for row, picture in enumerate(_one_per_sample(name, getattr(self, name), count, 3)):
                image = self._fitted(_pixels(name, picture, 3), size, name)
                latent[row, place] = scale.normalise(codec.encode(np.stack([image] * one)))[0]
                mask[row, place] = True
        for row, beginning in enumerate(_one_per_sample("video", self.video, count, 4)):
            frames = self._beginning(beginning, codec, T, fps)
            encoded = codec.encode(np.stack([self._fitted(frame, size, "video") for frame in frames]))
            latent[row, : len(encoded)] = scale.normalise(encoded)
            mask[row, : len(encoded)] = True
        if mask.all():
            raise UserError(f"All {T} latent frames are given, so there is none to make; give fewer, or raise frames")
        return cond_masks.cond_input(jnp.asarray(latent), jnp.asarray(mask))

    def _beginning(self, given: Image, codec: codecs.Codec, T: int, fps: float) -> np.ndarray:
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
            raise UserError(f"{told}: the number of its last frames to keep must be one of {near}; give video_frames")
        return np.stack(list(frames)[len(frames) - count :])

    def _fitted(self, image: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
        """(h, w, 3) uint8 as (height, width, 3)."""
        if self.fit == "letterbox":
            return video_io.letterbox(image, *size)
        rows, columns = video_io.cover(image.shape[0], image.shape[1], *size)
        if self.fit is None and (rows, columns) != size:
            raise UserError(
                f"{name} is {image.shape[1]} x {image.shape[0]} and the video {size[1]} x {size[0]} (width x height): "
                "another aspect; give fit='crop' to cut what is over, 'letterbox' to add bars, or another size"
            )
        return video_io.fit(image, *size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """What a sample is told, and how strongly.

    Attributes:
      text: the prompts.
      negative: what guidance leads away from; empty prompts where nothing is said.
      kept: (B, T, H, W, 1 + C), frames that are given (`diffusion.masks`), or None.
      nothing: (B, P), the pooled vector of no text, which a router that reads nothing is told; None: zeros.
      strength: of guidance.
      temperature: () of the router's softmax: above 1 more even, towards 0 only the heaviest.
      present: (E,) bool, which experts there are; the others drop out of the softmax.
    """

    text: EncodedText
    negative: EncodedText
    strength: guidance.Strength
    kept: jax.Array | None = None
    temperature: jax.Array | float = 1.0
    present: jax.Array | bool = True
    nothing: jax.Array | None = None

    def weights(self, routing: Routing, logits_BE: jax.Array, forced: jax.Array) -> jax.Array:
        """Each expert's weight, (B, E), by a routing rule."""
        return weights(jnp.where(self.present, logits_BE / self.temperature, -jnp.inf), routing, forced)

    def branches(self, count: int) -> tuple[EncodedText, jax.Array | None]:
        """Text and frames of every row: the first `count` branches of each sample, (count B, ...).

        A sample's branches are its prompt and frames; what guidance leads away from, and the frames; that without them.
        """

        def rows(*branches: jax.Array) -> jax.Array:
            return jnp.stack(branches[:count], 1).reshape(-1, *branches[0].shape[1:])

        text = jax.tree.map(rows, self.text, self.negative, self.negative)
        return text, None if self.kept is None else rows(self.kept, self.kept, jnp.zeros_like(self.kept))


def _is_path(given: Any) -> bool:
    return not isinstance(given, np.ndarray | jax.Array)


def _one_per_sample(name: str, given: Any, count: int, axes: int) -> list[Any]:
    """One of what is given for each of `count` samples; none where nothing is."""
    if given is None:
        return []
    several = isinstance(given, list | tuple) or (not _is_path(given) and given.ndim == axes + 1)
    found = list(given) if several else [given] * count
    if len(found) != count:
        raise UserError(f"{name} names {len(found)} for {count} prompts; give one for all, or one for each")
    return found


def _pixels(name: str, given: Any, axes: int) -> np.ndarray:
    """A picture (h, w, 3), or a video (F, h, w, 3), as uint8."""
    pixels = video_io.read_image(given) if _is_path(given) else np.asarray(given)
    if pixels.ndim != axes or pixels.shape[-1] != 3 or not pixels.size:
        wanted = "(height, width, 3)" if axes == 3 else "(frames, height, width, 3)"
        raise UserError(f"{name} has shape {pixels.shape}; must be {wanted}, or a file")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating) or not (np.abs(pixels) <= 1).all():
        raise UserError(f"{name} must be uint8, or floats from -1 to 1")
    return codecs.to_uint8(pixels)


class PromptEncoder:
    """Encodes prompts; with `drop`, forgets published encoders as soon as they did their work, and remembers it."""

    def __init__(self, encoder: Any, trained_length: int, drop: bool):
        self._encoder, self._trained_length, self._drop = encoder, trained_length, drop
        self._known: dict[str, TextEncoding] = {}
        self._none: TextEncoding | None = None

    def expect(self, prompts: Iterable[str]) -> None:
        """Encodes at once what will be asked for one by one, so that dropped encoders are not read again."""
        if self._drop:
            self._encode([*prompts])

    def null(self, like: EncodedText) -> EncodedText:
        """As many prompts that say nothing, as training drops them, of the same lengths as other prompts."""
        B, L, _ = like.tokens.shape
        none = self._null()
        tokens = jnp.pad(jnp.asarray(none.tokens), ((0, max(L - len(none.tokens), 0)), (0, 0)))
        each = (tokens, jnp.int32(len(none.tokens)), jnp.asarray(none.pooled))
        return EncodedText(*(jnp.broadcast_to(one, (B, *one.shape)) for one in each))

    def __call__(self, prompts: Sequence[str]) -> EncodedText:
        """Encodes prompts, padded to the longest caption trained on, or longer ones to the most the encoder takes."""
        found = self._encode(list(prompts))
        longest = max(len(e.tokens) for e in found)
        length = self._trained_length if longest <= self._trained_length else self._encoder.max_tokens
        tokens = np.zeros((len(found), length, found[0].tokens.shape[1]), np.float32)
        for row, encoding in zip(tokens, found, strict=True):
            row[: len(encoding.tokens)] = encoding.tokens
        return EncodedText(
            jnp.asarray(tokens),
            jnp.asarray([len(e.tokens) for e in found], jnp.int32),
            jnp.asarray(np.stack([e.pooled for e in found]), jnp.float32),
        )

    def _encode(self, prompts: list[str]) -> list[TextEncoding]:
        if not self._drop:
            return self._encoder.encode(prompts)
        try:
            self._null()
            if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
                self._known |= zip(new, self._encoder.encode(new), strict=True)
        finally:
            published.drop("t5", "clip")
        return [self._known[prompt] for prompt in prompts]

    def _null(self) -> TextEncoding:
        none = self._none = self._none or self._encoder.null()
        return none
