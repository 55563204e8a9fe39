"""The training loop, for every role: save, fetch, step, log, in this order, so that state and data always agree."""

import dataclasses
import logging
import resource
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from paris_jax.errors import Preempted, Refused
from paris_jax.training import checkpoints, chips, metrics, sharding
from paris_jax.training.program import Job, Program
from paris_jax.training.state import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Clocks:
    """Seconds since the last log line, and of the whole job over all its restarts."""

    trained: float = 0.0  # seconds of training before this start
    waited: float = 0.0  # seconds waiting for data since the last line
    began: float = dataclasses.field(default_factory=time.perf_counter)
    lined: float = dataclasses.field(default_factory=time.perf_counter)

    def total(self) -> float:
        return self.trained + time.perf_counter() - self.began


class StopRequest:
    """SIGTERM: finish the step, save, and leave with exit code 75; processes of one job agree on the step."""

    def __init__(self):
        self._asked = False
        self._previous: Any = None

    def __enter__(self) -> "StopRequest":
        # Joined processes are told by jax.distributed, which listens to the signal from the moment it is set up.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def asked(self, step: int) -> bool:
        """Whether to stop before making update `step`; to be called at every step."""
        return self._asked or multihost_utils.reached_preemption_sync_point(step)

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


def train(
    job: Job,
    batches: Callable[[int, int], Any],
    clip_ids: Callable[[int], list[str]] | None = None,
    profile: tuple[int, int] | None = None,
) -> TrainState:
    """Trains to `job.steps`, going on from the newest checkpoint where there is one.

    Args:
      batches: makes the data iterator of one of so many equal parts of each batch (index, count), with get_state and
        set_state (JSON) for its position.
      clip_ids: names the clips of a batch by its number, to say which ones gave a loss that is not finite.
      profile: first step to record with JAX's profiler and the one after the last, into `profile/` of the job's folder.

    Returns:
      The final state, also saved as a checkpoint.

    Raises:
      Preempted: after SIGTERM, with everything saved.
      Refused: unreadable checkpoints, a mesh that does not fit, or a loss that is not finite.
    """
    if profile and profile[1] > job.steps:
        asked = f"--profile_steps={profile[0]}:{profile[1]}"
        raise Refused(f"{asked}: {job.name} has {job.steps} steps; choose earlier ones")
    program = Program(job)
    saved = checkpoints.Checkpoints(job.folder / "checkpoints", job.settings.keep, job.settings.keep_every)
    iterator = batches(*sharding.rows_of_this_process(program.mesh))
    found = saved.restore(program.state)
    if found is None:
        start, clocks, state = 0, Clocks(), program.first_state()
    else:
        start, state, position, kept = found
        clocks = Clocks(trained=kept["trained"])
        iterator.set_state(position)
        saved.delete_after(start)
        logger.info("%s goes on from step %d", job.name, start)
    written = metrics.Metrics(job.folder, start) if jax.process_index() == 0 else metrics.Nothing()
    try:
        with jax.set_mesh(program.mesh), StopRequest() as stop, _progress(job, start) as advance:
            return _run(program, state, start, iterator, saved, written, clocks, stop, advance, clip_ids, profile)
    finally:
        written.close()
        saved.close()


def _run(program, state, start, iterator, saved, written, clocks, stop, advance, clip_ids, profile) -> TrainState:
    job, mesh = program.job, program.mesh
    window: list[dict[str, jax.Array]] = []

    def line(step: int) -> None:
        """Waits for the steps of the window, stops on a value that is not finite, and writes their averages."""
        if not window:
            return
        values = jax.device_get(window)
        bad = metrics.first_not_finite(values)
        if bad is not None:
            _refuse_not_finite(job, step - len(values) + bad + 1, saved, clip_ids)
        scalars = metrics.average(values) | _speed(job, len(values), clocks, mesh)
        written.write(step, scalars)
        advance(step, scalars)
        window.clear()

    last_saved = start if start else -1
    for step in range(start, job.steps + 1):
        stopping = stop.asked(step)
        due = step == job.steps or stopping or (step > start and step % job.settings.checkpoint_every == 0)
        if due and step != last_saved:
            line(step)
            saved.save(step, state, iterator.get_state(), {"trained": clocks.total()})
            last_saved = step
        if step == job.steps:
            return state
        if stopping:
            saved.wait()
            raise Preempted(f"{job.name} was asked to stop and is saved at step {step} of {job.steps}")
        asked_data = time.perf_counter()
        batch = sharding.place_batch(next(iterator), mesh)
        clocks.waited += time.perf_counter() - asked_data
        if profile and step == profile[0]:
            jax.profiler.start_trace(str(job.folder / "profile"))
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, values = program.step(state, batch)
        window.append(values)
        if profile and step + 1 == profile[1] and start <= profile[0]:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            logger.info("%s: steps %d to %d are profiled in %s", job.name, *profile, job.folder / "profile")
        if (step + 1) % job.settings.log_every == 0:
            line(step + 1)
    raise AssertionError("the loop ends by returning")


