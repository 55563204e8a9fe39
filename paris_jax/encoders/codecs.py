"""Video to latent and back.

A codec has `encode`, `decode`, `latent_shape` and `describe`, whose JSON rebuilds it (`from_description`).
"""

import dataclasses
import os
import zlib
from typing import Any, ClassVar, NamedTuple, get_args

import jax
import msgspec
import numpy as np
from etils import epath

from paris_jax.artifacts.schemas import CodecDescription, HunyuanDescription, Latent, PixelsDescription
from paris_jax.config import checks
from paris_jax.config.experiment import Experiment
from paris_jax.config.sections import CodecName, Posterior
from paris_jax.encoders import hunyuan, placement
from paris_jax.encoders.published import EncoderStore, store_field
from paris_jax.errors import UserError
from paris_jax.weights.reading import read_config

# Fraction of a device's memory for encoding or decoding a video; accelerators also hold the networks.
MEMORY_FRACTION = {"cpu": 0.5, "gpu": 0.25, "tpu": 0.25}


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Packs blocks of time x height x width pixels into channels, without loss or training.

    Works on NumPy and JAX arrays alike, with any number of leading axes. A single frame is an image: it is repeated
    to fill one block of time.
    """

    time: int = 2
    height: int = 2
    width: int = 2

    scaled: ClassVar[bool] = False
    one_scale: ClassVar[bool] = True  # one mean and standard deviation normalises all channels
    first: ClassVar[int] = 0  # frames at the start that are encoded outside the blocks of `time`

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (T, H, W, C) of a video's latent.

        Raises:
          UserError: the blocks do not divide the size.
        """
        frames = self.time if frames == 1 else frames
        check_divisible(self, frames, height, width)
        channels = 3 * self.time * self.height * self.width
        return frames // self.time, height // self.height, width // self.width, channels

    def encode(self, video: Any) -> Any:
        """(..., T', H', W', 3) uint8, or float in [-1, 1], to (..., T, H, W, C) float32 in [-1, 1]."""
        x = to_float(video) if video.dtype == np.uint8 else video
        *lead, frames, height, width, _ = x.shape
        T, H, W, C = self.latent_shape(frames, height, width)
        n = len(lead)
        if frames == 1:
            x = x.repeat(self.time, axis=n)
        x = x.reshape(*lead, T, self.time, H, self.height, W, self.width, 3)
        x = x.transpose(*range(n), *(n + axis for axis in (0, 2, 4, 1, 3, 5, 6)))
        return x.reshape(*lead, T, H, W, C).astype(np.float32)

    def decode(self, latent: Any) -> Any:
        """(..., T, H, W, C) to video (..., T', H', W', 3) float32: the exact inverse of `encode`, not clipped."""
        *lead, T, H, W, _ = latent.shape
        n = len(lead)
        x = latent.reshape(*lead, T, H, W, self.time, self.height, self.width, 3)
        x = x.transpose(*range(n), *(n + axis for axis in (0, 3, 1, 4, 2, 5, 6)))
        return x.reshape(*lead, T * self.time, H * self.height, W * self.width, 3).astype(np.float32)

    def frames_of(self, mask_T: np.ndarray) -> np.ndarray:
        """Expands a mask of latent frames (..., T) to the frames of the video (..., T'), bool."""
        return mask_T.repeat(self.time, axis=-1)

    def describe(self) -> PixelsDescription:
        return PixelsDescription(self.time, self.height, self.width)


