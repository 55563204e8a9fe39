"""Device placement of an ensemble: meshes, int8 weights, offload to host memory, calls of compiled functions."""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from paris_jax.artifacts import ensemble_manifest
from paris_jax.config import checks
from paris_jax.diffusion import solvers, timesteps
from paris_jax.ensemble import progress, sparse_velocity
from paris_jax.errors import UserError, nearest
from paris_jax.models import functional, precision, sharding_rules, stacks
from paris_jax.models.dit import video_tokens
from paris_jax.training.sharding import check_network

logger = logging.getLogger(__name__)
MESH_AXES = ("expert", *sharding_rules.MESH_AXES)
WEIGHT_DTYPES = ("auto", "int8")
COMPUTE_DTYPES = ("", "float32", "bfloat16", "float16")
LACKS_BFLOAT16 = (
    "this GPU (compute capability %s) has no bfloat16: computing in float32, which takes twice the memory; "
    "compute_dtype=float16 takes half of that and is faster, and an overflow is an error"
)


@dataclasses.dataclass(frozen=True)
class PlacementOptions:
    """Placement of the experts' parameters.

    Attributes:
      mesh: devices of the ensemble; None for one device.
      weights_dtype: "auto", the dtype of the computation, or "int8" for the matrices of the blocks.
      offload: keep the matrices of the blocks in host memory and fetch them layer by layer.
      compute_dtype: dtype of the computation; "" for that of each network's training, or float32 where that is bfloat16
        and the GPU has none.
    """

    mesh: Mesh | None = None
    weights_dtype: str = "auto"
    offload: bool = False
    compute_dtype: str = ""

    def config(self, network: functional.Config) -> functional.Config:
        """A network's config with the dtype of the computation."""
        dtype, (platform, capability) = self.compute_dtype or network.dtype, precision.current_device()
        emulated = dtype == "bfloat16" and platform != "cpu" and not precision.has_bfloat16(platform, capability)
        if emulated and not self.compute_dtype:
            logger.info(LACKS_BFLOAT16, capability)
            dtype = "float32"
        return dataclasses.replace(network, dtype=dtype)

    def place(self, config: functional.Config, experts: list[functional.Params]) -> functional.Params:
        """Stacks the experts of one architecture (NumPy) on their devices, (members, ...).

        On a mesh, members are sharded over `expert`; the last group is padded with zeros.
        """
        dtype = jnp.dtype(getattr(config, "dtype", "float32"))
        groups = self.mesh.shape["expert"] if self.mesh else 1
        experts = [*experts, *[jax.tree.map(np.zeros_like, experts[0])] * (-len(experts) % groups)]

        def put(path: Any, *leaves: np.ndarray) -> Any:
            keys = [key.key for key in path]
            # Kernels enter products only, which round them to this dtype anyway.
            stack = np.stack([leaf.astype(dtype) if keys[-1] == "kernel" else leaf for leaf in leaves])
            if self.weights_dtype != "int8" or keys[-1] != "kernel" or keys[0] not in functional.BLOCKS:
                return self._put(keys, stack)
            quantized = stacks.Int8.of(stack)
            values = self._put([*keys, "values"], quantized.values)
            return stacks.Int8(values, self._put([*keys, "scale"], quantized.scale))

        return jax.tree_util.tree_map_with_path(put, *experts)

    def _put(self, keys: list[str], leaf: np.ndarray) -> Any:
        """One stacked array on its devices."""
        sizes = self.mesh.shape if self.mesh else {}
        name = ".".join(key for key in keys if key != "values")
        offloaded = self.offload and keys[0] in functional.BLOCKS and keys[-1] in ("kernel", "values")
        split = () if keys[-1] == "scale" else sharding_rules.parameter_spec(name, leaf.shape, sizes)[1:]
        if offloaded and keys[-1] == "values":
            self._check_words(name, leaf.shape[-2], *split[1:2])
            leaf = stacks.words(leaf)
        if offloaded:
            leaf, split = leaf.reshape(-1, *leaf.shape[2:]), split[1:]
        memory = "pinned_host" if offloaded else "device"
        if self.mesh is None and not offloaded:
            array = jnp.asarray(leaf)
        elif self.mesh is None:
            array = jax.device_put(leaf, SingleDeviceSharding(jax.local_devices()[0], memory_kind=memory))
        else:
            sharding = NamedSharding(self.mesh, PartitionSpec("expert", *split), memory_kind=memory)
            array = jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
        return stacks.OnHost(array) if offloaded else array

    def _check_words(self, name: str, inputs: int, split: str | tuple[str, ...] | None = None) -> None:
        """Refuses a matrix whose inputs, four to a 32-bit word, do not divide over the devices that share them."""
        over = (split,) if isinstance(split, str) else split or ()
        shards = math.prod(self.mesh.shape[name] for name in over) if self.mesh else 1
        if inputs % (4 * shards):
            raise UserError(
                f"weights_dtype='int8' with offload: {name} has {inputs} inputs over {shards} devices, and four share "
                "a word; "
                "keep the experts on the device, or choose a mesh that gives each device a multiple of 4"
            )


def placement_options(
    axes: Mapping[str, int] | None, weights_dtype: str, offload: bool, compute_dtype: str = ""
) -> PlacementOptions:
    """Placement options from the arguments of `Ensemble.load`; refuses an impossible mesh or dtype."""
    mesh = make_ensemble_mesh(axes) if axes else None
    for problem in checks.choice("weights_dtype", weights_dtype, WEIGHT_DTYPES):
        raise UserError(problem)
    for problem in checks.choice("compute_dtype", compute_dtype, COMPUTE_DTYPES):
        raise UserError(problem)
    return PlacementOptions(mesh, weights_dtype, offload, compute_dtype)


