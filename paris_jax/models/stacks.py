"""Stacked networks: reading the layers of one network in place, from device or host memory.

A stack holds the blocks of every network, (members, layers, ...). Its matrices may be int8 with a scale for each
output. It may be offloaded to host memory: layers are then fetched one at a time, the next one while the current one
runs (`blocks.scan_blocks`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """Quantised matrices (..., inputs, outputs): int8 values times a float32 scale (..., 1, outputs).

    The values may be packed four to an int32 (`words`).
    """

    values: Any
    scale: Any

    @classmethod
    def of(cls, matrices: np.ndarray) -> "Int8":
        """Rounds to 255 levels, -127 to 127, with the largest absolute weight of each output at 127."""
        values = np.empty(matrices.shape, np.int8)
        scale = np.empty((*matrices.shape[:-2], 1, matrices.shape[-1]), np.float32)
        for index in np.ndindex(matrices.shape[:-2]):  # one at a time: all in float32 would double the memory
            matrix = matrices[index].astype(np.float32)
            step = np.abs(matrix).max(-2, keepdims=True) / 127
            scale[index] = np.where(step > 0, step, 1)
            values[index] = np.round(matrix / scale[index])
        return cls(values, scale)

    def matrix(self) -> Any:
        """The dequantised matrices, float32 (..., inputs, outputs)."""
        values = self.values if self.values.dtype == jnp.int8 else _bytes(self.values)
        return values.astype(jnp.float32) * self.scale


def words(values: np.ndarray) -> np.ndarray:
    """Packs int8 (..., inputs, outputs) into int32 (..., inputs / 4, outputs), a quarter of every 4 x 32 rows per byte.

    A TPU tiles int8 arrays in host memory differently from their slices, so that fetching one layer would copy the
    whole stack to the device and back; it slices int32 in place. An int8 tile has 32 rows, so unpacking, which stacks
    the quarters again, moves no row within its tile.
    """
    rows = _rows(values.shape[-2] // 4)
    quarters = values.reshape(*values.shape[:-2], -1, 4, rows, values.shape[-1])
    packed = np.ascontiguousarray(np.moveaxis(quarters, -3, -1)).view("<i4")
    return packed.reshape(*values.shape[:-2], -1, values.shape[-1])


def _bytes(packed: jax.Array) -> jax.Array:
    """The inverse of `words`: int32 (rows, outputs) as int8 (4 rows, outputs)."""
    count, outputs = packed.shape
    blocks = packed.reshape(-1, _rows(count), outputs)
    quarters = [((blocks << shift) >> 24).astype(jnp.int8) for shift in (24, 16, 8, 0)]
    return jnp.stack(quarters, 1).reshape(4 * count, outputs)


def _rows(packed_rows: int) -> int:
    """The number of consecutive rows that are packed and unpacked together: 32 where it divides."""
    return math.gcd(packed_rows, 32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnHost:
    """An array in host memory, with one leading axis for the layers of all members, (members * layers, ...).

    A TPU can fetch a slice from host memory along one axis only.
    """

    layers: Any


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, Int8)


def _is_on_host(leaf: Any) -> bool:
    return isinstance(leaf, OnHost)


def on_host(stack: Any) -> bool:
    """Whether any array of a stack is in host memory."""
    return any(map(_is_on_host, jax.tree.leaves(stack, is_leaf=_is_on_host)))


def depth(stack: Any) -> int:
    """The number of layers of each network of a stack."""
    return next(leaf.shape[1] for leaf in jax.tree.leaves(stack, is_leaf=_is_on_host) if not _is_on_host(leaf))


def fetch(stack: Any, member: jax.Array, layer: jax.Array) -> Any:
    """One layer of one network, on the device."""
    layers = depth(stack)

    def fetch_leaf(leaf: Any) -> jax.Array:
        if _is_on_host(leaf):
            piece = jax.lax.dynamic_index_in_dim(leaf.layers, member * layers + layer, keepdims=False)
            return jax.device_put(piece, jax.memory.Space.Device)
        start, size = (member, layer, *(0,) * (leaf.ndim - 2)), (1, 1, *leaf.shape[2:])
        return jax.lax.dynamic_slice(leaf, start, size).reshape(leaf.shape[2:])

    return jax.tree.map(fetch_leaf, stack, is_leaf=_is_on_host)


def widened(layer: Any) -> Any:
    """A layer with its matrices dequantised to float32, as its block expects them."""
    return jax.tree.map(lambda leaf: leaf.matrix() if _is_int8(leaf) else leaf, layer, is_leaf=_is_int8)
