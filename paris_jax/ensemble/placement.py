"""Where an ensemble lies on several devices: groups of them, each with experts of its own.

The mesh of a sampler is (expert, data, fsdp, tensor, sequence). Along `expert` every group of devices holds its own
experts and works on the rows that chose them; along `data` rows are shared out; within a group an expert is split
by the table that splits it in training (`models/axes.py`). Between groups only latents, times, texts and velocities go.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paris_jax.errors import Refused, nearest
from paris_jax.models import axes, functional
from paris_jax.training.sharding import check_network

MESH = ("expert", *axes.MESH)


def make_mesh(splits: Mapping[str, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh of these sizes (1 where none is given) of the first devices; refuses what there are too few for."""
    devices = jax.devices() if devices is None else devices
    for name, size in splits.items():
        if name not in MESH:
            raise Refused(f"mesh {name}: must be one of {', '.join(MESH)}{nearest(name, MESH)}")
        if size < 1:
            raise Refused(f"mesh {name}={size}: must be at least 1")
    sizes = tuple(splits.get(name, 1) for name in MESH)
    count = math.prod(sizes)
    shown = " x ".join(f"{name}={size}" for name, size in splits.items())
    if count > len(devices):
        raise Refused(f"mesh {shown} = {count} devices: there are {len(devices)}")
    if jax.process_count() > 1 and count != len(devices):
        raise Refused(f"mesh {shown} = {count} devices: this job's processes have {len(devices)}, and all must be used")
    return jax.make_mesh(sizes, MESH, axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:count])


def held_by(places: tuple[tuple[int, int], ...], groups: int) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """Which experts each of so many groups holds.

    Args:
      places: of each expert, its kind and its place in the kind's stack.

    Returns:
      The experts of each group, (groups, held) int32, -1 where a place is empty; and of each such place, its kind and
      its place in the group's piece of the kind's stack.
    """
    of_place = {place: expert for expert, place in enumerate(places)}
    kinds = sorted({kind for kind, _ in places})
    each = [-(-sum(k == kind for k, _ in places) // groups) for kind in kinds]  # members of a kind a group holds
    local = tuple((kind, member) for kind in kinds for member in range(each[kind]))
    held = [[of_place.get((kind, g * each[kind] + member), -1) for kind, member in local] for g in range(groups)]
    return np.asarray(held, np.int32), local


def place_experts(stack: functional.Params, mesh: Mesh) -> functional.Params:
    """Stacked parameters (members, ...) of numpy, members shared out over `expert`; empty ones fill up the last."""
    groups, sizes = mesh.shape["expert"], mesh.shape

    def of(name: str, leaf: np.ndarray) -> jax.Array:
        spec = axes.parameter_spec(name, leaf.shape, sizes)
        sharding = NamedSharding(mesh, PartitionSpec("expert", *spec[1:]))
        shape = (len(leaf) + -len(leaf) % groups, *leaf.shape[1:])

        def piece(index: Any) -> np.ndarray:
            found, (first, end, _) = leaf[index], index[0].indices(shape[0])
            missing = end - first - len(found)
            return np.concatenate([found, np.zeros((missing, *found.shape[1:]), leaf.dtype)]) if missing else found

        return jax.make_array_from_callback(shape, sharding, piece)

    flat = functional.to_names(stack)
    return functional.from_names({name: of(name, leaf) for name, leaf in flat.items()})


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on every device of the mesh; without one, on the default device."""
    if mesh is None:
        return jax.tree.map(jax.numpy.asarray, tree)
    place = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), place), tree)


def check(networks: tuple[functional.Config, ...], mesh: Mesh, tokens: int) -> None:
    """Refuses a mesh whose groups cannot share one of the networks."""
    for network in networks:
        check_network(network, mesh, tokens, "mesh ")
