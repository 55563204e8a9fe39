"""HunyuanVideo's causal 3D VAE (arXiv 2412.03603, section 4.1), the codec of Open-Sora 2.0 and Paris 2.0.

4 x 8 x 8 pixels make a latent of 16 channels; the first frame is a latent frame of its own, and no frame sees a later
one except through the statistics of its group norms. Arrays are (B, T, H, W, C).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from msgspec import Struct

from paris_jax.artifacts.schemas import Size
from paris_jax.artifacts.tensors import Tensors
from paris_jax.encoders.transformer import Params, dense
from paris_jax.weights.reading import Reader, read_config

SCALE = 0.476986  # latents times this have unit spread on the VAE's training data
STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))  # of the stages of encoder and decoder, in this order
PREFIX = "vae."  # of the names in the original file


@dataclasses.dataclass(frozen=True)
class VAE:
    """Sizes of a VAE that the tensors do not show."""

    groups: int  # of the group norms


class VAESizes(Struct):
    """Fields of HunyuanVideo's config.json."""

    norm_num_groups: Size = 32
    latent_channels: Size = 16


def read(folder: epath.PathLike) -> tuple[VAE, Params]:
    """A VAE from a folder with config.json and safetensors, in diffusers' names or the original ones, or from a file.

    A file alone (Open-Sora 2.0's hunyuan_vae.safetensors) has the published norms.

    Raises:
      UserError: names missing, extra or misshapen tensors; non-finite values raise it when they are read.
    """
    sizes = read_config(folder, VAESizes) if epath.Path(folder).is_dir() else VAESizes()
    reader = Reader(Tensors(folder))
    root = PREFIX if reader.has(f"{PREFIX}quant_conv.weight") else ""
    C = (reader.shape(f"{root}post_quant_conv.weight") or (16,))[0]
    params = {
        "encoder": _half(reader, f"{root}encoder", "down", 3),
        "decoder": _half(reader, f"{root}decoder", "up", C),
        "quant": _conv(reader, f"{root}quant_conv", 2 * C, 2 * C, 1),
        "post_quant": _conv(reader, f"{root}post_quant_conv", C, C, 1),
    }
    reader.done()
    return VAE(sizes.norm_num_groups), params


def _conv(reader: Reader, name: str, outputs: int, inputs: int, size: int = 3) -> Params:
    """Reads a convolution with its kernel as (t, h, w, inputs, outputs)."""
    weights = reader.layer(name, outputs, inputs, size, size, size)
    return weights | {"weight": weights["weight"].transpose(2, 3, 4, 1, 0)}


def _resnet(reader: Reader, name: str) -> Params:
    outputs, inputs = (reader.shape(f"{name}.conv1.conv.weight") or (1, 1))[:2]
    block = {
        "norm1": reader.layer(f"{name}.norm1", inputs),
        "conv1": _conv(reader, f"{name}.conv1.conv", outputs, inputs),
        "norm2": reader.layer(f"{name}.norm2", outputs),
        "conv2": _conv(reader, f"{name}.conv2.conv", outputs, outputs),
    }
    if inputs != outputs:
        block["shortcut"] = _conv(reader, f"{name}.conv_shortcut.conv", outputs, inputs, 1)
    return block


def _half(reader: Reader, root: str, way: str, inputs: int) -> Params:
    """Reads the encoder ("down") or decoder ("up"): input convolution, stages, middle, norm, output convolution."""
    stages = []
    for i in range(max(reader.count(f"{root}.{way}_blocks."), 1)):
        name = f"{root}.{way}_blocks.{i}"
        stage: Params = {
            "resnets": [_resnet(reader, f"{name}.resnets.{j}") for j in range(reader.count(f"{name}.resnets."))]
        }
        if i < len(STRIDES):
            width = (reader.shape(f"{name}.{way}samplers.0.conv.conv.weight") or (1,))[0]
            stage["sample"] = _conv(reader, f"{name}.{way}samplers.0.conv.conv", width, width)
        stages.append(stage)
    first = (reader.shape(f"{root}.conv_in.conv.weight") or (1,))[0]
    last, before = (reader.shape(f"{root}.conv_out.conv.weight") or (1, 1))[:2]
    attention = f"{root}.mid_block.attentions.0"
    D = (reader.shape(f"{attention}.to_q.weight") or (1,))[0]
    theirs = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    return {
        "in": _conv(reader, f"{root}.conv_in.conv", first, inputs),
        "stages": stages,
        "middle": [_resnet(reader, f"{root}.mid_block.resnets.{j}") for j in range(2)],
        "attention": {ours: reader.layer(f"{attention}.{name}", D, D) for ours, name in theirs.items()}
        | {"norm": reader.layer(f"{attention}.group_norm", D)},
        "norm": reader.layer(f"{root}.conv_norm_out", before),
        "out": _conv(reader, f"{root}.conv_out.conv", last, before),
    }


# The network.


