"""`paris-jax train`: one expert, the monolith or the router, on its own data, to a part that can be admitted."""

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from paris_jax import manifest
from paris_jax.data.pipeline import clip_ids, training_batches
from paris_jax.data.records import read_null
from paris_jax.diffusion import times
from paris_jax.encoders import text as texts
from paris_jax.ensemble import parts
from paris_jax.errors import Refused
from paris_jax.experiment import Experiment
from paris_jax.models import functional, presets
from paris_jax.models.dit import PATCH
from paris_jax.run_folder import Role, RunFolder
from paris_jax.training import failures, loop, sharding, starting
from paris_jax.training.program import Job
from paris_jax.training.step import TimeLaw

logger = logging.getLogger(__name__)

# What a part takes over from the data it was trained on, so that it can be used without that data.
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
        manifest.read(export, "part")
        logger.info("%s is trained already (%s)", role.name, export)
        return
    folders = cluster_folders(experiment, run, role)
    data = [read_cluster(folder, experiment, run) for folder in folders]
    job = dataclasses.replace(make_job(experiment, run, role, data[0]), null=read_null(folders[0]))
    settings = job.settings
    start = check_start(run, role, job)
    logger.info("%s: %s", role.name, describe(job, sum(d["clips"] for d in data)))

    def ids(number: int) -> list[str]:
        return clip_ids(folders, settings.batch, settings.seed, number)

    with run.only_writer(role) if jax.process_index() == 0 else contextlib.nullcontext():
        state = loop.train(job, batches_of(job, folders), ids, profile, tracker(experiment, job))
        with failures.losing(job):
            params = sharding.to_host(state.ema)
        if jax.process_index() == 0:
            _export(run, experiment, role, job, params, data, start)
    logger.info("%s is trained: %s", role.name, export)


def _export(
    run: RunFolder, experiment: Experiment, role: Role, job: Job, params: Any, data: list[Any], start: Any
) -> None:
    """Writes the averaged parameters with everything that is needed to use them."""
    parts.write(
        run.export(role),
        job.config,
        params,
        experiment.hash,
        "float32",
        role=role.kind,
        cluster=role.cluster,
        clusters=experiment.partition.num_clusters,
        shift=sampling_shift(experiment, data[0]["latent"]["shape"]),
        sampling=dataclasses.asdict(experiment.sampling),
        training={
            "steps": job.steps,
            "batch": job.settings.batch,
            "clips": sum(d["clips"] for d in data),
            "flops_per_sample": job.flops_per_sample,
            "seed": job.settings.seed,
            "start": start,
        },
        **{name: data[0][name] for name in CARRIED},
    )


def check_start(run: RunFolder, role: Role, job: Job) -> dict[str, str] | None:
    """Hashes of the weights that a job starts from, kept beside its checkpoints; a job that goes on needs no more."""
    if not job.settings.start:
        return None
    kept, checkpoints = run.role(role) / "start.json", run.checkpoints(role)
    if kept.exists() and checkpoints.exists() and any(checkpoints.iterdir()):
        return manifest.read_json(kept)
    hashes = starting.hashes(job.settings.start, job.config)
    manifest.write_json(kept, hashes, shared=True)
    return hashes


def tracker(experiment: Experiment, job: Job) -> dict[str, Any] | None:
    """How a job is told to Weights & Biases, if it is: its id comes of its folder and stays the same."""
    if not experiment.wandb:
        return None
    if importlib.util.find_spec("wandb") is None:
        raise Refused(f"wandb={experiment.wandb!r}: Weights & Biases is not installed; pip install -e '.[wandb]'")
    return {
        "project": experiment.wandb,
        "id": manifest.hash_text(f"{experiment.hash} {job.folder.resolve()}")[:16],
        "name": f"{experiment.name}, {job.name}",
        "group": experiment.name,
        "dir": None if "://" in str(job.folder) else str(job.folder),
        "config": experiment.to_dict(),
    }


