"""VideoMAE (versions 1 and 2) and V-JEPA 2: features of videos that, unlike I3D's, follow motion.

Sources: Wang et al. 2023 (arXiv 2303.16727) and Assran et al. 2025 (arXiv 2506.09985) for the networks; Ge et al. 2024
(arXiv 2404.12391) and Luo et al. 2024 (arXiv 2410.05203) for distances of their features. The features here are the
last layer's tokens, averaged.
"""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from msgspec import Meta, Struct

from paris_jax.artifacts.schemas import Size
from paris_jax.artifacts.tensors import Tensors
from paris_jax.encoders.transformer import Blocks, Params, dense, mlp, norm, normalise, run
from paris_jax.errors import UserError
from paris_jax.weights.reading import Later, Reader, read_config, stacked

COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # means and spreads that both expect
VIDEOMAE, VJEPA2 = "VideoMAE", "V-JEPA 2"


@dataclasses.dataclass(frozen=True)
class VideoTransformer:
    """Sizes that are not seen in the tensors.

    Attributes:
      name: VIDEOMAE or VJEPA2.
      frames: that it was trained with; V-JEPA 2 takes other numbers, too.
      side: pixels per side of its input.
      tube: frames per token; patch: pixels per side of a token.
    """

    name: str
    blocks: Blocks
    frames: int
    side: int
    tube: int
    patch: int


class VideoMAESizes(Struct):
    """Fields of VideoMAE's config.json."""

    hidden_size: Size
    num_attention_heads: Size
    image_size: Size = 224
    patch_size: Size = 16
    num_frames: Size = 16
    tubelet_size: Size = 2
    hidden_act: str = "gelu"
    layer_norm_eps: Annotated[float, Meta(gt=0, le=1)] = 1e-12


class VideoMAE2Nested(Struct):
    """The nested fields of VideoMAE v2's config.json, as its authors publish it."""

    embed_dim: Size
    num_heads: Size
    img_size: Size = 224
    patch_size: Size = 16
    num_frames: Size = 16
    tubelet_size: Size = 2


class VideoMAE2Sizes(Struct):
    """VideoMAE v2's config.json."""

    model_config: VideoMAE2Nested


class VJEPA2Sizes(Struct):
    """Fields of V-JEPA 2's config.json."""

    hidden_size: Size
    num_attention_heads: Size
    crop_size: Size = 256
    patch_size: Size = 16
    frames_per_clip: Size = 64
    tubelet_size: Size = 2
    hidden_act: str = "gelu"
    layer_norm_eps: Annotated[float, Meta(gt=0, le=1)] = 1e-6


def read(folder: epath.PathLike) -> tuple[VideoTransformer, Params]:
    """A VideoMAE or V-JEPA 2 from a folder of safetensors and config.json, as published.

    Raises:
      UserError: the folder holds neither, or tensors are missing or misshapen; all of them are named.
    """
    tensors = Tensors(folder)
    names = tensors.shapes
    reader = Reader(tensors)
    for root in ("", "videomae."):
        if f"{root}embeddings.patch_embeddings.projection.weight" in names:
            return _read_videomae(folder, reader, root)
    for root in ("", "model."):
        if f"{root}patch_embed.proj.weight" in names:
            return _read_videomae2(folder, reader, root)
    for root in ("", "vjepa2."):
        if f"{root}encoder.embeddings.patch_embeddings.proj.weight" in names:
            return _read_vjepa2(folder, reader, root)
    shown = ", ".join(sorted(names)[:3])
    raise UserError(f"{folder} holds neither VideoMAE nor V-JEPA 2 (its tensors are {shown}, ...)")


def _blocks(folder: Any, heads: int, activation: str, epsilon: float) -> Blocks:
    if activation != "gelu":
        raise UserError(f"{folder}: hidden_act is {activation!r}; VideoMAE's and V-JEPA 2's is 'gelu'")
    return Blocks(heads, "gelu", epsilon)


def _take_norms(reader: Reader, params: Params, names: dict[str, str], width: int) -> None:
    """The last norms, where the file has them: of tokens, or of their average."""
    params |= {ours: reader.layer(name, width) for ours, name in names.items() if reader.has(f"{name}.weight")}


