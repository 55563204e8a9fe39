"""CLIP's text and vision encoders (Radford et al. 2021, arXiv 2103.00020)."""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import msgspec
from etils import epath
from msgspec import Meta, Struct

from paris_jax.artifacts.schemas import Size
from paris_jax.artifacts.tensors import Tensors
from paris_jax.encoders.transformer import Blocks, Params, dense, norm, normalise, patches, run
from paris_jax.errors import UserError
from paris_jax.weights.reading import Reader, read_config, stacked

COLOURS = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of its input


@dataclasses.dataclass(frozen=True)
class Clip:
    """Sizes of CLIP's encoders that the tensors do not show; None for an encoder that the files lack."""

    text: Blocks | None
    vision: Blocks | None
    end: int  # id of the end-of-text token; 2 in old files, which means the largest id


class TowerSizes(Struct):
    """Fields of one encoder in CLIP's config.json, with the published defaults."""

    hidden_size: Size | None = None
    hidden_act: str = "quick_gelu"
    num_attention_heads: Size | None = None
    layer_norm_eps: Annotated[float, Meta(gt=0, le=1)] = 1e-5
    eos_token_id: Annotated[int, Meta(ge=0, lt=1 << 31)] = 2


class ClipSizes(TowerSizes):
    """CLIP's config.json: both encoders, or without `text_config` the text encoder alone."""

    text_config: TowerSizes | None = None
    vision_config: TowerSizes = msgspec.field(default_factory=TowerSizes)


def read(folder: epath.PathLike) -> tuple[Clip, Params]:
    """CLIP from a folder in Hugging Face's format: both encoders, or the text encoder alone, as beside FLUX.1-dev."""
    described = read_config(folder, ClipSizes)
    reader, params, blocks = Reader(Tensors(folder)), {}, {}
    by_kind: dict[str, TowerSizes] = {"text": described.text_config or described, "vision": described.vision_config}
    for kind, first in (("text", "token"), ("vision", "patch")):
        # Text encoders alone are published with and without this prefix.
        there = [f"{kind}_model.", ""]
        there = [root for root in there if reader.has(f"{root}embeddings.{first}_embedding.weight")]
        if not there:
            continue
        root, sizes = there[0], by_kind[kind]
        D = (reader.shape(f"{root}embeddings.position_embedding.weight") or (0, 1))[1]
        F = (reader.shape(f"{root}encoder.layers.0.mlp.fc1.weight") or (4 * D,))[0]
        layers = range(max(reader.count(f"{root}encoder.layers."), 1))
        params[kind] = {"blocks": stacked([_layer(reader, f"{root}encoder.layers.{i}", D, F) for i in layers])}
        params[kind] |= {"positions": reader.take(f"{root}embeddings.position_embedding.weight")}
        if kind == "text":
            params[kind]["tokens"] = reader.take(f"{root}embeddings.token_embedding.weight")
            params[kind]["norm"] = reader.layer(f"{root}final_layer_norm", D)
        else:
            params[kind]["patches"] = {"weight": reader.take(f"{root}embeddings.patch_embedding.weight")}
            params[kind]["cls"] = reader.take(f"{root}embeddings.class_embedding", (D,))
            params[kind]["before"] = reader.layer(f"{root}pre_layrnorm", D)
            params[kind]["norm"] = reader.layer(f"{root}post_layernorm", D)
        projection = f"{'text' if kind == 'text' else 'visual'}_projection.weight"
        if reader.has(projection):
            params[kind]["projection"] = {"weight": reader.take(projection)}
        activation = {"quick_gelu": "quick_gelu", "gelu": "gelu"}.get(sizes.hidden_act)
        if activation is None:
            raise UserError(f"{folder}: hidden_act is {sizes.hidden_act!r}; CLIP's is 'quick_gelu' or 'gelu'")
        blocks[kind] = Blocks(sizes.num_attention_heads or D // 64, activation, sizes.layer_norm_eps)
    if not params:
        raise UserError(f"{folder} holds no CLIP encoder; name the folder with its downloaded weights")
    reader.done(("logit_scale", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"))
    return Clip(blocks.get("text"), blocks.get("vision"), by_kind["text"].eos_token_id), params


def _layer(reader: Reader, name: str, D: int, F: int) -> Params:
    attention = {part: reader.layer(f"{name}.self_attn.{part}_proj", D, D) for part in ("q", "k", "v", "out")}
    return {
        "norm1": reader.layer(f"{name}.layer_norm1", D),
        "attention": attention,
        "norm2": reader.layer(f"{name}.layer_norm2", D),
        "mlp": {"in": reader.layer(f"{name}.mlp.fc1", F, D), "out": reader.layer(f"{name}.mlp.fc2", D, F)},
    }


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def encode_text(config: Clip, params: Params, ids_BL: jax.Array, dtype: str = "float32") -> dict[str, jax.Array]:
    """Encodes texts, token ids (B, L) padded at the end.

    Returns:
      float32 arrays: "hidden" (B, L, D), the last layer; "pooled" (B, D), its end-of-text token; and where the weights
      have a projection, "embedding" (B, E), the projected pooled vector.
    """
    blocks, text, L = config.text, params["text"], ids_BL.shape[1]
    assert blocks is not None
    x = (jnp.take(text["tokens"], ids_BL, axis=0) + text["positions"][:L]).astype(dtype)
    causal = jnp.where(jnp.tril(jnp.ones((L, L), bool)), 0.0, -jnp.inf)
    hidden = norm(blocks, text["norm"], run(blocks, text["blocks"], x, causal)).astype(jnp.float32)
    end = ids_BL.argmax(-1) if config.end == 2 else (ids_BL == config.end).argmax(-1)
    pooled = jnp.take_along_axis(hidden, end[:, None, None], axis=1)[:, 0]
    found = {"hidden": hidden, "pooled": pooled}
    return found | ({"embedding": dense(text["projection"], pooled)} if "projection" in text else {})


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def encode_image(config: Clip, params: Params, image_BHW3: jax.Array, dtype: str = "float32") -> dict[str, jax.Array]:
    """Encodes images in [0, 1] of the trained size to "pooled" (B, D) and "embedding" (B, E), float32."""
    blocks, vision = config.vision, params["vision"]
    assert blocks is not None
    x = patches(vision["patches"], normalise(image_BHW3, *COLOURS), dtype)
    x = jnp.concatenate([jnp.broadcast_to(vision["cls"], (len(x), 1, x.shape[-1])).astype(x.dtype), x], axis=1)
    x = norm(blocks, vision["before"], x + vision["positions"].astype(x.dtype))
    pooled = norm(blocks, vision["norm"], run(blocks, vision["blocks"], x)[:, 0]).astype(jnp.float32)
    return {"pooled": pooled} | ({"embedding": dense(vision["projection"], pooled)} if "projection" in vision else {})
