"""A training job: which network, on which data, with which settings."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import ClusterManifest
from paris_jax.config.experiment import Experiment
from paris_jax.config.training import MaskSettings, TrainingSettings
from paris_jax.data.loader import bucket_lengths, training_batches
from paris_jax.diffusion import timesteps
from paris_jax.encoders import text as texts
from paris_jax.encoders.codecs import UNIT_SCALE, LatentScale
from paris_jax.errors import UserError
from paris_jax.models import flops, functional, precision
from paris_jax.models.dit import video_tokens
from paris_jax.models.router import RouterConfig
from paris_jax.training.losses import PerSampleLosses, TimestepSampler, expert_losses, router_losses


@dataclasses.dataclass(frozen=True)
class Job:
    """One network to train on one mesh."""

    name: str  # in log lines: "expert 0"
    folder: epath.Path  # of checkpoints and metrics
    config: functional.Config
    settings: TrainingSettings
    steps: int
    timestep_sampler: TimestepSampler
    latent_shape: tuple[int, int, int, int]  # (T, H, W, C) of one sample
    text_length: int  # tokens of the longest caption; shorter ones are padded
    masks: MaskSettings = MaskSettings()  # distribution of the conditioning frames
    null: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # null embedding, where not zeros
    losses: PerSampleLosses = expert_losses
    scale: LatentScale = UNIT_SCALE  # normalises the latents
    text_dtype: str = "float16"  # of the text embeddings in batches

    @property
    def fields(self) -> tuple[str, ...]:
        """The arrays of a batch that this role reads."""
        images = ("cond_images",) if self.masks.image_kinds else ()
        if isinstance(self.config, RouterConfig):
            return "latent", "pooled", "cluster", "index", *images
        return "latent", "tokens", "length", "pooled", "index", *images

    @property
    def flops_per_sample(self) -> int:
        """FLOPs of a training step per sample, without recomputation."""
        return flops.training_flops(self.config, self.latent_shape, self.text_length)

    @property
    def padded_text_length(self) -> int:
        """`text_length`, padded to a multiple of `training.sequence`."""
        return self.text_length + -self.text_length % self.settings.sequence


def check_role(experiment: Experiment, role: Role) -> None:
    """Refuses an expert without a cluster of the experiment, and a cluster for another role."""
    clusters = experiment.clustering.num_clusters
    if role.kind == "expert":
        if role.cluster is None:
            raise UserError(f"--role=expert needs --cluster=K, from 0 to {clusters - 1}")
        if not 0 <= role.cluster < clusters:
            raise UserError(f"--cluster={role.cluster}: this experiment has clusters 0 to {clusters - 1}")
    elif role.cluster is not None:
        raise UserError(f"--cluster={role.cluster} goes with --role=expert only; leave it out for --role={role.kind}")


def cluster_folders(experiment: Experiment, run: RunFolder, role: Role) -> list[Any]:
    """The cluster folders that a role is trained on: an expert's own, or all."""
    wanted = range(experiment.clustering.num_clusters) if role.cluster is None else [role.cluster]
    return [run.cluster(k) for k in wanted]


def read_cluster(folder: Any, experiment: Experiment, run: RunFolder) -> ClusterManifest:
    """A cluster folder's manifest; refuses one that is missing, damaged or of another config."""
    if not manifest.exists(folder):
        raise UserError(f"{folder} is not there yet; run 'paris-jax cluster --config=... --workdir={run}' first")
    found = manifest.read(folder, ClusterManifest)
    if found.config_hash != experiment.data_hash:
        raise UserError(
            f"{folder} was made with other data, codec, text, features or clustering; cluster again in a new "
            "--workdir, "
            "or use the config that made it"
        )
    return found


def batch_iterator(job: Job, folders: Sequence[epath.Path]) -> Callable[[int, int], Any]:
    """A function of (index, number of parts) that makes the iterator of that part of each batch (`train.train`)."""
    settings = job.settings

    null = len(job.null["tokens"]) if job.null else 1  # takes the place of texts that are dropped
    lengths = bucket_lengths(job.padded_text_length, settings.text_buckets, settings.sequence, null)

    def batches(part: int, parts: int) -> Any:
        shared = (settings.global_batch_size, settings.seed, part, parts, job.padded_text_length, job.fields)
        return training_batches(folders, *shared, text_lengths=lengths)

    return batches


def make_job(experiment: Experiment, run: RunFolder, role: Role, data: ClusterManifest) -> Job:
    """The job of a role on prepared data, described by a cluster's manifest."""
    dtype = compute_dtype(experiment.settings_of(role.kind).compute_dtype, *precision.current_device())
    widths = texts.described_widths(data.text)
    job = job_of(experiment, run.role(role), role, data.latent.shape, widths, data.text_length, dtype)
    return dataclasses.replace(job, scale=LatentScale.from_manifest(data.latent))


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
    settings = experiment.settings_of(role.kind)
    sizes = {
        "channels": latent_shape[-1],
        "pooled_width": text_widths[1],
        "dtype": dtype,
        "cond_frames": bool(experiment.masks.kinds),
    }
    if role.kind == "router":
        sizes |= {"clusters": experiment.clustering.num_clusters, "remat": experiment.router.remat}
        config = functional.router_config(experiment.router, **sizes)
    else:
        sizes |= {"text_width": text_widths[0], "prediction_type": settings.prediction_type}
        sizes |= {"remat": experiment.network.remat}
        config = functional.network_config(experiment.network, **sizes)
    diffusion = experiment.diffusion
    shift = timesteps.resolve_shift(diffusion.timestep_shift, video_tokens(latent_shape), latent_shape[0])
    # Timesteps of the cosine path are not those of the linear one; DDPM draws them uniformly.
    name = "uniform" if settings.prediction_type == "noise" else settings.timestep_sampler
    sampler = TimestepSampler(name, diffusion.timestep_mean, diffusion.timestep_std, shift)
    return Job(
        name=role.name,
        folder=folder,
        config=config,
        settings=settings,
        steps=experiment.steps(role.kind),
        timestep_sampler=sampler,
        latent_shape=latent_shape,
        text_length=text_length,
        masks=experiment.masks,
        losses=router_losses if role.kind == "router" else expert_losses,
        text_dtype=texts.STORED_DTYPES[experiment.text.name],
    )


def compute_dtype(name: str, platform: str, capability: str = "") -> str:
    """The dtype of the computation; "auto" is bfloat16, and float32 on CPUs and on NVIDIA GPUs before the A100."""
    if name != "auto":
        return name
    return "bfloat16" if precision.has_bfloat16(platform, capability) else "float32"


def describe(job: Job, clips: int) -> str:
    """Size, data, steps, work and devices of a job, for its first log line."""
    work = job.steps * job.settings.global_batch_size * job.flops_per_sample
    device = f"{jax.device_count()} {jax.devices()[0].device_kind} ({job.config.dtype})"
    return (
        f"{functional.count(job.config) / 1e6:.2f}M parameters, {clips} clips, "
        f"{job.steps} steps of {job.settings.global_batch_size}, {work / 1e12:.3g} TFLOP on {device}"
    )
