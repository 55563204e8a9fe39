"""Placement of published encoders: sharded over all devices of this machine.

The sharding rules of training (`models.sharding_rules`) split the weights, so that each device holds a share; a batch
is split by its rows.
"""

import functools
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paris_jax.models import sharding_rules
from paris_jax.weights.reading import Later


def dtype() -> str:
    """The compute dtype of encoders: bfloat16, on CPUs float32."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def memory() -> int:
    """Bytes of memory of one of this machine's devices; for a CPU, of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@functools.cache
def mesh() -> Mesh:
    """This machine's devices along `fsdp`, which splits batches and the width of weights."""
    devices = jax.local_devices()
    sizes = [len(devices) if name == "fsdp" else 1 for name in sharding_rules.MESH_AXES]
    return sharding_rules.device_mesh(sharding_rules.MESH_AXES, sizes, devices)


def put(params: Any) -> Any:
    """Reads a tree of `Later` onto the devices, one array at a time; matrices in the compute dtype."""
    return jax.tree_util.tree_map_with_path(_put, params)


def _put(path: Any, later: Later) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    values = later.read(dtype() if is_matrix(name, later.ndim) else np.float32)
    return jax.make_array_from_callback(values.shape, sharding(name, values.shape), lambda index: values[index])


def is_matrix(name: str, ndim: int) -> bool:
    """Whether an array of weights, by name and number of axes, is stored in the compute dtype."""
    return ndim > 2 or name.endswith("tokens")


def sharding(name: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of an array of weights; replicated if the devices do not divide it."""
    split = sharding_rules.parameter_spec(name, shape, mesh().shape)
    count = mesh().size
    fits = all(length % count == 0 for length, by in zip(shape, split, strict=False) if by)
    return NamedSharding(mesh(), split if fits else PartitionSpec())


def rows(*arrays: np.ndarray) -> tuple[jax.Array, ...]:
    """Splits the arrays of a batch over the devices by their first axis.

    Repeats the last row up to a power of two of rows per device, so that few shapes are compiled; the caller cuts the
    results off. A single row is replicated.
    """
    count, devices = len(arrays[0]), mesh().size
    if count == 1:
        place = NamedSharding(mesh(), PartitionSpec())
        return tuple(jax.device_put(array, place) for array in arrays)
    each = 1 << (-(-count // devices) - 1).bit_length()
    more = devices * each - count
    place = NamedSharding(mesh(), PartitionSpec("fsdp"))
    filled = (np.concatenate([a, np.repeat(a[-1:], more, axis=0)]) if more else a for a in map(np.asarray, arrays))
    return tuple(jax.device_put(array, place) for array in filled)
