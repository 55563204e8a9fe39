"""The training loop of every role: save, fetch, step, log, in this order, so that state and data always agree."""

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from paris_jax.errors import DeviceLost, UserError
from paris_jax.training import failures, metrics, sharding
from paris_jax.training.checkpoints import Checkpoints
from paris_jax.training.distributed import StopRequest
from paris_jax.training.job import Job
from paris_jax.training.metrics import Clocks, MetricsLogger, ProgressReport
from paris_jax.training.state import TrainState
from paris_jax.training.step import ShardedStep

logger = logging.getLogger(__name__)

ClipIds = Callable[[int], list[str]]  # the clips of a batch, by its number


def train(
    job: Job,
    batches: Callable[[int, int], Any],
    clip_ids: ClipIds | None = None,
    profile: tuple[int, int] | None = None,
    tracker: dict[str, Any] | None = None,
) -> TrainState:
    """Trains to `job.steps`, resuming from the newest checkpoint where there is one.

    Args:
      batches: makes the data iterator of a part of each batch (index, number of parts), with get_state and set_state
        (JSON) for its position.
      clip_ids: names the clips of a batch by its number, for errors.
      profile: first step to record with JAX's profiler and the one after the last, into `profile/` of the job's folder.
      tracker: arguments of `wandb.init`, to log to Weights & Biases.

    Returns:
      The final state, also saved as a checkpoint.

    Raises:
      Preempted: after SIGTERM or SIGHUP, with everything saved, or after the loss of a device or of another process.
      KeyboardInterrupt: after Ctrl-C, with everything saved.
      UserError: unreadable checkpoints, a mesh or a network that does not fit, or a loss that is not finite.
    """
    with open_run(job, batches, clip_ids, profile, tracker) as (run, start, state):
        for step in range(start, job.steps + 1):
            # Save
            stopping = run.stop.asked(step)
            if run.is_due(step, start, stopping):
                run.save(step, state)
            if step == job.steps:
                break
            if stopping:
                run.checkpoints.wait()
                raise run.stop.stopped(f"is saved at step {step} of {job.steps}")
            # Fetch
            with run.clocks.waiting():
                batch = sharding.place_batch(next(run.iterator), run.program.mesh)
            # Step
            take_step = run.compiled(state, batch)
            run.profiler.before(step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = take_step(state, batch)
            # Log
            run.log.add(step, values)
            run.profiler.after(step, state)
        run.checkpoints.wait()
        return state


@dataclasses.dataclass
class Run:
    """Everything that the loop uses besides the state."""

    job: Job
    program: ShardedStep
    iterator: Any  # batches of this process, as NumPy arrays
    checkpoints: Checkpoints
    log: MetricsLogger
    clocks: Clocks
    stop: StopRequest
    profiler: "Profiler"
    last_saved: int
    _steps: dict[Any, Callable[..., Any]] = dataclasses.field(default_factory=dict)  # by the shapes of a batch

    def is_due(self, step: int, start: int, stopping: bool) -> bool:
        """Whether to save before making update `step`."""
        periodic = step > start and step % self.job.settings.checkpoint_every_steps == 0
        return (step == self.job.steps or stopping or periodic) and step != self.last_saved

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving; raises an error for a state that is not finite."""
        self.log.line(step)
        self.log.flush()
        self.checkpoints.save(step, state, self.iterator.get_state(), {"trained": self.clocks.total()})
        self.last_saved = step

    def compiled(self, state: TrainState, batch: dict[str, jax.Array]) -> Callable[..., Any]:
        """The compiled step for batches of these shapes; the first call compiles it, and can be interrupted."""
        shapes = tuple(array.shape for array in batch.values())
        if shapes not in self._steps:
            began = time.perf_counter()
            compiled, inputs = self.stop.compiled(self.program.lower(state, batch)), self.program.inputs
            if self._steps:  # another length of texts: the time of the other steps counts
                self.clocks.lined += time.perf_counter() - began
            else:
                self.clocks.lined, self.clocks.waited = time.perf_counter(), 0.0
            self._steps[shapes] = lambda state, batch: compiled(state, batch, inputs)
        return self._steps[shapes]


@contextlib.contextmanager
def open_run(
    job: Job,
    batches: Callable[[int, int], Any],
    clip_ids: ClipIds | None,
    profile: tuple[int, int] | None,
    tracker: dict[str, Any] | None,
) -> Iterator[tuple[Run, int, TrainState]]:
    """Opens the loop's resources, in order, and closes them; yields them with the first step and its state."""
    profiler = Profiler(job, profile)
    program = ShardedStep(job)
    failures.check_memory(program)
    saved = Checkpoints(job.folder / "checkpoints", job.settings.max_to_keep, job.settings.keep_period)
    iterator = batches(*sharding.rows_of_this_process(program.mesh))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(failures.detect_device_loss(job))
            stack.enter_context(failures.explain_failures(job, saved, clip_ids))
            stop = stack.enter_context(StopRequest(job.name))
            stack.enter_context(jax.set_mesh(program.mesh))
            start, state, clocks = stop.wait_for("restoring", lambda: _first_state(program, saved, iterator))
            profiler.check_start(start)
            writes = jax.process_index() == 0
            writer = metrics.Metrics(job.folder, start, tracker) if writes else metrics.NullMetrics()
            stack.callback(writer.close)
            console = stack.enter_context(ProgressReport(job, start))
            log = MetricsLogger(job, program.mesh, clocks, writer, console)
            stack.enter_context(profiler)
            stack.enter_context(failures.note_failing_step(job, log, start, clip_ids))
            yield Run(job, program, iterator, saved, log, clocks, stop, profiler, start if start else -1), start, state
    finally:
        if not isinstance(sys.exception(), DeviceLost):
            saved.close()
        elif jax.process_count() == 1:  # of several, the writers would wait for the lost one
            with contextlib.suppress(Exception):
                saved.close()


def _first_state(program: ShardedStep, saved: Checkpoints, iterator: Any) -> tuple[int, TrainState, Clocks]:
    """First step, state and clocks, with the iterator at its position: from the newest checkpoint, or fresh."""
    with jax.set_mesh(program.mesh):  # contexts belong to a thread
        restored = saved.restore(program.state)
        if restored is None:
            return 0, program.first_state(), Clocks()
    start, state, position, clocks = restored
    iterator.set_state(position)
    saved.delete_after(start)
    logger.info("%s resumes from step %d", program.job.name, start)
    return start, state, Clocks(trained=clocks["trained"])


class Profiler:
    """Records chosen steps with JAX's profiler, for xprof and TensorBoard. A context manager."""

    def __init__(self, job: Job, steps: tuple[int, int] | None):
        """`steps` are the first to record and the one after the last, or None for no recording."""
        self._job, self._running = job, False
        self._first, self._end = steps or (-1, -1)
        self._folder = job.folder / "profile"
        self._flag = f"--profile_steps={self._first}:{self._end}"
        if steps and self._end > job.steps:
            raise UserError(f"{self._flag}: {job.name} has {job.steps} steps; choose earlier ones")

    def __enter__(self) -> "Profiler":
        return self

    def check_start(self, step: int) -> None:
        """Warns where training resumes behind the steps to record."""
        if 0 <= self._first < step:
            logger.warning("%s: nothing is profiled, as %s resumes from step %d", self._flag, self._job.name, step)

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, state: TrainState) -> None:
        if self._running and step + 1 == self._end:
            jax.block_until_ready(state)
            self.__exit__()
            logger.info("%s: steps %d to %d are profiled in %s", self._job.name, self._first, self._end, self._folder)

    def __exit__(self, *_: Any) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
