"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193), from S to g: image features from self-supervised training."""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from msgspec import Meta, Struct

from paris_jax.artifacts.schemas import Size
from paris_jax.artifacts.tensors import Tensors
from paris_jax.encoders.transformer import Blocks, Params, norm, normalise, patches, run
from paris_jax.errors import UserError
from paris_jax.weights.reading import Reader, read_config, stacked

COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of its input


@dataclasses.dataclass(frozen=True)
class Dino:
    """Sizes of a DINOv2 that the tensors do not show."""

    blocks: Blocks


class DinoSizes(Struct):
    """Fields of DINOv2's config.json."""

    num_attention_heads: Size
    hidden_act: str
    layer_norm_eps: Annotated[float, Meta(gt=0, le=1)]
    hidden_size: Size


def read(folder: epath.PathLike) -> tuple[Dino, Params]:
    """A DINOv2, S to g, from a folder as published by Hugging Face."""
    sizes = read_config(folder, DinoSizes)
    if sizes.hidden_act != "gelu":
        raise UserError(f"{folder}: hidden_act is {sizes.hidden_act!r}; DINOv2's is 'gelu'")
    reader, D = Reader(Tensors(folder)), sizes.hidden_size
    gated = reader.has("encoder.layer.0.mlp.weights_in.weight")
    layers = range(max(reader.count("encoder.layer."), 1))
    params = {
        "cls": reader.take("embeddings.cls_token", (1, 1, D))[0, 0],
        "positions": reader.take("embeddings.position_embeddings")[0],
        "patches": {
            "weight": reader.take("embeddings.patch_embeddings.projection.weight"),
            "bias": reader.take("embeddings.patch_embeddings.projection.bias", (D,)),
        },
        "blocks": stacked([_layer(reader, f"encoder.layer.{i}", D, gated) for i in layers]),
        "norm": reader.layer("layernorm", D),
    }
    reader.done(("embeddings.mask_token",))
    activation = "silu" if gated else "gelu"
    return Dino(Blocks(sizes.num_attention_heads, activation, sizes.layer_norm_eps)), params


def _layer(reader: Reader, name: str, D: int, gated: bool) -> Params:
    theirs = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "out": "output.dense"}
    return {
        "norm1": reader.layer(f"{name}.norm1", D),
        "attention": {ours: reader.layer(f"{name}.attention.{part}", D, D) for ours, part in theirs.items()},
        "scale1": reader.take(f"{name}.layer_scale1.lambda1", (D,)),
        "norm2": reader.layer(f"{name}.norm2", D),
        "mlp": _swiglu(reader, f"{name}.mlp", D) if gated else _plain(reader, f"{name}.mlp", D),
        "scale2": reader.take(f"{name}.layer_scale2.lambda1", (D,)),
    }


def _plain(reader: Reader, name: str, D: int) -> Params:
    F = (reader.shape(f"{name}.fc1.weight") or (4 * D,))[0]
    return {"in": reader.layer(f"{name}.fc1", F, D), "out": reader.layer(f"{name}.fc2", D, F)}


def _swiglu(reader: Reader, name: str, D: int) -> Params:
    """Reads an MLP; the giant model stores gate and input as one matrix."""
    F = (reader.shape(f"{name}.weights_in.weight") or (2 * D,))[0] // 2
    both = reader.layer(f"{name}.weights_in", 2 * F, D)
    gate, inner = ({k: v[part] for k, v in both.items()} for part in (slice(0, F), slice(F, None)))
    return {"gate": gate, "in": inner, "out": reader.layer(f"{name}.weights_out", D, F)}


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def encode(config: Dino, params: Params, image_BHW3: jax.Array, dtype: str = "float32") -> jax.Array:
    """Encodes images in [0, 1] to tokens (B, 1 + N, D) float32; the first is the class token.

    Height and width must be multiples of the patch; position embeddings are interpolated.
    """
    blocks, patch = config.blocks, params["patches"]["weight"].shape[-1]
    rows, columns = image_BHW3.shape[1] // patch, image_BHW3.shape[2] // patch
    x = patches(params["patches"], normalise(image_BHW3, *COLOURS), dtype)
    x = jnp.concatenate([jnp.broadcast_to(params["cls"], (len(x), 1, x.shape[-1])).astype(x.dtype), x], axis=1)
    x = x + positions(params["positions"], rows, columns).astype(x.dtype)
    return norm(blocks, params["norm"], run(blocks, params["blocks"], x)).astype(jnp.float32)


def positions(trained_1ND: jax.Array, rows: int, columns: int) -> jax.Array:
    """Positions (1 + rows * columns, D) from those trained, (1 + side^2, D), by bicubic interpolation."""
    cls, grid = trained_1ND[:1], trained_1ND[1:]
    side = round(len(grid) ** 0.5)
    if (rows, columns) == (side, side):
        return trained_1ND
    down, across = cubic(side, rows), cubic(side, columns)
    grid = jnp.einsum("ri,cj,ijd->rcd", down, across, grid.reshape(side, side, -1))
    return jnp.concatenate([cls, grid.reshape(rows * columns, -1)])


@functools.lru_cache(maxsize=32)
def cubic(inputs: int, outputs: int, sharpness: float = -0.75) -> np.ndarray:
    """Cubic convolution (Keys 1981) along one axis as a matrix (outputs, inputs), edges repeated, pixels as areas."""
    at = (np.arange(outputs) + 0.5) * inputs / outputs - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((outputs, inputs))
    for tap in range(-1, 3):
        d, a = np.abs(at - (first + tap)), sharpness
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(matrix, (np.arange(outputs), np.clip(first + tap, 0, inputs - 1)), np.where(d <= 1, near, far))
    return matrix.astype(np.float32)
