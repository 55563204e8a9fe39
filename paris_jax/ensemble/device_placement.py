"""An ensemble's networks where they lie, and the sampler's compiled functions called there."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from paris_jax.artifacts import ensemble_manifest
from paris_jax.config import checks
from paris_jax.diffusion import solvers
from paris_jax.ensemble import progress, sparse_velocity
from paris_jax.errors import UserError, nearest
from paris_jax.models import functional, sharding_rules, stacks
from paris_jax.models.dit import video_tokens
from paris_jax.training.sharding import check_network

MESH_AXES = ("expert", *sharding_rules.MESH_AXES)
WEIGHT_DTYPES = ("auto", "int8")


@dataclasses.dataclass(frozen=True)
class PlacementOptions:
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
        split = () if keys[-1] == "scale" else sharding_rules.parameter_spec(named, leaf.shape, sizes)[1:]
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
            raise UserError(
                f"weights='int8' with offload: {name} has {inputs} inputs over {pieces} devices, and four go together; "
                "keep the experts on the device, or choose a mesh that leaves each a multiple of 4"
            )


def placement_options(splits: Mapping[str, int] | None, weights: str, offload: bool) -> PlacementOptions:
    """How experts are kept, as a caller names it; refuses what cannot be."""
    mesh = make_ensemble_mesh(splits) if splits else None
    for problem in checks.choice("weights", weights, WEIGHT_DTYPES):
        raise UserError(problem)
    return PlacementOptions(mesh, weights, offload)


def make_ensemble_mesh(splits: Mapping[str, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh of these sizes (1 where none is given) of the first devices; refuses what there are too few for."""
    devices = jax.devices() if devices is None else devices
    for name, size in splits.items():
        if name not in MESH_AXES:
            raise UserError(f"mesh {name}: must be one of {', '.join(MESH_AXES)}{nearest(name, MESH_AXES)}")
        if size < 1:
            raise UserError(f"mesh {name}={size}: must be at least 1")
    sizes = tuple(splits.get(name, 1) for name in MESH_AXES)
    count = math.prod(sizes)
    shown = " x ".join(f"{name}={size}" for name, size in splits.items())
    if count > len(devices):
        raise UserError(f"mesh {shown} = {count} devices: there are {len(devices)}")
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(
            f"mesh {shown} = {count} devices: this job's processes have {len(devices)}, and all must be used"
        )
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes), devices=devices[:count])


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on every device of the mesh; without one, on the default device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    place = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), place), tree)


def check_mesh(networks: tuple[functional.Config, ...], mesh: Mesh, tokens: int) -> None:
    """Refuses a mesh whose groups cannot share one of the networks."""
    for network in networks:
        check_network(network, mesh, tokens, "mesh ")


class PlacedEnsemble:
    """What is computed with.

    Attributes:
      networks: the kinds of expert.
      places: of each expert, its kind and its place in the kind's stack.
      router: its config, or None for one expert on its own.
      mesh: the devices that they are spread over; None for one.
    """

    def __init__(self, parts: ensemble_manifest.ExportedEnsemble, clusters: list[int], keeping: PlacementOptions):
        experts = [parts.experts[k] for k in clusters]
        self.networks = tuple(dict.fromkeys(expert.config for expert in experts))  # each kind once
        members = [[e for e in experts if e.config == kind] for kind in self.networks]
        self.places = tuple((kind, members[kind].index(e)) for e in experts for kind in [self.networks.index(e.config)])
        self.router = parts.router.config if parts.router else None
        self.mesh = keeping.mesh
        self.check(parts.shared["latent"]["shape"])

        def place() -> sparse_velocity.EnsembleParams:
            stacks = tuple(keeping.place(each[0].config, [expert.params for expert in each]) for each in members)
            router = replicate(parts.router.params if parts.router else None, self.mesh)
            return sparse_velocity.EnsembleParams(stacks, router, replicate(np.asarray(clusters, np.int32), self.mesh))

        self._place = place

    @functools.cached_property
    def arrays(self) -> sparse_velocity.EnsembleParams:
        """The experts and the router, brought to their places when they are first used."""
        with jax.ensure_compile_time_eval():  # also where they are first used inside a caller's own program
            arrays = self._place()
        del self._place  # and with it what it was read into
        return arrays

    def check(self, latent_shape: tuple[int, ...]) -> None:
        """Refuses latents (T, H, W, C) whose tokens the devices of a group cannot share."""
        if self.mesh:
            check_mesh(self.networks, self.mesh, video_tokens(latent_shape))

    def run(self, function: Callable[..., Any], plan: sparse_velocity.SamplerConfig, x: jax.Array, *inputs: Any) -> Any:
        """Calls a compiled function of the sampler on latents x (N, T, H, W, C) and more."""
        self.check(x.shape[1:])
        with self._there():
            return function(plan, self.arrays, *(replicate(each, self.mesh) for each in (x, *inputs)))

    def draw(
        self,
        plan: sparse_velocity.SamplerConfig,
        noise: jax.Array,
        inputs: tuple[Any, ...],
        bar: bool,
        every: int,
        preview: progress.Preview | None,
    ) -> solvers.State:
        """Where the solver stands after all steps; `inputs` are the sampler's, from the keys on."""
        self.check(noise.shape[1:])
        steps = inputs[1].shape[0] - 1
        with self._there():
            state, inputs = replicate((sparse_velocity.initial_state(plan, noise, steps), inputs), self.mesh)
        if self.mesh is None:  # where every later state is, for one program to take all steps
            (device,) = self.arrays.clusters.devices()
            state = jax.device_put(state, device)

        def advance(state: solvers.State, first: int, last: int) -> solvers.State:
            with self._there():  # and not around what previews do
                return sparse_velocity.take_steps(plan, self.arrays, state, first, last, *inputs)

        if not bar and not preview:
            return advance(state, 0, steps)
        together = self.mesh is not None and len({device.process_index for device in self.mesh.devices.flat}) > 1
        return progress.run_with_progress(advance, state, steps, bar, every, preview, together)

    def _there(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()
