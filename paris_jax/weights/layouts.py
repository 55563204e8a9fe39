"""Layouts of published DiTs: the names of their tensors, and the order of their features.

Our layout fuses queries, keys and values (and the hidden features of a single-stream block) head by head in one matrix,
so that the shard of a head holds all its features, and stacks the blocks. Published layouts keep them apart:

    bfl         FLUX.1's own files, and Open-Sora's where qkv is fused: double_blocks.0.img_attn.qkv.weight
    opensora2   Open-Sora 2.0's: q, k, v apart; RoPE rotates the two halves of a head instead of neighbouring features
    diffusers   FluxTransformer2DModel: transformer_blocks.0.attn.to_q.weight
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig

# Our names outside the blocks, in the video and text streams of a double-stream block, and in a single-stream block.
# Several names are joined along their outputs, in the order q, k, v, hidden.
_BFL = {
    "video_in": "img_in",
    "cond_in": "cond_in",
    "text_in": "txt_in",
    "conditioning.time.inner": "time_in.in_layer",
    "conditioning.time.outer": "time_in.out_layer",
    "conditioning.pooled.inner": "vector_in.in_layer",
    "conditioning.pooled.outer": "vector_in.out_layer",
    "final_modulation.out": "final_layer.adaLN_modulation.1",
    "velocity_out": "final_layer.linear",
}
_BFL_STREAM = {
    "modulation.out": "{stream}_mod.lin",
    "qkv": "{stream}_attn.qkv",
    "head_norm.query": "{stream}_attn.norm.query_norm",
    "head_norm.key": "{stream}_attn.norm.key_norm",
    "out": "{stream}_attn.proj",
    "mlp_in": "{stream}_mlp.0",
    "mlp_out": "{stream}_mlp.2",
}
_BFL_SINGLE = {
    "modulation.out": "modulation.lin",
    "qkv_mlp": "linear1",
    "head_norm.query": "norm.query_norm",
    "head_norm.key": "norm.key_norm",
    "out": "linear2",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names and feature orders of one family of files.

    Attributes:
      outside: our name -> theirs, outside the blocks.
      video, text, single: the same within a block, after its prefix and number.
      double_prefix, single_prefix: prefixes of the blocks.
      scale: name of the scales of norms.
      halves: RoPE rotates (first half, second half) of a head's features instead of neighbouring pairs.
      scale_first: the last modulation is ordered scale, shift instead of shift, scale.
      unused: prefixes of tensors that such files may hold and our network does not use.
    """

    outside: dict[str, str]
    video: dict[str, str | tuple[str, ...]]
    text: dict[str, str | tuple[str, ...]]
    single: dict[str, str | tuple[str, ...]]
    double_prefix: str = "double_blocks"
    single_prefix: str = "single_blocks"
    scale: str = "scale"
    halves: bool = False
    scale_first: bool = False
    unused: tuple[str, ...] = ("guidance_in.",)  # FLUX.1-dev's distilled guidance


