"""`paris-jax plan`: memory, time per step and duration of a run on a topology that is not attached."""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence

from etils import epath
from rich.console import Console
from rich.table import Table

from paris_jax.artifacts.run_folder import Role
from paris_jax.config.experiment import Experiment
from paris_jax.encoders import codecs, text
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.models.flops import GIB, chip_named
from paris_jax.planning.topologies import Footprint, Topology, compile_step
from paris_jax.training.job import Job, compute_dtype, job_of
from paris_jax.training.sharding import in_gib
from paris_jax.training.step import ShardedStep

logger = logging.getLogger(__name__)
MARGIN = 0.98  # fraction of the memory that the first guess of a batch size may fill
TRIES = 6  # maximum number of compilations to find a configuration that fits
# Available topologies, smallest first.
OFFERED = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "cpu": ("1", "2", "4", "8", "16", "32", "64"),
}


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job compiled for a topology."""

    job: Job
    slice: Topology
    footprint: Footprint
    seconds: float  # compile time

    @property
    def flops(self) -> float:
        """FLOPs of one training step, without recomputation."""
        return self.job.flops_per_sample * self.job.settings.global_batch_size


def plan(
    experiment: Experiment,
    target: Topology,
    roles: Sequence[str],
    mfu: float,
    price: float | None,
    search: bool,
) -> dict[str, Planned]:
    """Compiles the training step of each role for `target`; prints its memory, time and FLOPs, and the run's duration.

    Args:
      experiment: config of the networks, batch size, mesh (the data axis takes the devices that fsdp, tensor and
        sequence leave) and steps.
      target: slice of each role.
      roles: any of "expert", "monolith" and "router".
      mfu: expected model FLOPs utilization, a fraction of the chips' peak; measure it if you can.
      price: price of one chip for one hour, in any currency; None prints no costs.
      search: also compiles other configurations, to find the largest batch and the smallest slice that fit or, if the
        job does not fit, changes that make it fit.

    Returns:
      The compiled job of each role.
    """
    console = Console(highlight=False)
    devices = target.devices()
    planned: dict[str, Planned] = {}
    for role in roles:
        job = _planned_job(experiment, target, role)
        same = next((p for p in planned.values() if p.job.config == job.config), None)  # an expert and the monolith
        planned[role] = dataclasses.replace(same, job=job) if same else _compile(job, target, devices)
    console.print(_memory(planned))
    console.print(_time(experiment, planned, mfu, price))
    for line in _notes(experiment, mfu):
        console.print(line)
    if search:
        for role, found in planned.items():
            if role == "monolith" and "expert" in planned:
                continue
            for line in _suggestions(found, devices):
                console.print(f"{role}: {line}", soft_wrap=True)
    return planned


def _planned_job(experiment: Experiment, target: Topology, role: str) -> Job:
    settings = experiment.settings_of(role)
    dtype = compute_dtype(settings.compute_dtype, "cpu" if target.generation == "cpu" else "tpu")
    cluster = 0 if role == "expert" else None
    sizes = codecs.latent_shape(experiment), text.widths_of(experiment), experiment.text.max_tokens
    return job_of(experiment, epath.Path("."), Role(role, cluster), *sizes, dtype)


def _compile(job: Job, target: Topology, devices: list) -> Planned:
    began = time.perf_counter()
    program = ShardedStep(job, devices)
    mesh = " x ".join(f"{name} {n}" for name, n in program.mesh.shape.items() if n > 1) or "one device"
    logger.info("compiling %s for %s (%s, batch %d)", job.name, target, mesh, job.settings.global_batch_size)
    return Planned(job, target, compile_step(program), time.perf_counter() - began)


def _memory(planned: dict[str, Planned]) -> Table:
    table = Table(title=f"memory of each device of {next(iter(planned.values())).slice}, GiB")
    for column in ("role", "parameters", "batch", "state", "temporary", "peak", "memory", "fits"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role, p in planned.items():
        f = p.footprint
        table.add_row(
            role,
            f"{functional.count(p.job.config) / 1e6:,.1f}M",
            str(p.job.settings.global_batch_size),
            *(_brief(size / GIB) for size in (f.arguments, f.temporaries, f.peak)),
            f"{f.memory / GIB:.0f}" if f.memory else "unknown",
            "[green]yes" if f.fits else "[red]no",
        )
    return table


def step_seconds(p: Planned, mfu: float) -> tuple[float, float] | None:
    """Returns (roofline, expected) seconds of a step, or None if the chips' peak is unknown.

    The roofline is the larger of the time to compute at peak, recomputation included, and the time to read and write
    the state.
    """
    chip = chip_named(p.slice.generation)
    if chip is None:
        return None
    recomputation = 4 / 3 if p.job.config.remat in ("full", "offload") else 1.0  # one more forward pass
    compute = p.flops * recomputation / (chip.peak * p.slice.size)
    traffic = 2 * p.footprint.arguments / chip.bandwidth
    return max(compute, traffic), p.flops / (mfu * chip.peak * p.slice.size)


def _time(experiment: Experiment, planned: dict[str, Planned], mfu: float, price: float | None) -> Table:
    table = Table(title=f"time and work at {mfu:.0%} MFU")
    columns = ["role", "jobs", "TFLOP", "roof s", "step s", "steps", "hours", "chip-hours"]
    for column in [*columns, *(["cost"] if price is not None else [])]:
        table.add_column(column, justify="left" if column == "role" else "right")
    total = 0.0
    for role, p in planned.items():
        jobs = experiment.clustering.num_clusters if role == "expert" else 1
        row = [role, str(jobs), _brief(p.flops / 1e12)]
        if seconds := step_seconds(p, mfu):
            hours = seconds[1] * p.job.steps / 3600
            work = hours * p.slice.size * jobs
            total += work
            row += [*map(_brief, seconds), f"{p.job.steps:,}", _brief(hours), _brief(work)]
            row += [_brief(work * price)] if price is not None else []
        else:
            row += ["unknown", "unknown", f"{p.job.steps:,}", "unknown", "unknown"]
        table.add_row(*row)
    if total:
        end = [_brief(total), *([_brief(total * price)] if price is not None else [])]
        table.add_row("all", *[""] * (len(columns) - 2), *end)
    return table


def _brief(number: float) -> str:
    """Formats with three significant digits: 0.00147, 12.3, 42,972."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _notes(experiment: Experiment, mfu: float) -> Iterator[str]:
    yield f"Text is counted at its maximum of {experiment.text.max_tokens} tokens; jobs of one role run in parallel."
    yield f"{mfu:.0%} MFU is assumed, not measured; pass the value you measured as --mfu."


