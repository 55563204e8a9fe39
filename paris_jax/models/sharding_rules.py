"""Sharding rules: one table from the axes of arrays to the axes of the mesh.

The mesh of a job is (data, fsdp, tensor, sequence). `data` and `fsdp` split the batch, `fsdp` and `sequence` the stored
parameters (Rajbhandari et al. 2020), `tensor` the heads and hidden features (Shoeybi et al. 2019), and `sequence` the
tokens of long videos outside attention and the heads inside it (Jacobs et al. 2023). XLA's partitioner inserts the
communication. Optimizer moments and EMA have the sharding of their parameter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
# Array axis -> mesh axes that shard it. Axes not listed are replicated.
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    "heads": ("tensor",),  # features laid out head by head, and hidden features
    "attending": ("tensor", "sequence"),  # heads inside attention, where all tokens are on each device
    "width": ("fsdp", "sequence"),  # of parameters; the width of activations is replicated
}
# Suffix of a parameter's name -> names of its last axes. The layer axis of a stack is never sharded; parameters not
# listed (norms, biases of replicated activations) are replicated.
PARAMETER_RULES: dict[str, tuple[str | None, ...]] = {
    "modulation.out.kernel": ("width", "heads"),
    "modulation.out.bias": ("heads",),
    "qkv.kernel": ("width", "heads"),
    "qkv.bias": ("heads",),
    "qkv_mlp.kernel": ("width", "heads"),
    "qkv_mlp.bias": ("heads",),
    "mlp_in.kernel": ("width", "heads"),
    "mlp_in.bias": ("heads",),
    "mlp_out.kernel": ("heads", "width"),
    "out.kernel": ("heads", "width"),
    "inner.kernel": (None, "width"),
    "outer.kernel": (None, "width"),
    "video_in.kernel": (None, "width"),
    "cond_in.kernel": (None, "width"),
    "text_in.kernel": (None, "width"),
    "final_modulation.out.kernel": ("width", None),
    "velocity_out.kernel": ("width", None),
    # Published encoders, whose matrices are (outputs, inputs).
    "attention.q.weight": ("heads", "width"),
    "attention.k.weight": ("heads", "width"),
    "attention.v.weight": ("heads", "width"),
    "attention.out.weight": ("width", "heads"),
    "mlp.gate.weight": ("heads", "width"),
    "mlp.in.weight": ("heads", "width"),
    "mlp.out.weight": ("width", "heads"),
    "tokens": (None, "width"),
}
SMALLEST_SPLIT = 2**14  # elements; sharding a smaller array costs more than it saves


def device_mesh(names: Sequence[str], sizes: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """A mesh of devices that follows their physical topology.

    Axes of the mesh may share an axis of the topology: 8 x 2 of the 4 x 4 chips of a v6e slice, for one.
    """
    assigned = mesh_utils.create_device_mesh(tuple(sizes), list(devices), allow_split_physical_axes=True)
    return Mesh(assigned, tuple(names), axis_types=(AxisType.Auto,) * len(names))


def parameter_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of a parameter on a mesh of these axis sizes, by its name (`a.b.c`, as in files)."""
    matches = [suffix for suffix in PARAMETER_RULES if name == suffix or name.endswith("." + suffix)]
    if not matches or math.prod(shape) < SMALLEST_SPLIT:
        return PartitionSpec()
    axes = PARAMETER_RULES[max(matches, key=len)]
    return spec((None,) * (len(shape) - len(axes)) + axes, sizes)


def spec(axes: tuple[str | None, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of named axes, without mesh axes of size 1."""
    split = [tuple(m for m in ACTIVATION_RULES[name] if sizes.get(m, 1) > 1) if name else () for name in axes]
    while split and not split[-1]:
        split.pop()
    return PartitionSpec(*(s if len(s) > 1 else s[0] if s else None for s in split))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation: one name of `ACTIVATION_RULES`, or None, for each of its axes.

    Returns `x` unchanged without a mesh or on one device. Manual mesh axes (`jax.shard_map`) are left out. An axis of
    the array that its mesh axes do not divide is replicated, such as the small batch of a sampler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, axes_that_divide(mesh, x.shape, *axes))


def axes_that_divide(mesh: jax.sharding.AbstractMesh, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array of this shape by the rules of `constrain`."""
    sizes = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}

    def divides(name: str | None, length: int) -> bool:
        return name is not None and length % math.prod(sizes.get(m, 1) for m in ACTIVATION_RULES[name]) == 0

    return spec(tuple(a if divides(a, length) else None for a, length in zip(axes, shape, strict=False)), sizes)
