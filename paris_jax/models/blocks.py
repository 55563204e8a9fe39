"""Layers shared by the DiT and the router: embedders, modulation, normalised attention heads, stacked blocks."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from paris_jax.models import stacks
from paris_jax.models.positions import time_features
from paris_jax.models.sharding_rules import constrain

TIME_FEATURES = 256


def linear(inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, zero: bool = False) -> nnx.Linear:
    """A linear layer with float32 parameters that computes in `dtype`; `zero` initialises it with zeros."""
    kernel = nnx.initializers.zeros_init() if zero else nnx.initializers.xavier_uniform()
    return nnx.Linear(inputs, outputs, kernel_init=kernel, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without scale or shift (the modulation supplies them), in float32, eps 1e-6."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def modulate(x_BND: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """LayerNorm, then a per-sample scale and shift (AdaLN, Peebles and Xie 2023)."""
    return layer_norm(x_BND) * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Embedder(nnx.Module):
    """Linear, SiLU, linear: from timestep features or the pooled text embedding to the conditioning vector."""

    def __init__(self, inputs: int, hidden: int, dtype: Any, rngs: nnx.Rngs):
        self.inner = linear(inputs, hidden, dtype, rngs)
        self.outer = linear(hidden, hidden, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(nnx.silu(self.inner(x)))


class Conditioning(nnx.Module):
    """The conditioning vector of every block: embedded timestep plus embedded pooled text, (B, D)."""

    def __init__(self, pooled_width: int, hidden: int, dtype: Any, rngs: nnx.Rngs):
        self.time = Embedder(TIME_FEATURES, hidden, dtype, rngs)
        self.pooled = Embedder(pooled_width, hidden, dtype, rngs)
        self.dtype = dtype

    def __call__(self, t_B: jax.Array, pooled_BP: jax.Array) -> jax.Array:
        return self.time(time_features(t_B, TIME_FEATURES).astype(self.dtype)) + self.pooled(
            pooled_BP.astype(self.dtype)
        )


class Modulation(nnx.Module):
    """Maps the conditioning vector to `count` shifts, scales or gates; zero-initialised: blocks start as identity."""

    def __init__(self, hidden: int, count: int, dtype: Any, rngs: nnx.Rngs):
        self.out = linear(hidden, count * hidden, dtype, rngs, zero=True)
        self.count = count

    def __call__(self, condition_BD: jax.Array) -> list[jax.Array]:
        # Split over `heads`, pieces cross shards, and XLA's partitioner mixes up samples on meshes with data, fsdp and
        # tensor above 1 (docs/design.md).
        modulation_BX = constrain(self.out(nnx.silu(condition_BD)), "batch", None)
        return jnp.split(modulation_BX, self.count, axis=-1)


class HeadNorm(nnx.Module):
    """RMSNorm of queries and keys over each head's features, in float32, eps 1e-6."""

    def __init__(self, head_width: int, rngs: nnx.Rngs):
        self.query = nnx.RMSNorm(head_width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.key = nnx.RMSNorm(head_width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)

    def __call__(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.query(q).astype(q.dtype), self.key(k).astype(k.dtype)


def to_heads(projection: nnx.Linear, x: jax.Array) -> jax.Array:
    """Projects tokens to fused heads, under the checkpoint name that rematerialisation uses.

    The barrier keeps XLA from fusing the split into the product: on a TPU, that would copy every such matrix of a stack
    in transposed form (21 GiB for three experts of 11.89B parameters).
    """
    return jax.lax.optimization_barrier(checkpoint_name(projection(x), "projected"))


def gated(gate_BD: jax.Array, x_BND: jax.Array) -> jax.Array:
    """Scales the output of a branch; the gradient of the gate needs it, hence its checkpoint name."""
    return gate_BD[:, None] * checkpoint_name(x_BND, "gated")


def split_heads(fused_BNX: jax.Array, heads: int, head_width: int) -> list[jax.Array]:
    """(B, N, H * (3 * D + M)) to queries, keys, values, each (B, N, H, D), and MLP features of each head, (B, N, H, M).

    Heads come first in the fused features, so that a shard of the heads holds all features of its heads.
    """
    by_head = fused_BNX.reshape(*fused_BNX.shape[:2], heads, -1)
    return jnp.split(by_head, [head_width, 2 * head_width, 3 * head_width], axis=-1)


def join_heads(x_BNHD: jax.Array) -> jax.Array:
    return x_BNHD.reshape(*x_BNHD.shape[:2], -1)


class Sizes(Protocol):
    """The fields of a network's config that its blocks use."""

    @property
    def hidden(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def mlp_ratio(self) -> int: ...
    @property
    def dtype(self) -> str: ...


class Stream(nnx.Module):
    """Modulation, qkv, output and MLP of one sequence: a whole router block, or one half of a double-stream block."""

    def __init__(self, config: Sizes, rngs: nnx.Rngs):
        dtype, D = jnp.dtype(config.dtype), config.hidden
        self.modulation = Modulation(D, 6, dtype, rngs)
        self.qkv = linear(D, 3 * D, dtype, rngs)
        self.head_norm = HeadNorm(D // config.heads, rngs)
        self.out = linear(D, D, dtype, rngs)
        self.mlp_in = linear(D, config.mlp_ratio * D, dtype, rngs)
        self.mlp_out = linear(config.mlp_ratio * D, D, dtype, rngs)
        self.heads, self.head_width = config.heads, D // config.heads

    def heads_of(self, x: jax.Array, shift: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        fused = to_heads(self.qkv, modulate(x, shift, scale))
        q, k, v, _ = split_heads(fused, self.heads, self.head_width)
        return *self.head_norm(q, k), v

    def update(self, x: jax.Array, attended_BNHD: jax.Array, gates: list[jax.Array]) -> jax.Array:
        gate_attention, shift, scale, gate_mlp = gates
        x = x + gated(gate_attention, self.out(join_heads(attended_BNHD)))
        hidden = checkpoint_name(self.mlp_in(modulate(x, shift, scale)), "projected")
        return x + gated(gate_mlp, self.mlp_out(nnx.gelu(hidden, approximate=True)))


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module | None:
    """Stacks `count` blocks: every parameter has a leading layer axis, and every layer its own initial values.

    None for no blocks: arrays without elements cannot be saved.
    """
    if not count:
        return None
    # Without the metadata, optimizer moments would be sharded over the layer axis.
    build = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: None})
    return build(rngs.split(count))


# Primitives of the flash kernels. Their results include the log-sum-exp: with all of them saved, no kernel runs again.
# A checkpoint name on the attended values alone would not prevent that.
FLASH_PRIMITIVES = (
    "dot_product_attention_fwd_wrapper",  # cuDNN's
    "custom_vjp_call",  # Pallas': its forward rule calls the differentiable kernel again, for the log-sum-exp
)


def _is_flash(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name in FLASH_PRIMITIVES


# Values saved for the backward pass; the rest is recomputed.
_policies = jax.checkpoint_policies
REMAT = {
    "none": None,  # saves everything
    "named": _policies.save_from_both_policies(  # results of matrix products and attention: none is computed twice
        _policies.save_only_these_names("projected", "attended", "gated"), _is_flash
    ),
    "full": _policies.nothing_saveable,  # only the inputs of each block
    "offload": _policies.save_and_offload_only_these_names(  # as "full", with the inputs in host memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


UNROLLED = 2  # stacks of up to this many blocks are unrolled instead of scanned


def scan_blocks(
    blocks: nnx.Module | None, carry: Any, remat: str, *shared: Any, member: jax.Array | None = None
) -> Any:
    """Runs stacked blocks in turn with `lax.scan`: compile time does not grow with depth.

    Stacks of up to `UNROLLED` blocks are unrolled, which is faster on a CPU.

    Args:
      blocks: from `stacked`; called as block(*carry, *shared) -> carry. None returns the carry.
      carry: tuple of activations (B, N, D) passed from block to block.
      remat: rematerialisation in the backward pass, a key of REMAT.
      *shared: inputs common to all blocks.
      member: () int32, the network to run where every parameter has a leading axis of several networks. Its layers are
        read in place, one at a time: no network is copied.
    """
    if blocks is None:
        return carry
    graph, layers = nnx.split(blocks)

    def run(carry: Any, layer: Any) -> Any:
        return nnx.merge(graph, layer)(*carry, *shared)

    if member is not None:
        return _scan_member(run, layers, member, carry)

    def body(carry: Any, layer: Any) -> tuple[Any, None]:
        if remat == "offload":
            carry = tuple(checkpoint_name(x, "block_input") for x in carry)
        return run(carry, layer), None

    if remat != "none":  # XLA does not merge recomputation across a loop, so prevent_cse is not needed
        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT[remat])
    depth = jax.tree.leaves(layers)[0].shape[0]
    return jax.lax.scan(body, carry, layers, unroll=depth if depth <= UNROLLED and remat == "none" else 1)[0]


def _scan_member(run: Callable[[Any, Any], Any], stack: Any, member: jax.Array, carry: Any) -> Any:
    """Runs the blocks of one network of a stack; each offloaded block is fetched while the previous one runs."""
    depth = stacks.depth(stack)
    indices = jnp.arange(depth)
    if not stacks.on_host(stack):

        def body(carry: Any, index: jax.Array) -> tuple[Any, None]:
            return run(carry, stacks.widened(stacks.fetch(stack, member, index))), None

        return jax.lax.scan(body, carry, indices, unroll=depth if depth <= UNROLLED else 1)[0]

    def prefetching_body(state: Any, index: jax.Array) -> tuple[Any, None]:
        carry, layer = state
        next_layer = stacks.fetch(stack, member, jnp.minimum(index + 1, depth - 1))
        return (run(carry, stacks.widened(layer)), next_layer), None

    return jax.lax.scan(prefetching_body, (carry, stacks.fetch(stack, member, indices[0])), indices)[0][0]
