"""How arrays are split over a slice: the one table from their axes to the axes of the mesh.

The mesh of a job is (data, fsdp, tensor, sequence). `data` and `fsdp` split the batch, `fsdp` and `sequence` the stored
parameters (Rajbhandari et al. 2020), `tensor` the heads and hidden features (Shoeybi et al. 2019), and `sequence` the
tokens of long videos between attentions, inside which it splits heads too (Jacobs et al. 2023). XLA's partitioner
inserts the communication. Optimizer moments and EMA lie where their parameter lies.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
# An axis of an array, and the axes of the mesh that split it. Unnamed axes are whole everywhere.
ACTIVATION_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("sequence",),
    "heads": ("tensor",),  # features that are laid out head by head, and hidden features
    "attending": ("tensor", "sequence"),  # the heads inside attention, where every token is seen
    "width": ("fsdp", "sequence"),  # of parameters; activations keep their width whole
}
# The end of a parameter's name, and the names of its last axes. A stack's layers are never told apart, and what is not
# listed (norms, biases added to whole activations) is whole everywhere.
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
    # Of published encoders, whose matrices are (outputs, inputs).
    "attention.q.weight": ("heads", "width"),
    "attention.k.weight": ("heads", "width"),
    "attention.v.weight": ("heads", "width"),
    "attention.out.weight": ("width", "heads"),
    "mlp.gate.weight": ("heads", "width"),
    "mlp.in.weight": ("heads", "width"),
    "mlp.out.weight": ("width", "heads"),
    "tokens": (None, "width"),
}
SMALLEST_SPLIT = 2**14  # elements; below it, splitting costs more than it saves


def parameter_spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """Where a parameter lies on a mesh of these sizes, by its name (`a.b.c`, as in files)."""
    ends = [end for end in PARAMETER_RULES if name == end or name.endswith("." + end)]
    if not ends or math.prod(shape) < SMALLEST_SPLIT:
        return PartitionSpec()
    named = PARAMETER_RULES[max(ends, key=len)]
    return spec((None,) * (len(shape) - len(named)) + named, sizes)


def spec(axes: tuple[str | None, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The PartitionSpec of named axes, without the axes of the mesh that split nothing."""
    split = [tuple(m for m in ACTIVATION_RULES[name] if sizes.get(m, 1) > 1) if name else () for name in axes]
    while split and not split[-1]:
        split.pop()
    return PartitionSpec(*(s if len(s) > 1 else s[0] if s else None for s in split))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Says how an activation is split, one name for each of its axes; on no mesh, and on one device, says nothing.

    Axes of the mesh that are split by hand around this code are not named; nor are those that do not divide an axis of
    the array: a sampler's few rows are whole where training's batch is split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, axes_that_divide(mesh, x.shape, *axes))


def axes_that_divide(mesh: jax.sharding.AbstractMesh, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
    """How an array of this shape is split, see `constrain`."""
    sizes = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}

    def divides(name: str | None, length: int) -> bool:
        return name is not None and length % math.prod(sizes.get(m, 1) for m in ACTIVATION_RULES[name]) == 0

    return spec(tuple(a if divides(a, length) else None for a, length in zip(axes, shape, strict=False)), sizes)
