"""`paris-jax train`: one expert, the monolith or the router, on its own data, to a part that can be admitted."""

import contextlib
import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp

from paris_jax.artifacts import exported, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import ClusterManifest, NetworkManifest
from paris_jax.config import hashing
from paris_jax.config.experiment import Experiment
from paris_jax.data.loader import clip_ids
from paris_jax.data.records import read_null
from paris_jax.errors import UserError
from paris_jax.training import failures, sharding
from paris_jax.training.job import (
    Job,
    batch_iterator,
    check_role,
    cluster_folders,
    describe,
    make_job,
    read_cluster,
)
from paris_jax.training.metrics import wandb_arguments
from paris_jax.training.optimizer import ema_decay
from paris_jax.training.state import initial_weights_hashes
from paris_jax.training.train import train as train_

logger = logging.getLogger(__name__)
# Fields of the data's manifest that a network keeps, so that it can be used without that data.
CARRIED = ("latent", "codec", "text", "text_length", "fps", "partition")


def train(experiment: Experiment, run: RunFolder, role: Role, profile: tuple[int, int] | None = None) -> None:
    """Trains `role` to its last step and exports it; goes on where an earlier call stopped.

    `profile` records steps with JAX's profiler, from its first to before its second number.

    Only the role's own folder and the cluster folders it learns from are read: for an expert, its own cluster's.
    """
    check_role(experiment, role)
    run.claim(experiment.to_dict(), experiment.hash)
    export = run.export(role)
    if manifest.exists(export):
        _check_trained(manifest.read(export, NetworkManifest), experiment, run, role)
        logger.info("%s is trained already (%s)", role.name, export)
        return
    folders = cluster_folders(experiment, run, role)
    data = [read_cluster(folder, experiment, run) for folder in folders]
    job = dataclasses.replace(make_job(experiment, run, role, data[0]), null=read_null(folders[0]))
    settings = job.settings
    start = initial_weights_hashes(run, role, job)
    logger.info("%s: %s", role.name, describe(job, sum(d.clips for d in data)))

    def ids(number: int) -> list[str]:
        return clip_ids(folders, settings.global_batch_size, settings.seed, number)

    with run.only_writer(role) if jax.process_index() == 0 else contextlib.nullcontext():
        state = train_(job, batch_iterator(job, folders), ids, profile, wandb_arguments(experiment, job))
        with failures.detect_device_loss(job):
            params = sharding.to_host(state.ema)
        if jax.process_index() == 0:
            _export(run, experiment, role, job, params, data, start)
    logger.info("%s is trained: %s", role.name, export)


def _check_trained(found: NetworkManifest, experiment: Experiment, run: RunFolder, role: Role) -> None:
    """Checks that a finished network is of this config, and of the clusters that the run folder holds now."""
    if found.config_hash != experiment.hash:
        raise UserError(
            f"{run.export(role)} was trained with another config; delete {run.role(role)} to train it again, or use a "
            "new --workdir"
        )
    folder = cluster_folders(experiment, run, role)[0]
    if manifest.exists(folder) and manifest.read(folder, ClusterManifest).partition != found.partition:
        raise UserError(
            f"{run.export(role)} was trained on another partition than {run.partition}; delete {run.role(role)} to "
            "train it again"
        )


def _export(
    run: RunFolder, experiment: Experiment, role: Role, job: Job, params: Any, data: list[Any], start: Any
) -> None:
    """Writes the averaged parameters with everything that is needed to use them."""
    exported.write(
        run.export(role),
        job.config,
        params,
        experiment.hash,
        "float32",
        role=role.kind,
        cluster=role.cluster,
        clusters=experiment.clustering.num_clusters,
        timestep_shift=experiment.diffusion.timestep_shift,
        sampling=dataclasses.asdict(experiment.sampling),
        training={
            "steps": job.steps,
            "global_batch_size": job.settings.global_batch_size,
            "clips": sum(d.clips for d in data),
            "flops_per_sample": job.flops_per_sample,
            "seed": job.settings.seed,
            "init_from": start,
            "ema_decay": round(float(ema_decay(job.settings, jnp.int32(job.steps))), 6),
        },
        data=hashing.hash_text(hashing.canonical_json([manifest.contents_hash(d) for d in data])),
        experiment=hashing.without_paths(experiment.to_dict()),
        code=manifest.code_version(),
        **{name: getattr(data[0], name) for name in CARRIED},
    )
