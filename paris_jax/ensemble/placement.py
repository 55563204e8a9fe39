"""Where an ensemble lies on several devices: groups of them, each with experts of its own.

The mesh of a sampler is (expert, data, fsdp, tensor, sequence). Along `expert` every group of devices holds its own
experts and works on the rows that chose them; along `data` rows are shared out; within a group an expert is split
by the table that splits it in training (`models/axes.py`). Between groups only latents, times, texts and velocities go.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from paris_jax import checks
from paris_jax.errors import Refused, nearest
from paris_jax.models import axes, functional, stacks
from paris_jax.training.sharding import check_network

MESH = ("expert", *axes.MESH)
WEIGHTS = ("auto", "int8")


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


@dataclasses.dataclass(frozen=True)
class Keeping:
    """How experts are kept.

    Attributes:
      mesh: devices they are spread over; None for one.
      weights: "auto", as they are computed with, or "int8", their blocks' matrices as 8-bit integers.
      offload: the blocks' matrices lie in the host's memory, from where they come to the device layer by layer.
    """

    mesh: Mesh | None = None
    weights: str = "auto"
    offload: bool = False

    def place(self, config: functional.Config, experts: list[functional.Params]) -> functional.Params:
        """Experts of one kind, of numpy, stacked where they are used, (members, ...).

        On a mesh, members are shared out over `expert`; empty ones fill up the last group.
        """
        dtype = jnp.dtype(getattr(config, "dtype", "float32"))
        groups = self.mesh.shape["expert"] if self.mesh else 1
        experts = [*experts, *[jax.tree.map(np.zeros_like, experts[0])] * (-len(experts) % groups)]

        def laid(path: Any, *leaves: np.ndarray) -> Any:
            keys = [key.key for key in path]
            # What only enters products is rounded to their type there anyway.
            stack = np.stack([leaf.astype(dtype) if keys[-1] == "kernel" else leaf for leaf in leaves])
            if self.weights != "int8" or keys[-1] != "kernel" or keys[0] not in functional.BLOCKS:
                return self._put(keys, stack)
            found = stacks.Int8.of(stack)
            return stacks.Int8(self._put([*keys, "values"], found.values), self._put([*keys, "scale"], found.scale))

        return jax.tree_util.tree_map_with_path(laid, *experts)

    def _put(self, keys: list[str], leaf: np.ndarray) -> Any:
        """One stacked array in its place."""
        sizes = self.mesh.shape if self.mesh else {}
        named = ".".join(key for key in keys if key != "values")
        away = self.offload and keys[0] in functional.BLOCKS and keys[-1] in ("kernel", "values")
        split = () if keys[-1] == "scale" else axes.parameter_spec(named, leaf.shape, sizes)[1:]
        if away and keys[-1] == "values":
            self._check_words(named, leaf.shape[-2], *split[1:2])
            leaf = stacks.words(leaf)
        if away:
            leaf, split = leaf.reshape(-1, *leaf.shape[2:]), split[1:]
        memory = "pinned_host" if away else "device"
        if self.mesh is None and not away:
            placed = jnp.asarray(leaf)
        elif self.mesh is None:
            placed = jax.device_put(leaf, SingleDeviceSharding(jax.local_devices()[0], memory_kind=memory))
        else:
            sharding = NamedSharding(self.mesh, PartitionSpec("expert", *split), memory_kind=memory)
            placed = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
        return stacks.OnHost(placed) if away else placed

    def _check_words(self, name: str, inputs: int, split: str | tuple[str, ...] | None = None) -> None:
        """Refuses a matrix whose inputs cannot go in words of four, each on one device of those they are split over."""
        over = (split,) if isinstance(split, str) else split or ()
        pieces = math.prod(self.mesh.shape[name] for name in over) if self.mesh else 1
        if inputs % (4 * pieces):
            raise Refused(
                f"weights='int8' with offload: {name} has {inputs} inputs over {pieces} devices, and four go together; "
                "keep the experts on the device, or choose a mesh that leaves each a multiple of 4"
            )


def keeping(splits: Mapping[str, int] | None, weights: str, offload: bool) -> Keeping:
    """How experts are kept, as a caller names it; refuses what cannot be."""
    mesh = make_mesh(splits) if splits else None
    for problem in checks.choice("weights", weights, WEIGHTS):
        raise Refused(problem)
    return Keeping(mesh, weights, offload)


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on every device of the mesh; without one, on the default device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    place = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), place), tree)


def check(networks: tuple[functional.Config, ...], mesh: Mesh, tokens: int) -> None:
    """Refuses a mesh whose groups cannot share one of the networks."""
    for network in networks:
        check_network(network, mesh, tokens, "mesh ")