def check_role(experiment: Experiment, role: Role) -> None:
    clusters = experiment.partition.num_clusters
    if role.kind == "expert":
        if role.cluster is None:
            raise Refused(f"--role=expert needs --cluster=K, from 0 to {clusters - 1}")
        if not 0 <= role.cluster < clusters:
            raise Refused(f"--cluster={role.cluster}: this experiment has clusters 0 to {clusters - 1}")
    elif role.cluster is not None:
        raise Refused(f"--cluster={role.cluster} goes with --role=expert only; leave it out for --role={role.kind}")


def cluster_folders(experiment: Experiment, run: RunFolder, role: Role) -> list[Any]:
    """The folders a role learns from: an expert's own cluster, or all of them."""
    wanted = range(experiment.partition.num_clusters) if role.cluster is None else [role.cluster]
    return [run.cluster(k) for k in wanted]


def read_cluster(folder: Any, experiment: Experiment, run: RunFolder) -> dict[str, Any]:
    """A cluster folder's manifest; refuses one that is missing, damaged or of another config."""
    if not manifest.exists(folder):
        raise Refused(f"{folder} is not there yet; run 'paris-jax cluster --config=... --workdir={run}' first")
    found = manifest.read(folder, "cluster")
    if found["config_hash"] != experiment.data_hash:
        raise Refused(
            f"{folder} was made with other data, codec, text, features or partition; cluster again in a new --workdir, "
            "or use the config that made it"
        )
    return found


def batches_of(job: Job, folders: Sequence[epath.Path]) -> Callable[[int, int], Any]:
    """Makes the data iterator of one of so many equal parts of a job's batches (`loop.train`)."""
    settings = job.settings

    def batches(part: int, parts: int) -> Any:
        return training_batches(folders, settings.batch, settings.seed, part, parts, job.padded_text_length)

    return batches


def make_job(experiment: Experiment, run: RunFolder, role: Role, data: dict[str, Any]) -> Job:
    """The job of a role on prepared data, described by a cluster's manifest."""
    T, H, W, C = data["latent"]["shape"]
    dtype = compute_dtype(experiment.settings_of(role.kind).compute_dtype, jax.default_backend())
    widths = texts.described_widths(data["text"])
    return job_of(experiment, run.role(role), role, (T, H, W, C), widths, data["text_length"], dtype)


def job_of(
    experiment: Experiment,
    folder: epath.Path,
    role: Role,
    latent_shape: tuple[int, int, int, int],
    text_widths: tuple[int, int],
    text_length: int,
    dtype: str,
) -> Job:
    """The job of a role on latents and text of these sizes, computing in `dtype`."""
    settings, shift = experiment.settings_of(role.kind), sampling_shift(experiment, latent_shape)
    given = {
        "channels": latent_shape[-1],
        "pooled_width": text_widths[1],
        "dtype": dtype,
        "remat": experiment.network.remat,
        "kept_frames": bool(experiment.masks.kinds),
    }
    if role.kind == "router":
        config = presets.router_config(experiment.router, clusters=experiment.partition.num_clusters, **given)
    else:
        given |= {"text_width": text_widths[0], "predicts": settings.objective}
        config = presets.network_config(experiment.network, **given)
    law = TimeLaw(settings.times, experiment.diffusion.time_mean, experiment.diffusion.time_std, shift)
    steps = experiment.steps(role.kind)
    return Job(role.name, folder, config, settings, steps, law, latent_shape, text_length, experiment.masks)


def sampling_shift(experiment: Experiment, latent_shape: Any) -> float:
    """The shift of times, given or by Open-Sora 2.0's rule: the same in training and sampling."""
    T, H, W, _ = latent_shape
    return experiment.diffusion.shift or times.open_sora_shift((H // PATCH) * (W // PATCH), T)


def compute_dtype(name: str, platform: str) -> str:
    """ "auto" is float32 on CPUs and bfloat16 on everything else."""
    if name != "auto":
        return name
    return "float32" if platform == "cpu" else "bfloat16"


def describe(job: Job, clips: int) -> str:
    work = job.steps * job.settings.batch * job.flops_per_sample
    device = f"{jax.device_count()} {jax.devices()[0].device_kind} ({job.config.dtype})"
    return (
        f"{functional.count(job.config) / 1e6:.2f}M parameters, {clips} clips, "
        f"{job.steps} steps of {job.settings.batch}, {work / 1e12:.3g} TFLOP on {device}"
    )
