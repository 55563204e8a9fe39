"""Conditioning of the sampler: encoded prompts, negative prompts and conditioning frames."""

import collections
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.config import checks
from paris_jax.config.sampling import Fit
from paris_jax.data import video as video_io
from paris_jax.data.decoding import footage
from paris_jax.diffusion import cond_masks, guidance
from paris_jax.encoders import codecs
from paris_jax.encoders.words import TextEncoding
from paris_jax.ensemble.routing import Routing, weights
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)

Image = Any  # a file, or (height, width, 3): uint8, or float in [-1, 1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncodedText:
    """Encoded prompts: tokens (B, L, X) padded at the end, length (B,) int32, pooled (B, P)."""

    tokens: jax.Array
    length: jax.Array
    pooled: jax.Array

    def pad_to(self, length: int) -> "EncodedText":
        """The same prompts, padded to `length` tokens."""
        more = length - self.tokens.shape[1]
        return dataclasses.replace(self, tokens=jnp.pad(self.tokens, ((0, 0), (0, more), (0, 0))))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """The conditioning of a batch, and the strength of its guidance.

    Attributes:
      text: the prompts.
      negative: the text that guidance leads away from: negative prompts, or the null embedding.
      strength: of guidance.
      cond: (B, T, H, W, 1 + C), conditioning frames (`diffusion.cond_masks`), or None.
      router_temperature: () of the router's softmax: above 1 more even, towards 0 the largest weight alone.
      present: (E,) bool, the experts that are used; the others drop out of the softmax.
      null_pooled: (B, P), pooled null embedding, for a router that does not see the prompt; None: zeros.
    """

    text: EncodedText
    negative: EncodedText
    strength: guidance.Strength
    cond: jax.Array | None = None
    router_temperature: jax.Array | float = 1.0
    present: jax.Array | bool = True
    null_pooled: jax.Array | None = None

    def weights(self, routing: Routing, logits_BE: jax.Array, fixed_expert: jax.Array) -> jax.Array:
        """Each expert's routing weight, (B, E), by a routing rule."""
        logits_BE = jnp.where(self.present, logits_BE / self.router_temperature, -jnp.inf)
        return weights(logits_BE, routing, fixed_expert)

    def branches(self, count: int) -> tuple[EncodedText, jax.Array | None]:
        """Text and frames of the first `count` guidance branches of each sample, (count B, ...).

        The branches: prompt and frames; negative prompt and frames; negative prompt without frames.
        """

        def interleave(*branches: jax.Array) -> jax.Array:
            return jnp.stack(branches[:count], 1).reshape(-1, *branches[0].shape[1:])

        text = jax.tree.map(interleave, self.text, self.negative, self.negative)
        return text, None if self.cond is None else interleave(self.cond, self.cond, jnp.zeros_like(self.cond))


