"""T5-v1.1's encoder (Raffel et al. 2020, arXiv 1910.10683; v1.1: gated GELU), of any size up to XXL."""

import dataclasses
import functools
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from msgspec import Meta, Struct

from paris_jax.artifacts.schemas import Size
from paris_jax.artifacts.tensors import Tensors
from paris_jax.encoders.transformer import Blocks, Params, norm, run
from paris_jax.errors import UserError
from paris_jax.weights.reading import Reader, read_config, stacked

UNUSED = ("decoder.", "lm_head.", "encoder.embed_tokens.")  # the last repeats `shared`


@dataclasses.dataclass(frozen=True)
class T5:
    """Sizes of an encoder that the tensors do not show."""

    blocks: Blocks
    buckets: int  # of relative positions
    longest: int  # distance from which on all share a bucket


class T5Sizes(Struct):
    """Fields of T5's config.json."""

    num_heads: Size
    d_kv: Size
    d_ff: Size
    d_model: Size
    feed_forward_proj: str
    layer_norm_epsilon: Annotated[float, Meta(gt=0, le=1)]
    relative_attention_num_buckets: Size = 32
    relative_attention_max_distance: Size = 128


def read(folder: epath.PathLike) -> tuple[T5, Params]:
    """An encoder from a folder as published by Hugging Face: config.json and safetensors.

    Raises:
      UserError: an encoder of another kind, or tensors that are missing, extra or misshapen, by name; non-finite
        values raise it when they are read.
    """
    sizes = read_config(folder, T5Sizes)
    if sizes.feed_forward_proj != "gated-gelu":
        raise UserError(f"{folder}: feed_forward_proj is {sizes.feed_forward_proj!r}; T5-v1.1's is 'gated-gelu'")
    D, inner, F = sizes.d_model, sizes.num_heads * sizes.d_kv, sizes.d_ff
    buckets = sizes.relative_attention_num_buckets
    reader = Reader(Tensors(folder))

    def layer(i: int) -> Params:
        first, second = (f"encoder.block.{i}.layer.{part}" for part in (0, 1))
        names = {"q": "q", "k": "k", "v": "v"}
        attention = {
            ours: reader.layer(f"{first}.SelfAttention.{theirs}", inner, D, bias=False)
            for ours, theirs in names.items()
        }
        attention["out"] = reader.layer(f"{first}.SelfAttention.o", D, inner, bias=False)
        dense = f"{second}.DenseReluDense"
        return {
            "norm1": reader.layer(f"{first}.layer_norm", D, bias=False),
            "attention": attention,
            "norm2": reader.layer(f"{second}.layer_norm", D, bias=False),
            "mlp": {
                "gate": reader.layer(f"{dense}.wi_0", F, D, bias=False),
                "in": reader.layer(f"{dense}.wi_1", F, D, bias=False),
                "out": reader.layer(f"{dense}.wo", D, F, bias=False),
            },
        }

    first = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    params = {
        "tokens": reader.take("shared.weight"),
        "distances": reader.take(first, (buckets, sizes.num_heads)),
        "blocks": stacked([layer(i) for i in range(max(reader.count("encoder.block."), 1))]),
        "norm": reader.layer("encoder.final_layer_norm", D, bias=False),
    }
    reader.done(UNUSED)
    blocks = Blocks(sizes.num_heads, "gelu_tanh", sizes.layer_norm_epsilon, rms=True, scaled=False)
    return T5(blocks, buckets, sizes.relative_attention_max_distance), params


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def encode(config: T5, params: Params, ids_BL: jax.Array, length_B: jax.Array, dtype: str = "float32") -> jax.Array:
    """Encodes token ids padded at the end to the last layer (B, L, D) float32; padding is not attended to."""
    L = ids_BL.shape[1]
    x = jnp.take(params["tokens"], ids_BL, axis=0).astype(dtype)
    near = jnp.take(params["distances"], jnp.asarray(bucket(L, config.buckets, config.longest)), axis=0)
    there = jnp.arange(L) < length_B[:, None]
    bias = near.transpose(2, 0, 1) + jnp.where(there, 0.0, -jnp.inf)[:, None, None, :]
    return norm(config.blocks, params["norm"], run(config.blocks, params["blocks"], x, bias)).astype(jnp.float32)


def bucket(length: int, buckets: int, longest: int) -> np.ndarray:
    """The bucket of each pair's distance (query, key), (L, L) int.

    Half of the buckets are for keys after the query. In each half, the first half hold single distances, the others
    grow logarithmically up to `longest`.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half, exact, far = buckets // 2, buckets // 4, np.abs(distance)
    grown = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(longest / exact))
    logarithmic = np.minimum(exact + (grown * (half - exact)).astype(np.int64), half - 1)
    return np.where(distance > 0, half, 0) + np.where(far < exact, far, logarithmic)
