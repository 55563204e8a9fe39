"""The training state: parameters, their average and the optimizer state; fresh, or from existing weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from paris_jax.artifacts import ensemble_manifest, exported, manifest, schemas, weight_files
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.tensors import Tensors
from paris_jax.config.training import TrainingSettings
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.training.job import Job
from paris_jax.training.optimizer import optimizer
from paris_jax.weights.convert import FRESH, read_manifest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that is saved and restored, except the data position.

    It has no key: every random number is a function of the seed, `step` and the sample's global index.
    """

    step: jax.Array  # () int32, number of updates
    params: functional.Params  # float32
    ema: functional.Params  # float32, initialised with the parameters
    opt_state: Any


def create(config: functional.Config, settings: TrainingSettings, steps: int, key: jax.Array) -> TrainState:
    """A fresh state; call it under jit with out_shardings to create it sharded."""
    params = functional.init(config, key)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer(settings, steps).init(params))


def initial_weights_hashes(run: RunFolder, role: Role, job: Job) -> dict[str, str] | None:
    """Hashes of a job's initial weights, stored beside its checkpoints; a resumed job does not need the weights."""
    if not job.settings.init_from:
        return None
    kept, checkpoints = run.role(role) / "start.json", run.checkpoints(role)
    if kept.exists() and checkpoints.exists() and any(checkpoints.iterdir()):
        return manifest.read_json(kept, dict[schemas.FileName, schemas.Sha256])
    hashes = weight_hashes(job.settings.init_from, job.config)
    manifest.write_json(kept, hashes)
    return hashes


# Fields in which a network may differ from its initial weights.
FREE_FIELDS = ("remat", "dtype", "cond_frames", "prediction_type", "attention")


def check_initial_weights(
    folder: epath.PathLike, config: functional.Config
) -> schemas.NetworkManifest | schemas.WeightsManifest:
    """The manifest of initial weights for a network of this config.

    Raises:
      UserError: incomplete weights, or another network, naming the fields.
    """
    folder = ensemble_manifest.resolve(folder)
    found = read_manifest(folder)
    network = exported.network(found, folder)
    expected = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_FIELDS}
    differ = [
        f"{name} {getattr(network, name, None)} instead of {value}"
        for name, value in expected.items()
        if getattr(network, name, None) != value
    ]
    if differ:
        raise UserError(
            f"{folder} holds another network: {', '.join(differ)}; choose network.preset to fit, or other weights"
        )
    weights = weight_files.location(folder, found.files)
    tensors = Tensors(weights).shapes
    problems = [
        name
        for name, leaf in functional.to_names(functional.abstract(config)).items()
        if tensors.get(name, (leaf.shape,) if name.startswith(FRESH) else (None,))[0] != leaf.shape
    ]
    if problems:
        raise UserError(f"{weights} lacks {', '.join(problems)}, or has them in another shape; copy it again")
    if network.cond_frames and not config.cond_frames:
        raise UserError(f"{folder} has an input for conditioning frames; set config.masks, so that it is used")
    return found


def weight_hashes(folder: epath.PathLike, config: functional.Config) -> dict[str, str]:
    """SHA-256 of the files of initial weights; refuses those that `check_initial_weights` refuses."""
    return {name: entry.sha256 for name, entry in check_initial_weights(folder, config).files.items()}


def load_initial_weights(folder: epath.PathLike, state: TrainState) -> TrainState:
    """The state with parameters and average from `folder`; each device reads its own shard.

    An input for conditioning frames that the weights lack stays zero-initialised.
    """
    folder = ensemble_manifest.resolve(folder)
    tensors = Tensors(weight_files.location(folder, read_manifest(folder).files))

    def read(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name not in tensors.shapes and name.startswith(FRESH):
            return leaf

        shape, dtype, sharding = leaf.shape, leaf.dtype, leaf.sharding

        def part(index: Any) -> np.ndarray:
            return np.asarray(tensors.read(name, index), dtype)

        leaf.delete()
        return jax.make_array_from_callback(shape, sharding, part)

    for leaf in jax.tree.leaves(state.ema):  # frees the memory before the weights are read
        leaf.delete()
    params = jax.tree_util.tree_map_with_path(read, state.params)
    return dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, params))