class PromptEncoder:
    """Encodes prompts; with `unload`, drops the weights of published text encoders after use and caches encodings."""

    def __init__(self, encoder: Any, trained_length: int, unload: bool):
        """Encodes with `encoder`; prompts are padded to `trained_length`, the longest caption of the training data."""
        self._encoder, self._trained_length, self._unload = encoder, trained_length, unload
        self._cache: dict[str, TextEncoding] = {}
        self._null_encoding: TextEncoding | None = None

    def prefetch(self, prompts: Iterable[str]) -> None:
        """Encodes prompts in advance, so that weights that are dropped after use are read once."""
        if self._unload:
            self._encode([*prompts])

    def null(self, like: EncodedText) -> EncodedText:
        """The null embedding, as training's text dropout uses it, in the shapes of other encoded prompts."""
        B, L, _ = like.tokens.shape
        null = self._null()
        tokens = jnp.pad(jnp.asarray(null.tokens), ((0, max(L - len(null.tokens), 0)), (0, 0)))
        arrays = (tokens, jnp.int32(len(null.tokens)), jnp.asarray(null.pooled))
        return EncodedText(*(jnp.broadcast_to(array, (B, *array.shape)) for array in arrays))

    def __call__(self, prompts: Sequence[str]) -> EncodedText:
        """Encodes prompts, padded to the longest training caption, or longer ones to the encoder's maximum."""
        encodings = self._encode(list(prompts))
        longest = max(len(e.tokens) for e in encodings)
        length = self._trained_length if longest <= self._trained_length else self._encoder.max_tokens
        tokens = np.zeros((len(encodings), length, encodings[0].tokens.shape[1]), np.float32)
        for row, encoding in zip(tokens, encodings, strict=True):
            row[: len(encoding.tokens)] = encoding.tokens
        return EncodedText(
            jnp.asarray(tokens),
            jnp.asarray([len(e.tokens) for e in encodings], jnp.int32),
            jnp.asarray(np.stack([e.pooled for e in encodings]), jnp.float32),
        )

    def _encode(self, prompts: list[str]) -> list[TextEncoding]:
        if not self._unload:
            return self._encoder.encode(prompts)
        try:
            self._null()
            if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]:
                self._cache |= zip(new, self._encoder.encode(new), strict=True)
        finally:
            self._encoder.unload()
        return [self._cache[prompt] for prompt in prompts]

    def _null(self) -> TextEncoding:
        null = self._null_encoding = self._null_encoding or self._encoder.null()
        return null


