"""The mesh of a training job, the sharding of its state and batches, and transfers to the host."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paris_jax.config.training import TrainingSettings
from paris_jax.errors import UserError
from paris_jax.models import functional, sharding_rules
from paris_jax.models.flops import GIB
from paris_jax.models.router import RouterConfig


def make_mesh(settings: TrainingSettings, devices: list[Any] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor, sequence) of this job's devices; refuses sizes that do not divide them."""
    devices = jax.devices() if devices is None else devices
    named = {name: getattr(settings, name) for name in sharding_rules.MESH_AXES if name != "data"}
    split = math.prod(named.values())
    if len(devices) % split:
        wanted = " x ".join(f"training.{name}={n}" for name, n in named.items())
        raise UserError(
            f"{wanted} = {split} does not divide the {len(devices)} devices of this job; choose them so that their "
            f"product divides {len(devices)}"
        )
    sizes = (len(devices) // split, *named.values())
    rows = sizes[0] * named["fsdp"]
    parts = rows * settings.grad_accum_steps
    if settings.grad_accum_steps > 1 and settings.global_batch_size % parts:
        raise UserError(
            f"training.global_batch_size={settings.global_batch_size} does not divide into "
            f"training.grad_accum_steps={settings.grad_accum_steps} parts "
            f"over data x fsdp = {rows} devices; choose a multiple of {parts}"
        )
    if settings.global_batch_size % rows:
        raise UserError(
            f"training.global_batch_size={settings.global_batch_size} does not divide over data x fsdp = {rows} of "
            f"the {len(devices)} devices "
            f"of this job; choose a multiple of {rows}, for example "
            f"{max(rows, settings.global_batch_size // rows * rows)}"
        )
    return sharding_rules.device_mesh(sharding_rules.MESH_AXES, sizes, devices)


def check_network(config: functional.Config, mesh: Mesh, tokens: int, prefix: str = "training.") -> None:
    """Refuses a mesh that does not divide a network's width, heads or the video tokens of one sample.

    `prefix` stands before the names of mesh axes in the error.
    """
    fsdp, tensor, sequence = (mesh.shape[name] for name in ("fsdp", "tensor", "sequence"))
    if isinstance(config, RouterConfig) and sequence > 1:
        raise UserError(f"{prefix}sequence={sequence}: a router's tokens are not split; use 1")
    for what, size, by, named in (
        ("width", config.hidden, fsdp * sequence, f"{prefix}fsdp={fsdp} x {prefix}sequence={sequence}"),
        ("heads", config.heads, tensor * sequence, f"{prefix}tensor={tensor} x {prefix}sequence={sequence}"),
        ("tokens of a clip", tokens, sequence, f"{prefix}sequence={sequence}"),
    ):
        if size % by:
            raise UserError(f"{named}: {by} does not divide the network's {size} {what}; choose divisors of {size}")


def state_specs(abstract_state: Any, sizes: Mapping[str, int]) -> Any:
    """A PartitionSpec for every array of a training state, on a mesh of these sizes.

    Moments and average are sharded as their parameter.
    """
    parameters = functional.to_names(abstract_state.params)
    specs = {name: sharding_rules.parameter_spec(name, leaf.shape, sizes) for name, leaf in parameters.items()}

    def of(path: Any, leaf: Any) -> PartitionSpec:
        keys = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path]
        ends = (".".join(keys[i:]) for i in range(len(keys)))
        name = next((end for end in ends if end in parameters), None)
        # State smaller than its parameter (Adafactor's row and column means) is replicated.
        same = name is not None and leaf.shape == parameters[name].shape
        return specs[name] if same and name else PartitionSpec()

    return jax.tree_util.tree_map_with_path(of, abstract_state)


def rows_of_this_process(mesh: Mesh) -> tuple[int, int]:
    """(index, count): the part of the batch that this process loads.

    Processes whose devices hold the same samples (sharded over tensor or sequence) load the same part.
    """
    rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    held: dict[int, set[int]] = {}
    for number, row in enumerate(rows):
        for device in row:
            held.setdefault(device.process_index, set()).add(number)
    parts = sorted({tuple(sorted(numbers)) for numbers in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) != len(rows):
        raise UserError(
            "training.tensor and training.sequence: some processes of this job hold the same samples and others only "
            "some of them; choose their product so that it divides the devices of a process, or is a multiple of them"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, sharding_rules.spec(("batch",), mesh.shape))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """NumPy arrays, the same in every process, on all devices of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, everywhere, lambda part: np.asarray(x[part])), tree
    )


@functools.cache
def _batch_layout(mesh: Mesh) -> tuple[NamedSharding, int]:
    """Sharding of a batch, and the number of its parts; cached, because it is used at every step."""
    return batch_sharding(mesh), rows_of_this_process(mesh)[1]


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of the global batch on its devices."""
    sharding, parts = _batch_layout(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows, (len(rows) * parts, *rows.shape[1:]))
        for name, rows in batch.items()
    }


def to_host(tree: Any) -> Any:
    """A tree of device arrays as NumPy arrays in process 0, None elsewhere; every process of the job has to call it.

    Arrays sharded over processes are gathered layer by layer, so that no device holds more than one gathered layer.
    """
    kept = jax.process_index() == 0
    gathered = jax.tree.map(lambda leaf: _gather(leaf, kept), tree)
    return gathered if kept else None


def _gather(leaf: jax.Array, kept: bool) -> np.ndarray | None:
    if leaf.is_fully_addressable:
        return np.asarray(leaf) if kept else None
    assert isinstance(leaf.sharding, NamedSharding)
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    if leaf.ndim < 3:
        whole = jax.jit(lambda x: x, out_shardings=everywhere)(leaf)
        return np.asarray(whole.addressable_data(0)) if kept else None
    layer = jax.jit(lambda x, i: x[i], out_shardings=everywhere)
    # A collective: every process computes each layer.
    layers = (layer(leaf, i).addressable_data(0) for i in range(leaf.shape[0]))
    held = [np.asarray(piece) for piece in layers if kept]
    return np.stack(held) if kept else None


def bytes_per_device(tree: Any) -> float:
    """Bytes of a tree of arrays, or of their shapes, on each device, counted from shapes and shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def in_gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