def make_ensemble_mesh(axes: Mapping[str, int], devices: list[Any] | None = None) -> Mesh:
    """A mesh of these sizes (1 where none is given) of the first devices; refuses more than there are."""
    devices = jax.devices() if devices is None else devices
    for name, size in axes.items():
        if name not in MESH_AXES:
            raise UserError(f"mesh {name}: must be one of {', '.join(MESH_AXES)}{nearest(name, MESH_AXES)}")
        if size < 1:
            raise UserError(f"mesh {name}={size}: must be at least 1")
    sizes = tuple(axes.get(name, 1) for name in MESH_AXES)
    count = math.prod(sizes)
    shown = " x ".join(f"{name}={size}" for name, size in axes.items())
    if count > len(devices):
        raise UserError(f"mesh {shown} = {count} devices: there are {len(devices)}")
    if jax.process_count() > 1 and count != len(devices):
        raise UserError(
            f"mesh {shown} = {count} devices: this job's processes have {len(devices)}, and all must be used"
        )
    return sharding_rules.device_mesh(MESH_AXES, sizes, devices[:count])


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays on every device of the mesh; without one, on the default device."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    place = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf), place), tree)


def check_mesh(networks: tuple[functional.Config, ...], mesh: Mesh, tokens: int) -> None:
    """Refuses a mesh whose groups cannot shard one of the networks."""
    for network in networks:
        check_network(network, mesh, tokens, "mesh ")


class PlacedEnsemble:
    """The experts and the router on their devices.

    Attributes:
      networks: the architectures of the experts.
      slots: for each expert, the index of its architecture and its index in that architecture's stack.
      router: config of the router, or None for a single expert.
      mesh: devices of the ensemble; None for one device.
    """

    def __init__(self, exported: ensemble_manifest.ExportedEnsemble, clusters: list[int], options: PlacementOptions):
        experts = [exported.experts[k] for k in clusters]
        configs = [options.config(expert.config) for expert in experts]
        self.networks = tuple(dict.fromkeys(configs))  # each architecture once
        members = [[e for e, c in zip(experts, configs, strict=True) if c == kind] for kind in self.networks]
        kinds = [self.networks.index(config) for config in configs]
        self.slots = tuple((kind, members[kind].index(e)) for e, kind in zip(experts, kinds, strict=True))
        self.router = options.config(exported.router.config) if exported.router else None
        self.mesh = options.mesh
        self.check(exported.shared.latent.shape)

        def place() -> sparse_velocity.EnsembleParams:
            stacks = tuple(
                options.place(config, [expert.params for expert in each])
                for config, each in zip(self.networks, members, strict=True)
            )
            router = replicate(exported.router.params if exported.router else None, self.mesh)
            return sparse_velocity.EnsembleParams(stacks, router, replicate(np.asarray(clusters, np.int32), self.mesh))

        self._place = place

    @functools.cached_property
    def params(self) -> sparse_velocity.EnsembleParams:
        """Parameters of the experts and the router, placed at their first use."""
        with jax.ensure_compile_time_eval():  # also inside a caller's own jit
            params = self._place()
        del self._place  # frees the host copy
        return params

    def check(self, latent_shape: tuple[int, ...]) -> None:
        """Refuses latents (T, H, W, C) whose tokens do not divide over the devices of a group."""
        if self.mesh:
            check_mesh(self.networks, self.mesh, video_tokens(latent_shape))

    def run(
        self, function: Callable[..., Any], config: sparse_velocity.SamplerConfig, x: jax.Array, *inputs: Any
    ) -> Any:
        """Calls a compiled function of the sampler on latents x (N, T, H, W, C) and more."""
        self.check(x.shape[1:])
        with self._mesh_context():
            return function(config, self.params, *(replicate(each, self.mesh) for each in (x, *inputs)))

    def draw(
        self,
        config: sparse_velocity.SamplerConfig,
        noise: jax.Array,
        inputs: tuple[Any, ...],
        watcher: progress.Watcher,
    ) -> solvers.State:
        """The solver state after all steps; `inputs` are those of `take_steps`, from `keys_B2` on.

        Traces of the state hold `timesteps.capacity(S)` steps, zeros after the last.
        """
        self.check(noise.shape[1:])
        keys_B2, schedule, condition, fixed_expert_S = inputs
        steps = schedule.shape[0] - 1
        capacity = timesteps.capacity(steps)  # one compiled program for every number of steps up to it
        schedule = timesteps.padded(schedule, capacity + 1)
        inputs = keys_B2, schedule, condition, timesteps.padded(fixed_expert_S, capacity)
        with self._mesh_context():
            state, inputs = replicate((sparse_velocity.initial_state(config, noise, capacity), inputs), self.mesh)
        if self.mesh is None:  # committed as later states are: one compiled program for all steps
            (device,) = self.params.clusters.devices()
            state = jax.device_put(state, device)

        def advance(state: solvers.State, first: int, last: int) -> solvers.State:
            with self._mesh_context():  # callbacks run outside of the mesh
                return sparse_velocity.take_steps(config, self.params, state, first, last, *inputs)

        if not watcher.active:
            return advance(state, 0, steps)
        together = self.mesh is not None and len({device.process_index for device in self.mesh.devices.flat}) > 1
        return progress.run_with_progress(advance, state, steps, watcher, together)

    def _mesh_context(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()