@dataclasses.dataclass(frozen=True)
class HunyuanVideo:
    """HunyuanVideo's causal VAE, the codec of Paris 2.0. Without the folder `weights` it only computes sizes.

    A latent is the mean of the VAE's posterior, or a sample of it whose noise depends on the video alone.
    Videos of more than 256 rows or columns, or of more frames than fit in memory, are coded in overlapping tiles
    (`hunyuan.Tiling`).
    """

    time: int = 4
    height: int = 8
    width: int = 8
    weights: str = ""
    sha256: str = ""  # of the weights; "": any
    posterior: Posterior = "mean"
    store: EncoderStore = store_field()

    scaled: ClassVar[bool] = True  # latents already have about unit spread, as published networks expect
    one_scale: ClassVar[bool] = True
    first: ClassVar[int] = 1  # causal: the first frame becomes a latent frame of its own

    @property
    def channels(self) -> int:
        """Channels of the latent: 16, unless the weights' config.json differs."""
        folder = self.weights and epath.Path(self.weights).is_dir()
        return read_config(self.weights, hunyuan.VAESizes).latent_channels if folder else 16

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns (T, H, W, C), T = 1 + (frames - 1) / 4; refuses sizes that the blocks do not divide."""
        check_divisible(self, frames, height, width)
        T = self.first + (frames - self.first) // self.time
        return T, height // self.height, width // self.width, self.channels

    def encode(self, video: Any) -> np.ndarray:
        """(..., T', H', W', 3) uint8, or float in [-1, 1], to (..., T, H, W, C) float32 of about unit spread."""
        self.latent_shape(*video.shape[-4:-1])
        moments = self._run(hunyuan.encode_tiled, hunyuan.encode, np.asarray(video))
        latent, log_variance = np.split(moments, 2, axis=-1)
        if self.posterior == "sample":
            std = np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))
            flat = _floats(np.asarray(video)).reshape(-1, *video.shape[-4:])
            noise = [np.random.default_rng(zlib.crc32(v.tobytes())).standard_normal(latent.shape[-4:]) for v in flat]
            latent = latent + std * np.asarray(noise, np.float32).reshape(latent.shape)
        return hunyuan.SCALE * latent

    def decode(self, latent: Any) -> np.ndarray:
        """(..., T, H, W, C) to video (..., T', H', W', 3) float32, not clipped."""
        return self._run(hunyuan.decode_tiled, hunyuan.decode, np.asarray(latent, np.float32) / hunyuan.SCALE)

    def _run(self, tiled: Any, function: Any, x: np.ndarray) -> np.ndarray:
        """Codes one video at a time on each device of this machine."""
        vae, params = self.store.load("hunyuan", self.weights, self.sha256)
        memory = MEMORY_FRACTION[jax.default_backend()] * placement.memory()
        tiling = hunyuan.Tiling.within(memory, placement.dtype())

        def run(piece: np.ndarray) -> np.ndarray:
            return np.asarray(function(vae, params, *placement.rows(piece), placement.dtype()))[: len(piece)]

        flat, each = x.reshape(-1, *x.shape[-4:]), placement.mesh().size
        made = np.concatenate([tiled(run, _floats(flat[i : i + each]), tiling) for i in range(0, len(flat), each)])
        return made.reshape(*x.shape[:-4], *made.shape[1:])

    def frames_of(self, mask_T: np.ndarray) -> np.ndarray:
        """Expands a mask of latent frames (..., T) to the frames of the video (..., T'), bool."""
        return np.concatenate([mask_T[..., :1], mask_T[..., 1:].repeat(self.time, axis=-1)], axis=-1)

    def describe(self) -> HunyuanDescription:
        return HunyuanDescription(self.time, self.height, self.width, self.sha256, self.posterior)


def _floats(x: np.ndarray) -> np.ndarray:
    """float32; uint8 as [-1, 1]."""
    return np.asarray(to_float(x) if x.dtype == np.uint8 else x, np.float32)


def check_divisible(blocks: "Codec", frames: int, height: int, width: int) -> None:
    """Raises UserError if a codec's blocks do not divide a video's size."""
    for axis, size, first, block in (
        ("frames", frames, blocks.first, blocks.time),
        ("height", height, 0, blocks.height),
        ("width", width, 0, blocks.width),
    ):
        if (size - first) % block:
            more = f"{first} more than " if first else ""
            raise UserError(f"{axis}={size}: must be {more}a multiple of the codec's {block}")