def _read_videomae(folder: epath.PathLike, reader: Reader, root: str) -> tuple[VideoTransformer, Params]:
    sizes = read_config(folder, VideoMAESizes)
    D = sizes.hidden_size

    def layer(i: int) -> Params:
        name = f"{root}encoder.layer.{i}"
        attention = {
            p[0]: reader.layer(f"{name}.attention.attention.{p}", D, D, bias=False) for p in ("query", "key", "value")
        }
        for part, letter in (("query", "q"), ("value", "v")):  # keys have none
            for bias in (f"{name}.attention.attention.{part}.bias", f"{name}.attention.attention.{letter}_bias"):
                if reader.has(bias):
                    attention[letter]["bias"] = reader.take(bias, (D,))
        F = (reader.shape(f"{name}.intermediate.dense.weight") or (4 * D,))[0]
        return {
            "norm1": reader.layer(f"{name}.layernorm_before", D),
            "attention": attention | {"out": reader.layer(f"{name}.attention.output.dense", D, D)},
            "norm2": reader.layer(f"{name}.layernorm_after", D),
            "mlp": {
                "in": reader.layer(f"{name}.intermediate.dense", F, D),
                "out": reader.layer(f"{name}.output.dense", D, F),
            },
        }

    params = {
        "patches": reader.layer(
            f"{root}embeddings.patch_embeddings.projection", D, 3, sizes.tubelet_size, *[sizes.patch_size] * 2
        ),
        "blocks": stacked([layer(i) for i in range(max(reader.count(f"{root}encoder.layer."), 1))]),
    }
    _take_norms(reader, params, {"norm": f"{root}layernorm", "pooled_norm": "fc_norm"}, D)
    reader.done(("classifier.", "decoder.", "encoder_to_decoder.", "mask_token"))
    blocks = _blocks(folder, sizes.num_attention_heads, sizes.hidden_act, sizes.layer_norm_eps)
    return VideoTransformer(
        VIDEOMAE, blocks, sizes.num_frames, sizes.image_size, sizes.tubelet_size, sizes.patch_size
    ), params


def _read_videomae2(folder: epath.PathLike, reader: Reader, root: str) -> tuple[VideoTransformer, Params]:
    sizes = read_config(folder, VideoMAE2Sizes).model_config
    D = sizes.embed_dim

    def layer(i: int) -> Params:
        name = f"{root}blocks.{i}"
        joined = reader.take(f"{name}.attn.qkv.weight", (3 * D, D))
        attention: Params = {part: {"weight": joined[n * D : (n + 1) * D]} for n, part in enumerate("qkv")}
        for part in "qv":
            if reader.has(f"{name}.attn.{part}_bias"):
                attention[part]["bias"] = reader.take(f"{name}.attn.{part}_bias", (D,))
        F = (reader.shape(f"{name}.mlp.fc1.weight") or (4 * D,))[0]
        return {
            "norm1": reader.layer(f"{name}.norm1", D),
            "attention": attention | {"out": reader.layer(f"{name}.attn.proj", D, D)},
            "norm2": reader.layer(f"{name}.norm2", D),
            "mlp": {"in": reader.layer(f"{name}.mlp.fc1", F, D), "out": reader.layer(f"{name}.mlp.fc2", D, F)},
        }

    params = {
        "patches": reader.layer(f"{root}patch_embed.proj", D, 3, sizes.tubelet_size, *[sizes.patch_size] * 2),
        "blocks": stacked([layer(i) for i in range(max(reader.count(f"{root}blocks."), 1))]),
    }
    _take_norms(reader, params, {"norm": f"{root}norm", "pooled_norm": f"{root}fc_norm"}, D)
    reader.done((f"{root}head.", f"{root}pos_embed"))
    blocks = Blocks(sizes.num_heads, "gelu", 1e-6)
    return VideoTransformer(
        VIDEOMAE, blocks, sizes.num_frames, sizes.img_size, sizes.tubelet_size, sizes.patch_size
    ), params


def _read_vjepa2(folder: epath.PathLike, reader: Reader, root: str) -> tuple[VideoTransformer, Params]:
    sizes = read_config(folder, VJEPA2Sizes)
    D = sizes.hidden_size

    def layer(i: int) -> Params:
        name = f"{root}encoder.layer.{i}"
        theirs = {"q": "query", "k": "key", "v": "value", "out": "proj"}
        F = (reader.shape(f"{name}.mlp.fc1.weight") or (4 * D,))[0]
        return {
            "norm1": reader.layer(f"{name}.norm1", D),
            "attention": {ours: reader.layer(f"{name}.attention.{part}", D, D) for ours, part in theirs.items()},
            "norm2": reader.layer(f"{name}.norm2", D),
            "mlp": {"in": reader.layer(f"{name}.mlp.fc1", F, D), "out": reader.layer(f"{name}.mlp.fc2", D, F)},
        }

    tube = (sizes.tubelet_size, sizes.patch_size, sizes.patch_size)
    params = {
        "patches": reader.layer(f"{root}encoder.embeddings.patch_embeddings.proj", D, 3, *tube),
        "blocks": stacked([layer(i) for i in range(max(reader.count(f"{root}encoder.layer."), 1))]),
        "norm": reader.layer(f"{root}encoder.layernorm", D),
    }
    reader.done((f"{root}predictor.", "pooler.", "classifier."))
    blocks = _blocks(folder, sizes.num_attention_heads, sizes.hidden_act, sizes.layer_norm_eps)
    return VideoTransformer(
        VJEPA2, blocks, sizes.frames_per_clip, sizes.crop_size, sizes.tubelet_size, sizes.patch_size
    ), params