def _stream(names: dict[str, str], stream: str, **changed: tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    return {ours: theirs.format(stream=stream) for ours, theirs in names.items()} | changed


def _apart(stream: str) -> tuple[str, ...]:
    return tuple(f"{stream}_attn.{part}_proj" for part in "qkv")


LAYOUTS = {
    "bfl": Layout(_BFL, _stream(_BFL_STREAM, "img"), _stream(_BFL_STREAM, "txt"), {**_BFL_SINGLE}),
    "opensora2": Layout(
        _BFL,
        _stream(_BFL_STREAM, "img", qkv=_apart("img")),
        _stream(_BFL_STREAM, "txt", qkv=_apart("txt")),
        {**_BFL_SINGLE, "qkv_mlp": ("q_proj", "k_proj", "v_mlp")},
        halves=True,
    ),
    "diffusers": Layout(
        {
            "video_in": "x_embedder",
            "cond_in": "condition_embedder",  # diffusers has no such input; the name is ours
            "text_in": "context_embedder",
            "conditioning.time.inner": "time_text_embed.timestep_embedder.linear_1",
            "conditioning.time.outer": "time_text_embed.timestep_embedder.linear_2",
            "conditioning.pooled.inner": "time_text_embed.text_embedder.linear_1",
            "conditioning.pooled.outer": "time_text_embed.text_embedder.linear_2",
            "final_modulation.out": "norm_out.linear",
            "velocity_out": "proj_out",
        },
        {
            "modulation.out": "norm1.linear",
            "qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "head_norm.query": "attn.norm_q",
            "head_norm.key": "attn.norm_k",
            "out": "attn.to_out.0",
            "mlp_in": "ff.net.0.proj",
            "mlp_out": "ff.net.2",
        },
        {
            "modulation.out": "norm1_context.linear",
            "qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "head_norm.query": "attn.norm_added_q",
            "head_norm.key": "attn.norm_added_k",
            "out": "attn.to_add_out",
            "mlp_in": "ff_context.net.0.proj",
            "mlp_out": "ff_context.net.2",
        },
        {
            "modulation.out": "norm.linear",
            "qkv_mlp": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "head_norm.query": "attn.norm_q",
            "head_norm.key": "attn.norm_k",
            "out": "proj_out",
        },
        double_prefix="transformer_blocks",
        single_prefix="single_transformer_blocks",
        scale="weight",
        scale_first=True,
        unused=("time_text_embed.guidance_embedder.",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One of our arrays, or one layer of a stacked array, and the tensors it is made of.

    Attributes:
      ours: name of our array.
      layer: index in the stack; None outside the blocks.
      shape: of our array; (inputs, outputs) of a matrix.
      theirs: names of the tensors, joined along their outputs.
      sizes: outputs of each tensor.
      rows: for each of our outputs, its index among the joined ones; None: the same order.
      columns: likewise for the inputs of a matrix.
    """

    ours: str
    layer: int | None
    shape: tuple[int, ...]
    theirs: tuple[str, ...]
    sizes: tuple[int, ...]
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def their_shapes(self) -> list[tuple[int, ...]]:
        """The shape of the joined tensors; published linear layers are (outputs, inputs)."""
        return [(size, *self.shape[:-1]) for size in self.sizes]

    def to_ours(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(tensors) if len(tensors) > 1 else tensors[0]
        joined = joined if self.rows is None else joined[self.rows]
        joined = joined if self.columns is None else joined[:, self.columns]
        return joined.T

    def to_theirs(self, array: np.ndarray) -> list[np.ndarray]:
        joined = array.T
        joined = joined if self.columns is None else joined[:, np.argsort(self.columns)]
        joined = joined if self.rows is None else joined[np.argsort(self.rows)]
        return np.split(joined, np.cumsum(self.sizes)[:-1])


def pieces(config: DiTConfig, layout: Layout) -> Iterator[Piece]:
    """Yields all pieces of a network, the layers of each array one after the other."""
    for name, leaf in functional.to_names(functional.abstract(config)).items():
        room, _, rest = name.partition(".")
        if room not in functional.BLOCKS:
            yield _piece(config, layout, name, None, leaf.shape, name, layout.outside, "")
            continue
        stream = rest.partition(".")[0] if room == "double_blocks" else ""
        table = {"video": layout.video, "text": layout.text, "": layout.single}[stream]
        prefix = layout.double_prefix if stream else layout.single_prefix
        for layer in range(leaf.shape[0]):
            within = rest.removeprefix(f"{stream}.")
            yield _piece(config, layout, name, layer, leaf.shape[1:], within, table, f"{prefix}.{layer}.")


def _piece(
    config: DiTConfig, layout: Layout, ours: str, layer: int | None, shape: tuple[int, ...], within: str, table, prefix
) -> Piece:
    """The piece of one of our names; `within` is its key in the layout's table."""
    part, _, kind = within.rpartition(".")
    named = table[part]
    named = (named,) if isinstance(named, str) else named
    ending = {"kernel": "weight", "bias": "bias", "scale": layout.scale}[kind]
    theirs = tuple(f"{prefix}{name}.{ending}" for name in named)
    rows = columns = None
    if part.startswith("qkv"):
        rows = _joined_heads(config, shape[-1], layout.halves)
    elif part.startswith("head_norm") and layout.halves:
        rows = _neighbours(shape[-1])
    elif part == "final_modulation.out" and layout.scale_first:
        rows = np.roll(np.arange(shape[-1]), config.hidden)
    elif part == "out" and kind == "kernel" and ours.startswith("single_blocks"):
        columns = _attended_and_hidden(config, shape[0])
    return Piece(ours, layer, shape, theirs, _sizes(config, shape[-1], len(named)), rows, columns)


def _sizes(config: DiTConfig, outputs: int, tensors: int) -> tuple[int, ...]:
    """The number of outputs of each joined tensor: queries, keys, values and hidden features."""
    first = (config.hidden,) * (tensors - 1)
    return (*first, outputs - sum(first))


def _neighbours(width: int) -> np.ndarray:
    """The order of a head's features, stored in halves, in which features that rotate together are neighbours."""
    return np.arange(width).reshape(2, -1).T.reshape(-1)


def _joined_heads(config: DiTConfig, outputs: int, halves: bool) -> np.ndarray:
    """Indices in their order (part, head, feature) of our outputs (head, part, feature)."""
    heads, D = config.heads, config.hidden
    qkv = np.arange(3 * D).reshape(3, heads, D // heads)
    if halves:
        qkv[:2] = qkv[:2][..., _neighbours(D // heads)]
    hidden = np.arange(3 * D, outputs).reshape(heads, -1)
    return np.concatenate([qkv.transpose(1, 0, 2).reshape(heads, -1), hidden], axis=1).reshape(-1)


def _attended_and_hidden(config: DiTConfig, inputs: int) -> np.ndarray:
    """Indices in their order, attended then hidden, of our inputs, head by head."""
    attended = np.arange(config.hidden).reshape(config.heads, -1)
    hidden = np.arange(config.hidden, inputs).reshape(config.heads, -1)
    return np.concatenate([attended, hidden], axis=1).reshape(-1)