def convolve(weights: Params, x: jax.Array, stride: Sequence[int] = (1, 1, 1)) -> jax.Array:
    """Causal 3D convolution. Padding repeats the edges, in time before the first frame only."""
    size = weights["weight"].shape[0]
    if size > 1:
        side = (size // 2, size // 2)
        x = jnp.pad(x, ((0, 0), (size - 1, 0), side, side, (0, 0)), mode="edge")
    axes = ("NDHWC", "DHWIO", "NDHWC")
    y = jax.lax.conv_general_dilated(x, weights["weight"].astype(x.dtype), stride, "VALID", dimension_numbers=axes)
    return y + weights["bias"].astype(x.dtype)


def group_norm(vae: VAE, weights: Params, x: jax.Array) -> jax.Array:
    """GroupNorm over the channels, frames, rows and columns of each group, in float32, eps 1e-6."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], vae.groups, -1)
    axes = (1, 2, 3, 5)
    wide = wide - wide.mean(axes, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axes, keepdims=True) + 1e-6)
    return (wide.reshape(x.shape) * weights["weight"] + weights["bias"]).astype(x.dtype)


def _block(vae: VAE, weights: Params, x: jax.Array) -> jax.Array:
    y = convolve(weights["conv1"], jax.nn.silu(group_norm(vae, weights["norm1"], x)))
    y = convolve(weights["conv2"], jax.nn.silu(group_norm(vae, weights["norm2"], y)))
    return y + (convolve(weights["shortcut"], x) if "shortcut" in weights else x)


def _attend(vae: VAE, weights: Params, x: jax.Array) -> jax.Array:
    """Causal attention with one head over this and earlier frames; a loop over frames bounds the logits."""
    B, T, H, W, C = x.shape
    flat = group_norm(vae, weights["norm"], x).reshape(B, T, H * W, C)
    q, k, v = (dense(weights[name], flat) for name in ("q", "k", "v"))
    k, v = (a.reshape(B, T * H * W, C) for a in (k, v))
    frame = jnp.repeat(jnp.arange(T), H * W)

    def of_frame(t: jax.Array) -> jax.Array:
        logits = jnp.einsum("bnc,bmc->bnm", q[:, t], k, preferred_element_type=jnp.float32) * C**-0.5
        weight = jax.nn.softmax(jnp.where(frame <= t, logits, -jnp.inf)).astype(x.dtype)
        return weight @ v

    mixed = jnp.moveaxis(jax.lax.map(of_frame, jnp.arange(T)), 0, 1)
    return x + dense(weights["out"], mixed).reshape(x.shape)


def _middle(vae: VAE, weights: Params, x: jax.Array) -> jax.Array:
    x = _attend(vae, weights["attention"], _block(vae, weights["middle"][0], x))
    return _block(vae, weights["middle"][1], x)


def _enlarged(x: jax.Array, factor: Sequence[int]) -> jax.Array:
    """Nearest-neighbour upsampling; in time, the first frame is not repeated."""
    time, height, width = factor
    x = x.repeat(height, axis=2).repeat(width, axis=3)
    return jnp.concatenate([x[:, :1], x[:, 1:].repeat(time, axis=1)], axis=1)


def _encoder(vae: VAE, weights: Params, x: jax.Array) -> jax.Array:
    x = convolve(weights["in"], x)
    for stage, stride in zip(weights["stages"], (*STRIDES, None), strict=True):
        for block in stage["resnets"]:
            x = _block(vae, block, x)
        x = convolve(stage["sample"], x, stride) if stride else x
    return convolve(weights["out"], jax.nn.silu(group_norm(vae, weights["norm"], _middle(vae, weights, x))))


def _decoder(vae: VAE, weights: Params, x: jax.Array) -> jax.Array:
    x = _middle(vae, weights, convolve(weights["in"], x))
    for stage, factor in zip(weights["stages"], (*STRIDES, None), strict=True):
        for block in stage["resnets"]:
            x = _block(vae, block, x)
        x = convolve(stage["sample"], _enlarged(x, factor)) if factor else x
    return convolve(weights["out"], jax.nn.silu(group_norm(vae, weights["norm"], x)))


@functools.partial(jax.jit, static_argnames=("vae", "dtype"))
def encode(vae: VAE, params: Params, video: jax.Array, dtype: str = "float32") -> jax.Array:
    """Mean and log variance of a video's latent.

    Args:
      video: (B, 4 n + 1, 8 h, 8 w, 3) in [-1, 1].

    Returns:
      (B, n + 1, h, w, 2 C) float32, not scaled: C means, then C log variances.
    """
    return convolve(params["quant"], _encoder(vae, params["encoder"], video.astype(dtype))).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("vae", "dtype"))
def decode(vae: VAE, params: Params, latent: jax.Array, dtype: str = "float32") -> jax.Array:
    """Decodes latents, not scaled, to video float32, not clipped."""
    x = convolve(params["post_quant"], latent.astype(dtype))
    return _decoder(vae, params["decoder"], x).astype(jnp.float32)


# Larger videos: overlapping tiles, coded one by one and blended.


# Bytes of temporary memory per pixel of a decoded video, as compiled for an H100.
BYTES_PER_PIXEL = {"bfloat16": 1900, "float32": 3800}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of tiles in latent frames, rows and columns, and the overlap of neighbours."""

    frames: int = 5
    side: int = 32
    shared_frames: int = 1
    shared: int = 8

    @classmethod
    def within(cls, memory: float, dtype: str) -> "Tiling":
        """The tiling with the most frames that decodes within `memory` bytes.

        Open-Sora 2.0 tiles rows and columns above 256 pixels, and never time: decoded without its earlier frames, a
        tile is 3 to 7 % off.
        """
        pixels = memory / BYTES_PER_PIXEL[dtype] / (8 * cls.side) ** 2
        return cls(frames=max(cls.frames, int(pixels) // 4))


Coder = Callable[[np.ndarray], Any]  # maps a tile to its result, both (B, T, H, W, C)


def encode_tiled(run: Coder, video: np.ndarray, tiling: Tiling) -> np.ndarray:
    """`encode` tile by tile."""
    T, H, W = 1 + (video.shape[1] - 1) // 4, video.shape[2] // 8, video.shape[3] // 8
    if tiling.frames >= T and max(H, W) <= tiling.side:
        return np.asarray(run(video))
    out = _Blend((video.shape[0], T, H, W))
    for t, rows, columns in _pieces(T, H, W, tiling):
        # A tile starts one latent frame early: its first frame is encoded as a video's first.
        start = max(4 * t.start - 4, 0) if t.start else 0
        piece = video[:, start : 4 * t.stop - 3, 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop]
        made = np.asarray(run(piece))
        out.add(made[:, made.shape[1] - (t.stop - t.start) :], (t, rows, columns), (T, H, W), tiling)
    return out.result()


def decode_tiled(run: Coder, latent: np.ndarray, tiling: Tiling) -> np.ndarray:
    """`decode` tile by tile."""
    B, T, H, W, _ = latent.shape
    if tiling.frames >= T and max(H, W) <= tiling.side:
        return np.asarray(run(latent))
    whole, pixels = (4 * T - 3, 8 * H, 8 * W), Tiling(0, 0, 4 * tiling.shared_frames, 8 * tiling.shared)
    out = _Blend((B, *whole))
    for t, rows, columns in _pieces(T, H, W, tiling):
        first = max(t.start - 1, 0)
        made = np.asarray(run(latent[:, first : t.stop, rows, columns]))
        frames = slice(4 * t.start - 3 if t.start else 0, 4 * t.stop - 3)
        place = frames, *(slice(8 * s.start, 8 * s.stop) for s in (rows, columns))
        out.add(made[:, made.shape[1] - (frames.stop - frames.start) :], place, whole, pixels)
    return out.result()


def _pieces(T: int, H: int, W: int, tiling: Tiling) -> list[tuple[slice, slice, slice]]:
    axes = _cuts(T, tiling.frames, tiling.shared_frames), *(_cuts(n, tiling.side, tiling.shared) for n in (H, W))
    return [(t, rows, columns) for t in axes[0] for rows in axes[1] for columns in axes[2]]


def _cuts(length: int, size: int, shared: int) -> list[slice]:
    """Slices of at most `size` that cover `length` and overlap by `shared`, the last possibly by more."""
    starts = [*range(0, max(length - size, 0), size - shared), max(length - size, 0)]
    return [slice(start, min(start + size, length)) for start in starts]


class _Blend:
    """A weighted mean of tiles, whose weights ramp linearly where they overlap."""

    def __init__(self, shape: tuple[int, int, int, int]):
        self._shape, self._weight = shape, np.zeros((1, *shape[1:], 1), np.float32)
        self._sum: np.ndarray | None = None

    def add(self, piece: np.ndarray, place: tuple[slice, ...], whole: tuple[int, ...], tiling: Tiling) -> None:
        if self._sum is None:
            self._sum = np.zeros((*self._shape, piece.shape[-1]), np.float32)
        weight = np.ones((1, 1, 1, 1, 1), np.float32)
        shares = (tiling.shared_frames, tiling.shared, tiling.shared)
        for axis, (cut, length, shared) in enumerate(zip(place, whole, shares, strict=True), 1):
            n, ramp = cut.stop - cut.start, np.ones(cut.stop - cut.start, np.float32)
            rise = (np.arange(min(shared, n)) + 1) / (shared + 1)
            if cut.start:
                ramp[: len(rise)] = rise
            if cut.stop < length:
                ramp[n - len(rise) :] = np.minimum(ramp[n - len(rise) :], rise[::-1])
            weight = weight * ramp.reshape([-1 if a == axis else 1 for a in range(5)])
        self._sum[:, *place] += weight * piece
        self._weight[:, *place] += weight

    def result(self) -> np.ndarray:
        assert self._sum is not None
        return self._sum / self._weight
