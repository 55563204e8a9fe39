"""Failures of a training job as one sentence each: too little memory, a non-finite loss, a lost device."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator

import jax

from paris_jax.artifacts import manifest
from paris_jax.errors import DeviceLost, DeviceLostAgain, Preempted, UserError, first_line
from paris_jax.training import distributed, metrics, sharding
from paris_jax.training.checkpoints import Checkpoints
from paris_jax.training.job import Job
from paris_jax.training.metrics import MetricsLogger
from paris_jax.training.step import ShardedStep

REMEDY = (
    "share it among more devices (training.fsdp), choose a smaller network.preset, or let 'paris-jax plan' find what "
    "fits"
)
MAX_LOSSES = 3  # losses of a device without a new checkpoint in between, after which a restart is pointless


def check_memory(program: ShardedStep) -> None:
    """Refuses a state larger than the memory of the devices, before it is allocated."""
    device, needed = program.mesh.local_devices[0], program.argument_bytes()
    stats = device.memory_stats()
    if stats:
        there = stats.get("bytes_limit", math.inf)
    elif device.platform != "cpu":
        return
    else:  # simulated devices share the host's memory
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(program.mesh.local_devices)
    if needed > there:
        raise UserError(
            f"{program.job.name} does not fit: its state and batch take {sharding.in_gib(needed)} of each "
            f"{device.device_kind} and there are {sharding.in_gib(there)}; {REMEDY}"
        )


class NonFiniteLoss(UserError):
    """The loss, its gradient or the parameters are not finite."""


@contextlib.contextmanager
def explain_failures(job: Job, saved: Checkpoints, clip_ids: Callable[[int], list[str]] | None) -> Iterator[None]:
    """Turns a non-finite loss or exhausted memory into one sentence with the cause, the kept state, and the remedy."""
    try:
        yield
    except metrics.NonFiniteStep as found:
        saved.wait()
        clips = f" (clips {', '.join(clip_ids(found.step))})" if clip_ids else ""
        raise NonFiniteLoss(
            f"{job.name}: the loss, its gradient or the parameters are not finite at step {found.step + 1}{clips}; "
            f"{_kept_checkpoint(saved)}: lower training.learning_rate={job.settings.learning_rate} or "
            f"training.max_grad_norm={job.settings.max_grad_norm} in a new --workdir, or look at the data of that step"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        said = first_line(error)[:300]
        if "RESOURCE_EXHAUSTED" not in said and "OUT_OF_MEMORY" not in said:
            raise
        raise UserError(
            f"{job.name} does not fit ({said}); {_kept_checkpoint(saved)}: lower "
            f"training.global_batch_size={job.settings.global_batch_size}, "
            f"raise training.grad_accum_steps={job.settings.grad_accum_steps}, set network.remat=full, or {REMEDY}"
        ) from error


@contextlib.contextmanager
def detect_device_loss(job: Job) -> Iterator[None]:
    """Turns the loss of a device or of another process into `DeviceLost`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, OSError, ValueError) as error:
        if not distributed.is_device_lost(error):
            raise
        said = first_line(error)[:300]
        if _count_losses(job) >= MAX_LOSSES:
            raise DeviceLostAgain(
                f"{job.name} lost its device {MAX_LOSSES} times without a new checkpoint in between ({said}); look at "
                "the device and its driver, or save more often (training.checkpoint_every_steps), then run the same "
                "command "
                "again"
            ) from error
        raise DeviceLost(
            f"{job.name} lost a device or another process of its job ({said}); its finished checkpoints are kept"
        ) from error


def _count_losses(job: Job) -> int:
    """Losses of a device since the newest checkpoint, this one included; 0 for several, preemptible processes."""
    if jax.process_count() > 1:
        return 0
    path, checkpoints, times = job.folder / "lost.json", job.folder / "checkpoints", 1
    with contextlib.suppress(OSError, UserError, KeyError):  # the loss itself is the error to report
        newest = max((int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()), default=-1)
        before = manifest.read_json(path, dict[str, int]) if path.exists() else {"step": newest, "times": 0}
        times = before["times"] + 1 if before["step"] == newest else 1
        if times >= MAX_LOSSES:
            path.unlink()  # the next run counts from the start
        else:
            manifest.write_json(path, {"step": newest, "times": times})
    return times


@contextlib.contextmanager
def note_failing_step(
    job: Job, watch: MetricsLogger, start: int, clip_ids: Callable[[int], list[str]] | None
) -> Iterator[None]:
    """Adds the step and its clips to the notes of an unexpected error."""
    try:
        yield
    except (UserError, Preempted):
        raise
    except Exception as error:
        step, clips = start if watch.handed is None else watch.handed, ""
        with contextlib.suppress(Exception):  # the data may be the cause
            clips = f", whose clips are {', '.join(clip_ids(step))}" if clip_ids else ""
        error.add_note(f"{job.name} ended in, or next to, step {step + 1}{clips}")
        raise


def _kept_checkpoint(saved: Checkpoints) -> str:
    good = saved.steps()
    return f"the checkpoint of step {good[-1]} is kept" if good else "no checkpoint was made yet"