Codec = Pixels | HunyuanVideo


def codec(
    name: str,
    weights: str = "",
    sha256: str = "",
    posterior: Posterior = "mean",
    store: EncoderStore | None = None,
    **blocks: Any,
) -> Codec:
    """Returns the codec of this name, e.g. codec("pixels", time=2, height=2, width=2), ready to run.

    Raises:
      UserError: an unknown name, or weights that are missing or do not match `sha256`.
    """
    for problem in checks.choice("codec", name, get_args(CodecName)):
        raise UserError(problem)
    if name == "pixels":
        return Pixels(**blocks)
    store = store or EncoderStore()
    sha256 = store.check("codec.weights", weights, sha256)
    return HunyuanVideo(**blocks, weights=weights, sha256=sha256, posterior=posterior, store=store)


def sizes(name: str, weights: str = "", posterior: Posterior = "mean", **blocks: Any) -> Codec:
    """Returns a codec for its `latent_shape`; its weights are not needed."""
    return Pixels(**blocks) if name == "pixels" else HunyuanVideo(**blocks, weights=weights)


def latent_shape(experiment: Experiment) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the latent of an experiment's clips."""
    data = experiment.data
    return sizes(**dataclasses.asdict(experiment.codec)).latent_shape(data.num_frames, data.height, data.width)


def encode_images(codec: Codec, images: np.ndarray) -> np.ndarray:
    """Images (N, height, width, 3) uint8 as latent frames (N, H, W, C) float32, as sampling encodes an image.

    A codec that packs several frames into its first latent frame gets each image repeated as often.
    """
    packed = codec.first or codec.time
    return codec.encode(np.repeat(images[:, None], packed, axis=1))[:, 0]


def from_description(description: CodecDescription, folder: str = "", store: EncoderStore | None = None) -> Codec:
    """Rebuilds a codec from its `describe()`; published weights are read from `folder` or PARIS_JAX_VAE."""
    there = folder or os.environ.get("PARIS_JAX_VAE", "")
    named = {"weights": there, "store": store} if isinstance(description, HunyuanDescription) else {}
    return codec(**msgspec.to_builtins(description), **named)


def to_float(video: Any) -> Any:
    """uint8 to float32 in [-1, 1]."""
    return video.astype(np.float32) / 127.5 - 1.0


def to_uint8(video: Any) -> np.ndarray:
    """Float in [-1, 1] (clipped) to uint8."""
    return np.round((np.clip(np.asarray(video), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class LatentScale:
    """Mean and standard deviation of the latents of a data set, of all channels (length 1) or per channel.

    The networks see (latent - mean) / spread.
    """

    mean: tuple[float, ...]
    spread: tuple[float, ...]

    @classmethod
    def from_manifest(cls, latent: Latent) -> "LatentScale":
        """The scale in the `latent` entry of a manifest."""
        return cls(latent.mean, latent.spread)

    @property
    def normaliser(self) -> "Normaliser":
        return Normaliser(np.asarray(self.mean, np.float32), np.asarray([1 / s for s in self.spread], np.float32))

    def normalise(self, latent: Any) -> Any:
        """(..., C) of any float type, a NumPy or JAX array, to float32 of about zero mean and unit spread."""
        return self.normaliser(latent)

    def denormalise(self, normal: Any) -> Any:
        return normal * np.asarray(self.spread, np.float32) + np.asarray(self.mean, np.float32)


class Normaliser(NamedTuple):
    """A `LatentScale` as arrays (1,) or (C,) float32, which may be inputs of a compiled program."""

    mean: Any
    inverse_spread: Any

    def __call__(self, latent: Any) -> Any:
        return (latent.astype(np.float32) - self.mean) * self.inverse_spread


UNIT_SCALE = LatentScale((0.0,), (1.0,))