def _suggestions(found: Planned, devices: list) -> Iterator[str]:
    """Yields the largest batch and the smallest topology that fit, or changes up to the first that makes the job fit.

    Compiles every candidate.
    """
    if not found.footprint.fits:
        yield from _remedies(found, devices)
        return
    if found.footprint.memory is None:
        return
    batch = _largest_batch(found, devices)
    yield f"the largest batch that fits {found.slice} is {batch} (training.global_batch_size={batch})"
    smallest = _smallest_slice(found)
    same = f"batch {found.job.settings.global_batch_size}"
    yield f"the smallest slice that fits {same} is {smallest.slice}, with {_mesh(smallest.job)}"


def _mesh(job: Job) -> str:
    return ", ".join(f"training.{name}={getattr(job.settings, name)}" for name in ("fsdp", "tensor", "sequence"))


def _with(job: Job, remat: str | None = None, **settings: int) -> Job:
    config = dataclasses.replace(job.config, remat=remat) if remat else job.config
    return dataclasses.replace(job, config=config, settings=dataclasses.replace(job.settings, **settings))


def _largest_batch(found: Planned, devices: list) -> int:
    """Returns the largest batch that fits: memory is linear in the batch, so two compilations predict it."""
    assert found.footprint.memory
    rows = _rows(found)
    small = found.job.settings.global_batch_size
    double = _compile(_with(found.job, global_batch_size=2 * small), found.slice, devices).footprint.peak
    per_sample = max((double - found.footprint.peak) / small, 1.0)  # bytes
    batch = int(small + (MARGIN * found.footprint.memory - found.footprint.peak) / per_sample) // rows * rows
    while batch > small:
        if _compile(_with(found.job, global_batch_size=batch), found.slice, devices).footprint.fits:
            return batch
        batch = max(small, int(0.95 * batch) // rows * rows)
    return small


def _rows(p: Planned) -> int:
    """Returns the divisor of every valid batch: one sample per data-parallel shard and accumulated batch."""
    settings = p.job.settings
    return p.slice.size // (settings.tensor * settings.sequence) * settings.grad_accum_steps


def _smallest_slice(found: Planned) -> Planned:
    for shape in OFFERED[found.slice.generation]:
        smaller = Topology.parse(f"{found.slice.generation}:{shape}")
        job = _with_full_fsdp(found.job, smaller.size)
        if smaller.size >= found.slice.size:
            break
        if job is None:
            continue
        devices = smaller.devices()
        # Temporaries grow with the samples per device: a topology that cannot fit is not compiled.
        least = (
            ShardedStep(job, devices).argument_bytes()
            + 0.8 * found.footprint.temporaries * found.slice.size / smaller.size
        )
        if least > (found.footprint.memory or math.inf):
            continue
        candidate = _compile(job, smaller, devices)
        if candidate.footprint.fits:
            return candidate
    return found


def _with_full_fsdp(job: Job, devices: int) -> Job | None:
    """Returns the job with its parameters sharded over this many devices, or None if the sizes do not divide."""
    fsdp, left = divmod(devices, job.settings.tensor * job.settings.sequence)
    rows = fsdp * job.settings.grad_accum_steps
    if left or not fsdp or job.settings.global_batch_size % rows or job.config.hidden % (fsdp * job.settings.sequence):
        return None
    return _with(job, fsdp=fsdp)


def _remedies(found: Planned, devices: list) -> Iterator[str]:
    """Tries to make the job fit by sharding over all devices, then full recomputation, then smaller batches."""
    needed, available = in_gib(found.footprint.peak), in_gib(found.footprint.memory or 0)
    yield f"does not fit: each device needs {needed} and has {available}"
    tried = found
    for _ in range(TRIES):
        job = _next_remedy(tried)
        if job is None:
            break
        tried = _compile(job, found.slice, devices)
        flags = " ".join(f"--config.{change}" for change in _changes(found.job, job))
        yield f"tried {flags}: {in_gib(tried.footprint.peak)}{', which fits' if tried.footprint.fits else ''}"
        if tried.footprint.fits:
            return
    yield "no configuration tried fits; use a larger slice, or training.tensor, or training.sequence for long videos"


def _next_remedy(tried: Planned) -> Job | None:
    """Returns the next job to try, or None; estimates its batch conservatively from the last footprint."""
    job, need, settings = tried.job, tried.footprint, tried.job.settings
    memory, arguments, temporaries = need.memory or 0.0, need.arguments, need.temporaries
    sharded = _with_full_fsdp(job, tried.slice.size)
    if sharded and sharded.settings.fsdp > settings.fsdp:
        return sharded
    if job.config.remat in ("none", "named"):
        return _with(job, remat="full")  # compiling it shows how much it saves
    rows = _rows(tried)
    batch = int(0.6 * max(0.0, memory - arguments) / temporaries * settings.global_batch_size)
    batch = min(batch, settings.global_batch_size // 2) // rows * rows
    return _with(job, global_batch_size=batch) if batch else None


def _changes(before: Job, after: Job) -> list[str]:
    names = [n for n in ("fsdp", "global_batch_size") if getattr(before.settings, n) != getattr(after.settings, n)]
    changes = [f"training.{name}={getattr(after.settings, name)}" for name in names]
    return changes + ([f"network.remat={after.config.remat}"] if before.config.remat != after.config.remat else [])


def check_arguments(mfu: float, price: float | None) -> None:
    """Raises UserError if the MFU or the price is out of range."""
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu}: must be above 0 and at most 1, such as 0.4")
    if price is not None and price < 0:
        raise UserError(f"--price={price}: must be at least 0, for one chip and one hour")
