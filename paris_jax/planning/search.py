"""Search of a configuration that fits: the largest batch and the smallest topology, or changes that make a job fit."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from paris_jax.planning.compiled import Planned
from paris_jax.planning.topologies import Topology
from paris_jax.training.job import Job
from paris_jax.training.sharding import in_gib
from paris_jax.training.step import ShardedStep

MARGIN = 0.98  # fraction of the memory that the first guess of a batch size may fill
TRIES = 6  # maximum number of compilations to find a configuration that fits
# Available topologies, smallest first.
OFFERED = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
    "v5e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    **dict.fromkeys(("h100", "h200", "a100", "cpu"), ("1", "2", "4", "8", "16", "32", "64")),
}
Compile = Callable[[Job, Topology, list[Any]], Planned]


def suggestions(found: Planned, devices: list[Any], compile_job: Compile) -> Iterator[str]:
    """Yields the largest batch and the smallest topology that fit, or changes up to the first that makes the job fit.

    Compiles every candidate.
    """
    if not found.footprint.fits:
        yield from _remedies(found, devices, compile_job)
        return
    if found.footprint.memory is None:
        return
    batch = _largest_batch(found, devices, compile_job)
    yield f"the largest batch that fits {found.slice} is {batch} (training.global_batch_size={batch})"
    smallest = _smallest_slice(found, compile_job)
    same = f"batch {found.job.settings.global_batch_size}"
    yield f"the smallest slice that fits {same} is {smallest.slice}, with {_mesh(smallest.job)}"


def _mesh(job: Job) -> str:
    return ", ".join(f"training.{name}={getattr(job.settings, name)}" for name in ("fsdp", "tensor", "sequence"))


def _with(job: Job, remat: str | None = None, **settings: int) -> Job:
    config = dataclasses.replace(job.config, remat=remat) if remat else job.config
    return dataclasses.replace(job, config=config, settings=dataclasses.replace(job.settings, **settings))


def _largest_batch(found: Planned, devices: list[Any], compile_job: Compile) -> int:
    """Returns the largest batch that fits: memory is linear in the batch, so two compilations predict it."""
    assert found.footprint.memory
    rows = _rows(found)
    small = found.job.settings.global_batch_size
    double = compile_job(_with(found.job, global_batch_size=2 * small), found.slice, devices).footprint.peak
    per_sample = max((double - found.footprint.peak) / small, 1.0)  # bytes
    batch = int(small + (MARGIN * found.footprint.memory - found.footprint.peak) / per_sample) // rows * rows
    while batch > small:
        if compile_job(_with(found.job, global_batch_size=batch), found.slice, devices).footprint.fits:
            return batch
        batch = max(small, int(0.95 * batch) // rows * rows)
    return small


def _rows(p: Planned) -> int:
    """Returns the divisor of every valid batch: one sample per data-parallel shard and accumulated batch."""
    settings = p.job.settings
    return p.slice.size // (settings.tensor * settings.sequence) * settings.grad_accum_steps


def _smallest_slice(found: Planned, compile_job: Compile) -> Planned:
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
        candidate = compile_job(job, smaller, devices)
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


def _remedies(found: Planned, devices: list[Any], compile_job: Compile) -> Iterator[str]:
    """Tries to make the job fit: sharding over all devices, accumulation, full recomputation, then smaller batches."""
    needed, available = in_gib(found.footprint.peak), in_gib(found.footprint.memory or 0)
    yield f"does not fit: each device needs {needed} and has {available}"
    tried = found
    for _ in range(TRIES):
        job = _next_remedy(tried)
        if job is None:
            break
        tried = compile_job(job, found.slice, devices)
        flags = " ".join(f"--config.{change}" for change in _changes(found.job, job))
        yield f"tried {flags}: {in_gib(tried.footprint.peak)}{', which fits' if tried.footprint.fits else ''}"
        if tried.footprint.fits:
            return
    yield "no configuration tried fits; use a larger slice, or training.tensor, or training.sequence for long videos"


def _next_remedy(tried: Planned) -> Job | None:
    """Returns the next job to try, or None; estimates parts and batch from the last footprint."""
    job, need, settings = tried.job, tried.footprint, tried.job.settings
    memory, arguments, temporaries = need.memory or 0.0, need.arguments, need.temporaries
    sharded = _with_full_fsdp(job, tried.slice.size)
    if sharded and sharded.settings.fsdp > settings.fsdp:
        return sharded
    if parts := _parts(tried, memory - arguments):
        return _with(job, grad_accum_steps=parts)
    if job.config.remat in ("none", "named"):
        return _with(job, remat="full")  # compiling it shows how much it saves
    rows = _rows(tried)
    batch = int(0.6 * max(0.0, memory - arguments) / temporaries * settings.global_batch_size)
    batch = min(batch, settings.global_batch_size // 2) // rows * rows
    return _with(job, global_batch_size=batch) if batch else None


def _parts(tried: Planned, room: float) -> int | None:
    """The fewest parts of a batch whose temporaries should fit into `room` bytes, or else the most; None: no more.

    Temporaries shrink with the samples of a part on each device.
    """
    settings = tried.job.settings
    samples = settings.global_batch_size // _rows(tried)  # of a part, on each device
    factors = [n for n in range(2, samples + 1) if samples % n == 0]
    enough = [n for n in factors if tried.footprint.temporaries / n <= MARGIN * room]
    return settings.grad_accum_steps * (enough or factors[-1:])[0] if factors else None


def _changes(before: Job, after: Job) -> list[str]:
    names = ["fsdp", "grad_accum_steps", "global_batch_size"]
    names = [n for n in names if getattr(before.settings, n) != getattr(after.settings, n)]
    changes = [f"training.{name}={getattr(after.settings, name)}" for name in names]
    return changes + ([f"network.remat={after.config.remat}"] if before.config.remat != after.config.remat else [])
