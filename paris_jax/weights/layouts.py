"""Layouts of published DiTs: the names of their tensors, and the order of their features.

Ours joins queries, keys, values (and the hidden features of a single-stream block) head by head, in one matrix, so that
a device that owns a head owns all that belongs to it; and stacks the blocks. Theirs come part by part:

    bfl         FLUX.1's own files, and Open-Sora's where qkv is fused: double_blocks.0.img_attn.qkv.weight
    opensora2   Open-Sora 2.0's: q, k, v apart, and each head's features for rotations of halves instead of neighbours
    diffusers   FluxTransformer2DModel: transformer_blocks.0.attn.to_q.weight
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig

# Our names outside of the blocks, and of what belongs to a double-stream block, for its video and its text, and to a
# single-stream one. Several names are joined along their outputs, in the order q, k, v, hidden.
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
    """Names and orders of one family of files.

    Attributes:
      outside: our name -> theirs.
      video, text, single: the same within a block, behind "double" or "single" and the block's number.
      double_prefix, single_prefix: what their blocks are called.
      scale: what they call the factors of a norm.
      halves: a head's rotated features are (first halves, second halves) instead of pairs of neighbours.
      scale_first: the last modulation gives scale, shift instead of shift, scale.
      unused: beginnings of names that such files may hold and our network has no use for.
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
            "cond_in": "condition_embedder",  # diffusers has none; our own name
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
    """One of our arrays, or one layer of a stacked one, and the tensors that it is made of.

    Attributes:
      ours: its name.  layer: of the stack; None outside of it.  shape: of ours, (inputs, outputs) of a matrix.
      theirs: names of the tensors, joined along their outputs.  sizes: outputs of each.
      rows: which of the joined outputs each of ours is; None: the same.  columns: the same of a matrix's inputs.
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
        """A linear layer of theirs is (outputs, inputs)."""
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
    """Every piece of a network of this config, those of one of our arrays together, layer by layer."""
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
    """The piece of one name, of which `within` stands in a layout's table."""
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
    """Outputs of each tensor that is joined: queries, keys, and the rest, or values and the rest."""
    first = (config.hidden,) * (tensors - 1)
    return (*first, outputs - sum(first))


def _neighbours(width: int) -> np.ndarray:
    """Of a head's features in two halves, the order in which the two that are rotated together are neighbours."""
    return np.arange(width).reshape(2, -1).T.reshape(-1)


def _joined_heads(config: DiTConfig, outputs: int, halves: bool) -> np.ndarray:
    """Their place, (part, head, feature), of our outputs (head, part, feature)."""
    heads, D = config.heads, config.hidden
    qkv = np.arange(3 * D).reshape(3, heads, D // heads)
    if halves:
        qkv[:2] = qkv[:2][..., _neighbours(D // heads)]
    hidden = np.arange(3 * D, outputs).reshape(heads, -1)
    return np.concatenate([qkv.transpose(1, 0, 2).reshape(heads, -1), hidden], axis=1).reshape(-1)


def _attended_and_hidden(config: DiTConfig, inputs: int) -> np.ndarray:
    """Their place, attended before hidden, of our inputs, head by head."""
    attended = np.arange(config.hidden).reshape(config.heads, -1)
    hidden = np.arange(config.hidden, inputs).reshape(config.heads, -1)
    return np.concatenate([attended, hidden], axis=1).reshape(-1)