@dataclasses.dataclass(frozen=True)
class CondFrames:
    """Conditioning frames of `Ensemble.sample`: each field once for all samples, or a list with one for each.

    Attributes:
      image, last_image: the first and the last frame.
      video: the beginning of the video: a file, or (frames, height, width, 3).
      num_cond_frames: the last frames of `video` to condition on; by default all.
      fit: for another aspect ratio: "crop", or "letterbox" with black bars.
    """

    image: Image | Sequence[Image] | None = None
    last_image: Image | Sequence[Image] | None = None
    video: Image | Sequence[Image] | None = None
    num_cond_frames: int | None = None
    fit: str | None = None

    def __bool__(self) -> bool:
        return not (self.image is None and self.last_image is None and self.video is None)

    def check(self, has_cond: bool) -> None:
        """Refuses fields that contradict each other, or (`has_cond`) an encoded `cond` beside them."""
        if has_cond and self:
            raise UserError("cond and images or videos both set the conditioning frames; give one of them")
        if self.image is not None and self.video is not None:
            raise UserError("image and video both set the first frame; give one of them")
        if self.num_cond_frames is not None and self.video is None:
            raise UserError(f"num_cond_frames={self.num_cond_frames}: there is no video to condition on; leave it out")
        if self.fit is not None and not self:
            raise UserError(f"fit={self.fit}: there is no conditioning frame to fit; leave it out")
        for problem in checks.choice("fit", self.fit or "crop", get_args(Fit)):
            raise UserError(problem)

    def encode(
        self, codec: codecs.Codec, scale: codecs.LatentScale, shape: tuple[int, ...], count: int, fps: float
    ) -> jax.Array:
        """The networks' conditioning input (count, T, H, W, 1 + C) for latents of `shape` (T, H, W, C).

        Raises:
          UserError: an unreadable file, another aspect ratio without `fit`, or more frames than the video has.
        """
        T, H, W, _ = shape
        latent, mask = np.zeros((count, *shape), np.float32), np.zeros((count, T), bool)
        size = H * codec.height, W * codec.width
        packed = codec.first or codec.time  # frames of the first latent frame
        if packed > 1 and not (self.image is None and self.last_image is None):
            logger.warning("this codec packs %d frames into one latent frame: an image is repeated for all", packed)
        for name, index in (("image", 0), ("last_image", T - 1)):
            for row, picture in enumerate(_one_per_sample(name, getattr(self, name), count, 3)):
                image = self._fit(_pixels(name, picture, 3), size, name)
                latent[row, index] = scale.normalise(codecs.encode_images(codec, image[None]))[0]
                mask[row, index] = True
        for row, beginning in enumerate(_one_per_sample("video", self.video, count, 4)):
            frames = self._last_frames(beginning, codec, T, fps)
            encoded = codec.encode(np.stack([self._fit(frame, size, "video") for frame in frames]))
            latent[row, : len(encoded)] = scale.normalise(encoded)
            mask[row, : len(encoded)] = True
        if mask.all():
            raise UserError(
                f"All {T} latent frames are conditioning frames, so none is left to sample; give fewer, or raise "
                "num_frames"
            )
        return cond_masks.cond_input(jnp.asarray(latent), jnp.asarray(mask))

    def _last_frames(self, video: Image, codec: codecs.Codec, T: int, fps: float) -> np.ndarray:
        """The last frames of a video to condition on, (F, h, w, 3) uint8, in whole latent frames."""
        allowed = [codec.first + n * codec.time for n in range(not codec.first, T - codec.first)]
        most, length = max(allowed, default=0), 0
        if _is_path(video):  # hold no more of a long video than can be used
            frames: Any = collections.deque(maxlen=most + 1)
            for frame in footage.at_rate(video, fps):
                frames.append(frame)
                length += 1
        else:
            frames = _pixels("video", video, 4)
            length = len(frames)
        count = length if self.num_cond_frames is None else self.num_cond_frames
        if count not in allowed or count > length:
            has = f"video has {length} frames"
            subject = has if self.num_cond_frames is None else f"num_cond_frames={count} where the {has}"
            possible = [n for n in allowed if n <= length]
            shown = f"{', '.join(map(str, possible[:8]))}{', ...' if len(possible) > 8 else ''}"
            raise UserError(
                f"{subject}: the number of its last frames to condition on must be one of "
                f"{shown if possible else 'more frames'}; give num_cond_frames"
            )
        return np.stack(list(frames)[len(frames) - count :])

    def _fit(self, image: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
        """(h, w, 3) uint8 as (height, width, 3)."""
        if self.fit == "letterbox":
            return video_io.letterbox(image, *size)
        rows, columns = video_io.cover(image.shape[0], image.shape[1], *size)
        if self.fit is None and (rows, columns) != size:
            raise UserError(
                f"{name} is {image.shape[1]} x {image.shape[0]} and the video {size[1]} x {size[0]} (width x height): "
                "another aspect ratio; give fit='crop' to crop it, 'letterbox' to add bars, or another size"
            )
        return video_io.fit(image, *size)


def _is_path(image: Any) -> bool:
    return not isinstance(image, np.ndarray | jax.Array)


def _one_per_sample(name: str, value: Any, count: int, axes: int) -> list[Any]:
    """One image (or video) for each of `count` samples; none where `value` is None."""
    if value is None:
        return []
    several = isinstance(value, list | tuple) or (not _is_path(value) and value.ndim == axes + 1)
    images = list(value) if several else [value] * count
    if len(images) != count:
        raise UserError(f"{name} names {len(images)} for {count} prompts; give one for all, or one for each")
    return images


def _pixels(name: str, image: Any, axes: int) -> np.ndarray:
    """A picture (h, w, 3), or a video (F, h, w, 3), as uint8."""
    pixels = footage.read_image(image) if _is_path(image) else np.asarray(image)
    if pixels.ndim != axes or pixels.shape[-1] != 3 or not pixels.size:
        expected = "(height, width, 3)" if axes == 3 else "(frames, height, width, 3)"
        raise UserError(f"{name} has shape {pixels.shape}; must be {expected}, or a file")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating) or not (np.abs(pixels) <= 1).all():
        raise UserError(f"{name} must be uint8, or floats from -1 to 1")
    return codecs.to_uint8(pixels)