def _refuse_not_finite(job: Job, step: int, saved: checkpoints.Checkpoints, clip_ids: Any) -> None:
    saved.wait()
    good = saved.steps()
    kept = f"the checkpoint of step {good[-1]} is kept" if good else "no checkpoint was made yet"
    clips = f" (clips {', '.join(clip_ids(step - 1))})" if clip_ids else ""
    raise Refused(
        f"{job.name}: the loss, its gradient or the parameters are not finite at step {step}{clips}; {kept}: "
        f"lower training.learning_rate={job.settings.learning_rate} or training.clip_norm={job.settings.clip_norm} "
        "in a new --workdir, or look at the data of that step"
    )


def _speed(job: Job, steps: int, clocks: Clocks, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Step time, clips a second, share of peak and share of time spent waiting for data, since the last line."""
    now = time.perf_counter()
    elapsed, clocks.lined = now - clocks.lined, now
    waited, clocks.waited = clocks.waited, 0.0
    scalars = {
        "seconds_per_step": elapsed / steps,
        "clips_per_second": steps * job.settings.batch / elapsed,
        "data_wait": waited / elapsed,
        "seconds_trained": clocks.total(),
        "host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # bytes, the most so far
    }
    if stats := mesh.local_devices[0].memory_stats():  # CPUs have none
        scalars["device_memory"] = stats["peak_bytes_in_use"]
    if chip := chips.of(mesh.devices.flat[0]):
        scalars["share_of_peak"] = scalars["clips_per_second"] * job.flops_per_sample / (chip.peak * mesh.devices.size)
    return scalars


class _progress:
    """A progress bar on a terminal; elsewhere a log line at least every ten seconds."""

    def __init__(self, job: Job, start: int):
        self._job, self._last = job, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._task = self._bar.add_task(job.name, total=job.steps, completed=start, note="compiling")

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        if self._bar.console.is_terminal:
            self._bar.start()
        return self._advance

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def _advance(self, step: int, scalars: dict[str, float]) -> None:
        peak = f", {scalars['share_of_peak']:.0%} of peak" if "share_of_peak" in scalars else ""
        note = (
            f"loss {scalars['loss']:.4f}, {scalars['seconds_per_step'] * 1e3:.0f} ms a step{peak}, "
            f"{scalars['data_wait']:.1%} waiting for data"
        )
        self._bar.update(self._task, completed=step, note=note)
        now = time.perf_counter()
        if not self._bar.console.is_terminal and (now - self._last > 10 or step == self._job.steps):
            self._last = now
            logger.info("%s: step %d of %d, %s", self._job.name, step, self._job.steps, note)


def to_host(tree: Any) -> Any:
    """A tree of device arrays as numpy arrays in process 0, None elsewhere; every process of the job has to call it.

    What is split over processes is gathered piece by piece (a layer of a stack at a time), so that no device has to
    hold more than one piece beside its own share.
    """
    kept = jax.process_index() == 0
    gathered = jax.tree.map(lambda leaf: _gather(leaf, kept), tree)
    return gathered if kept else None


def _gather(leaf: jax.Array, kept: bool) -> np.ndarray | None:
    if leaf.is_fully_addressable:
        return np.asarray(leaf) if kept else None
    assert isinstance(leaf.sharding, NamedSharding)
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    if leaf.ndim < 3:
        whole = jax.jit(lambda x: x, out_shardings=everywhere)(leaf)
        return np.asarray(whole.addressable_data(0)) if kept else None
    layer = jax.jit(lambda x, i: x[i], out_shardings=everywhere)
    layers = (layer(leaf, i).addressable_data(0) for i in range(leaf.shape[0]))  # every process makes each of them
    held = [np.asarray(piece) for piece in layers if kept]
    return np.stack(held) if kept else None
