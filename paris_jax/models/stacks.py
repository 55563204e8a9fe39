"""Stacked networks: reading the layers of one network in place, from device or host memory.

A stack holds the blocks of every network, (members, layers, ...). Its matrices may be 8-bit integers with a scale for
each output; and it may lie in the host's memory, from where a layer at a time comes to the device, the next one while
the one before is at work. Nothing else has to know.
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
    """Matrices (..., inputs, outputs) as values * scale: int8, and float32 (..., 1, outputs).

    The values may be `words`, four of them each.
    """

    values: Any
    scale: Any

    @classmethod
    def of(cls, matrices: np.ndarray) -> "Int8":
        """Rounds to the nearest of 255 steps, the last being the largest weight of each output."""
        values = np.empty(matrices.shape, np.int8)
        scale = np.empty((*matrices.shape[:-2], 1, matrices.shape[-1]), np.float32)
        for each in np.ndindex(matrices.shape[:-2]):  # one at a time: all in float32 would double the memory
            matrix = matrices[each].astype(np.float32)
            largest = np.abs(matrix).max(-2, keepdims=True) / 127
            scale[each] = np.where(largest > 0, largest, 1)
            values[each] = np.round(matrix / scale[each])
        return cls(values, scale)

    def matrix(self) -> Any:
        values = self.values if self.values.dtype == jnp.int8 else _bytes(self.values)
        return values.astype(jnp.float32) * self.scale


def words(values: np.ndarray) -> np.ndarray:
    """int8 (..., inputs, outputs) as int32 (..., inputs / 4, outputs): of 4 x 32 rows, a quarter in each byte of words.

    A TPU tiles bytes in its host's memory otherwise than where it cuts them, and would bring the whole stack over, and
    back, for every layer; words it cuts where they lie. 32 rows are the height of a tile of bytes, so that no row moves
    inside its tile when the quarters are put one below another again.
    """
    rows = _rows(values.shape[-2] // 4)
    quarters = values.reshape(*values.shape[:-2], -1, 4, rows, values.shape[-1])
    together = np.ascontiguousarray(np.moveaxis(quarters, -3, -1)).view("<i4")
    return together.reshape(*values.shape[:-2], -1, values.shape[-1])


def _bytes(words: jax.Array) -> jax.Array:
    """The inverse of `words`: int32 (rows, outputs) as int8 (4 rows, outputs)."""
    count, outputs = words.shape
    blocks = words.reshape(-1, _rows(count), outputs)
    quarters = [((blocks << left) >> 24).astype(jnp.int8) for left in (24, 16, 8, 0)]
    return jnp.stack(quarters, 1).reshape(4 * count, outputs)


def _rows(words: int) -> int:
    """The number of consecutive rows that are unpacked together."""
    return math.gcd(words, 32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnHost:
    """An array in host memory, with one leading axis for the layers of all members, (members * layers, ...).

    A TPU copies from there what is cut along one axis only.
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

    def of(leaf: Any) -> jax.Array:
        if _is_on_host(leaf):
            piece = jax.lax.dynamic_index_in_dim(leaf.layers, member * layers + layer, keepdims=False)
            return jax.device_put(piece, jax.memory.Space.Device)
        start, size = (member, layer, *(0,) * (leaf.ndim - 2)), (1, 1, *leaf.shape[2:])
        return jax.lax.dynamic_slice(leaf, start, size).reshape(leaf.shape[2:])

    return jax.tree.map(of, stack, is_leaf=_is_on_host)


def widened(layer: Any) -> Any:
    """A layer with its matrices dequantised to floats, as a block takes it."""
    return jax.tree.map(lambda leaf: leaf.matrix() if _is_int8(leaf) else leaf, layer, is_leaf=_is_int8)