def put(params: Any, sharding: Any) -> Any:
    """Weights on the devices in float32, read one array at a time."""
    return jax.tree.map(
        lambda later: jax.device_put(later.read(np.float32), sharding), params, is_leaf=lambda x: isinstance(x, Later)
    )


@functools.partial(jax.jit, static_argnames="network")
def tokens(network: VideoTransformer, params: Params, video_BTHW3: jax.Array) -> jax.Array:
    """Tokens (B, N, D) float32 of the last layer, of videos (B, T, S, S, 3) in [0, 1].

    Args:
      network: T must be its number of frames for VideoMAE, and a multiple of its `tube` for V-JEPA 2; S its `side`.
    """
    with jax.default_matmul_precision("float32"):
        x, grid = _tubes(network, params["patches"], normalise(video_BTHW3, *COLOURS))
        if network.name == VIDEOMAE:
            x = run(network.blocks, params["blocks"], x + _sinusoids(*x.shape[1:]))
        else:
            x = _run_rotated(network.blocks, params["blocks"], x, grid)
        return norm(network.blocks, params["norm"], x) if "norm" in params else x


def features(network: VideoTransformer, params: Params, video_BTHW3: jax.Array) -> jax.Array:
    """Features (B, D) float32: `tokens`, averaged, and normalised where the published network does so."""
    pooled = tokens(network, params, video_BTHW3).mean(1)
    return norm(network.blocks, params["pooled_norm"], pooled) if "pooled_norm" in params else pooled


def _tubes(network: VideoTransformer, weights: Params, video: jax.Array) -> tuple[jax.Array, tuple[int, int, int]]:
    """A convolution whose stride is its kernel, (D, 3, t, P, P): tokens (B, N, D) and their grid."""
    t, P = network.tube, network.patch
    B, T, H, W, C = video.shape
    grid = T // t, H // P, W // P
    x = video.reshape(B, grid[0], t, grid[1], P, grid[2], P, C).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    x = x.reshape(B, grid[0] * grid[1] * grid[2], C * t * P * P)
    return dense(weights | {"weight": weights["weight"].reshape(len(weights["weight"]), -1)}, x), grid


def _sinusoids(count: int, width: int) -> np.ndarray:
    """Fixed positions (N, D): sine and cosine alternate."""
    index = np.arange(width)
    angle = np.arange(count)[:, None] / np.power(10000, 2 * (index // 2) / width)
    return np.where(index % 2, np.cos(angle), np.sin(angle)).astype(np.float32)


def _run_rotated(blocks: Blocks, stack: Params, x: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
    """Pre-norm blocks whose queries and keys are rotated by the position of their token in time, rows and columns."""
    turns = _turns(grid, x.shape[-1] // blocks.heads)

    def block(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        x = x + _rotated_attention(blocks, weights["attention"], norm(blocks, weights["norm1"], x), turns)
        return x + mlp(blocks, weights["mlp"], norm(blocks, weights["norm2"], x)), None

    return jax.lax.scan(block, x, stack)[0]


def _rotated_attention(
    blocks: Blocks, weights: Params, x: jax.Array, turns: tuple[np.ndarray, np.ndarray]
) -> jax.Array:
    q, k, v = (dense(weights[part], x).reshape(*x.shape[:2], blocks.heads, -1) for part in "qkv")
    mixed = jax.nn.dot_product_attention(_rotate(q, turns), _rotate(k, turns), v, implementation="xla")
    return dense(weights["out"], mixed.reshape(x.shape))


def _rotate(x_BNHD: jax.Array, turns: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    """Rotates pairs of neighbouring features."""
    cosine, sine = (turn[:, None] for turn in turns)
    pairs = x_BNHD.reshape(*x_BNHD.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x_BNHD.shape)
    return x_BNHD * cosine + turned * sine


def _turns(grid: tuple[int, int, int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (N, D) of each token's rotation; features left over by three equal parts are not rotated.

    The published network repeats its frequencies as a whole where it rotates neighbours, so the two of a pair have
    different ones; its weights expect that.
    """
    part = 2 * (width // 3 // 2)
    frequency = np.tile(1 / 10000 ** (np.arange(part // 2) / (part / 2)), 2)
    positions = np.stack([axis.ravel() for axis in np.indices(grid)])
    angle = np.concatenate([position[:, None] * frequency for position in positions], axis=1)
    angle = np.pad(angle, [(0, 0), (0, width - 3 * part)])
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
