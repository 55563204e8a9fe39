"""What can go wrong on the way, each in one sentence: too little memory, a loss that is not finite, a lost device."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator

import jax

from paris_jax import manifest
from paris_jax.errors import Lost, LostAgain, Preempted, Refused, first_line
from paris_jax.training import hosts, metrics, slices
from paris_jax.training.checkpoints import Checkpoints
from paris_jax.training.program import Job, Program
from paris_jax.training.watch import Watch

REMEDY = (
    "share it among more devices (training.fsdp), choose a smaller network.preset, or let 'paris-jax plan' find what "
    "fits"
)

LOSSES = 3  # of a device, with no new checkpoint in between, after which it is no accident


def check_room(program: Program) -> None:
    """Refuses a state that is larger than the memory of the devices, before it is made."""
    device, needed = program.mesh.local_devices[0], slices.argument_bytes(program)
    stats = device.memory_stats()
    if stats:
        there = stats.get("bytes_limit", math.inf)
    elif device.platform != "cpu":
        return
    else:  # devices of a CPU share its memory
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(program.mesh.local_devices)
    if needed > there:
        raise Refused(
            f"{program.job.name} does not fit: its state and batch take {slices.in_gib(needed)} of each "
            f"{device.device_kind} and there are {slices.in_gib(there)}; {REMEDY}"
        )


class NotFinite(Refused):
    """The loss, its gradient or the parameters are not numbers any more."""


@contextlib.contextmanager
def told(job: Job, saved: Checkpoints, clip_ids: Callable[[int], list[str]] | None) -> Iterator[None]:
    """Turns what ends a job before its time into a sentence that says what is kept and what to do."""
    try:
        yield
    except metrics.FoundNotFinite as found:
        saved.wait()
        clips = f" (clips {', '.join(clip_ids(found.step))})" if clip_ids else ""
        raise NotFinite(
            f"{job.name}: the loss, its gradient or the parameters are not finite at step {found.step + 1}{clips}; "
            f"{_kept(saved)}: lower training.learning_rate={job.settings.learning_rate} or "
            f"training.clip_norm={job.settings.clip_norm} in a new --workdir, or look at the data of that step"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        said = first_line(error)[:300]
        if "RESOURCE_EXHAUSTED" not in said and "OUT_OF_MEMORY" not in said:
            raise
        raise Refused(
            f"{job.name} does not fit ({said}); {_kept(saved)}: lower training.batch={job.settings.batch}, raise "
            f"training.accumulate={job.settings.accumulate}, set network.remat=full, or {REMEDY}"
        ) from error


@contextlib.contextmanager
def losing(job: Job) -> Iterator[None]:
    """Says what the loss of a device, or of another process of the job, means."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, OSError, ValueError) as error:
        if not hosts.lost(error):
            raise
        said = first_line(error)[:300]
        if _times_lost(job) >= LOSSES:
            raise LostAgain(
                f"{job.name} lost its device {LOSSES} times without a new checkpoint in between ({said}); look at the "
                "device and its driver, or save more often (training.checkpoint_every), then run the same command again"
            ) from error
        raise Lost(
            f"{job.name} lost a device or another process of its job ({said}); its finished checkpoints are kept"
        ) from error


def _times_lost(job: Job) -> int:
    """How often this job has lost its device since its newest checkpoint, now included.

    Not counted (0) for several processes, of which one may be taken away at any time.
    """
    if jax.process_count() > 1:
        return 0
    path, checkpoints, times = job.folder / "lost.json", job.folder / "checkpoints", 1
    with contextlib.suppress(OSError, Refused, KeyError):  # the loss is what there is to tell
        newest = max((int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()), default=-1)
        before = manifest.read_json(path) if path.exists() else {"step": newest, "times": 0}
        times = before["times"] + 1 if before["step"] == newest else 1
        if times >= LOSSES:
            path.unlink()  # who has seen to it begins anew
        else:
            manifest.write_json(path, {"step": newest, "times": times})
    return times


@contextlib.contextmanager
def placed(job: Job, watch: Watch, start: int, clip_ids: Callable[[int], list[str]] | None) -> Iterator[None]:
    """Notes on an error, for its traceback, at which step it came and with which clips."""
    try:
        yield
    except (Refused, Preempted):
        raise
    except Exception as error:
        step, clips = start if watch.handed is None else watch.handed, ""
        with contextlib.suppress(Exception):  # the data may be what fails
            clips = f", whose clips are {', '.join(clip_ids(step))}" if clip_ids else ""
        error.add_note(f"{job.name} ended in, or next to, step {step + 1}{clips}")
        raise


def _kept(saved: Checkpoints) -> str:
    good = saved.steps()
    return f"the checkpoint of step {good[-1]} is kept" if good else "no checkpoint was made yet"
