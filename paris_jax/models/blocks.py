"""The pieces both networks are built from: embedders, modulation, normalised attention heads, stacked blocks."""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from paris_jax.models.positions import time_features

TIME_FEATURES = 256


def linear(inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs, zero: bool = False) -> nnx.Linear:
    """An affine map with float32 parameters computing in `dtype`; `zero` starts it at nothing."""
    kernel = nnx.initializers.zeros_init() if zero else nnx.initializers.xavier_uniform()
    return nnx.Linear(inputs, outputs, kernel_init=kernel, dtype=dtype, param_dtype=jnp.float32, rngs=rngs)


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm without scale or shift (they come from the modulation), in float32, eps 1e-6."""
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    return (wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def modulate(x_BND: jax.Array, shift_BD: jax.Array, scale_BD: jax.Array) -> jax.Array:
    """LayerNorm, then a per-sample scale and shift (AdaLN, Peebles and Xie 2023)."""
    return layer_norm(x_BND) * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Embedder(nnx.Module):
    """Linear, SiLU, linear: time features or the pooled text to the conditioning vector."""

    def __init__(self, inputs: int, hidden: int, dtype: Any, rngs: nnx.Rngs):
        self.inner = linear(inputs, hidden, dtype, rngs)
        self.outer = linear(hidden, hidden, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer(nnx.silu(self.inner(x)))


class Conditioning(nnx.Module):
    """The vector that modulates every block: embedded time plus embedded pooled text, (B, D)."""

    def __init__(self, pooled_width: int, hidden: int, dtype: Any, rngs: nnx.Rngs):
        self.time = Embedder(TIME_FEATURES, hidden, dtype, rngs)
        self.pooled = Embedder(pooled_width, hidden, dtype, rngs)
        self.dtype = dtype

    def __call__(self, t_B: jax.Array, pooled_BP: jax.Array) -> jax.Array:
        return self.time(time_features(t_B, TIME_FEATURES).astype(self.dtype)) + self.pooled(
            pooled_BP.astype(self.dtype)
        )


class Modulation(nnx.Module):
    """Conditioning vector to `count` vectors of shift, scale or gate; starts at zero, so blocks start as identity."""

    def __init__(self, hidden: int, count: int, dtype: Any, rngs: nnx.Rngs):
        self.out = linear(hidden, count * hidden, dtype, rngs, zero=True)
        self.count = count

    def __call__(self, condition_BD: jax.Array) -> list[jax.Array]:
        return jnp.split(self.out(nnx.silu(condition_BD)), self.count, axis=-1)


class HeadNorm(nnx.Module):
    """RMSNorm of queries and keys over each head's features, in float32, eps 1e-6."""

    def __init__(self, head_width: int, rngs: nnx.Rngs):
        self.query = nnx.RMSNorm(head_width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.key = nnx.RMSNorm(head_width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)

    def __call__(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.query(q).astype(q.dtype), self.key(k).astype(k.dtype)


def split_heads(qkv_BNX: jax.Array, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(B, N, 3 * H * D) to queries, keys and values, each (B, N, H, D)."""
    q, k, v = jnp.split(qkv_BNX.reshape(*qkv_BNX.shape[:2], 3 * heads, -1), 3, axis=2)
    return q, k, v


class Sizes(Protocol):
    """What a block needs to know of its network's config."""

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
        self.heads = config.heads

    def heads_of(self, x: jax.Array, shift: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = split_heads(self.qkv(modulate(x, shift, scale)), self.heads)
        return *self.head_norm(q, k), v

    def update(self, x: jax.Array, attended: jax.Array, gates: list[jax.Array]) -> jax.Array:
        gate_attention, shift, scale, gate_mlp = gates
        x = x + gate_attention[:, None] * self.out(attended.reshape(x.shape))
        hidden = nnx.gelu(self.mlp_in(modulate(x, shift, scale)), approximate=True)
        return x + gate_mlp[:, None] * self.mlp_out(hidden)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks as one, every parameter with a leading layer axis, each with its own initial values."""
    # Without the metadata, optimizer moments would be sharded over the layer axis.
    build = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: None})
    return build(rngs.split(count))


def scan_blocks(blocks: nnx.Module, carry: Any, remat: bool, *shared: Any) -> Any:
    """Runs stacked blocks in turn with `lax.scan`: compile time does not grow with depth.

    Args:
      blocks: from `stacked`; called as block(*carry, *shared) -> carry.
      carry: tuple of arrays handed from block to block.
      remat: recompute activations in the backward pass instead of keeping them.
      *shared: inputs that every block sees.
    """
    graph, layers = nnx.split(blocks)

    def body(carry: Any, layer: Any) -> tuple[Any, None]:
        return nnx.merge(graph, layer)(*carry, *shared), None

    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False) if remat else body, carry, layers)[0]
