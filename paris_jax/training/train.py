"""The training loop, for every role: save, fetch, step, log, in this order, so that state and data always agree."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from paris_jax.errors import DeviceLost, Preempted, UserError
from paris_jax.training import checkpoints, failures, metrics, sharding
from paris_jax.training.distributed import StopRequest
from paris_jax.training.job import Job
from paris_jax.training.metrics import Clocks, MetricsLogger, ProgressReport
from paris_jax.training.state import TrainState
from paris_jax.training.step import ShardedStep

logger = logging.getLogger(__name__)


class Profile:
    """Records chosen steps with JAX's profiler; xprof and TensorBoard open what it writes."""

    def __init__(self, job: Job, steps: tuple[int, int] | None):
        """`steps` are the first to record and the one after the last, or None for no recording."""
        self._job, self._running = job, False
        self._first, self._end = steps or (-1, -1)
        self._folder = job.folder / "profile"
        if steps and self._end > job.steps:
            asked = f"--profile_steps={self._first}:{self._end}"
            raise UserError(f"{asked}: {job.name} has {job.steps} steps; choose earlier ones")

    def __enter__(self) -> "Profile":
        return self

    def starting(self, step: int) -> None:
        """Says so where the steps to record are done already."""
        if 0 <= self._first < step:
            asked = f"--profile_steps={self._first}:{self._end}"
            logger.warning("%s: nothing is profiled, as %s goes on from step %d", asked, self._job.name, step)

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


def train(
    job: Job,
    batches: Callable[[int, int], Any],
    clip_ids: Callable[[int], list[str]] | None = None,
    profile: tuple[int, int] | None = None,
    tracker: dict[str, Any] | None = None,
) -> TrainState:
    """Trains to `job.steps`, going on from the newest checkpoint where there is one.

    Args:
      batches: makes the data iterator of one of so many equal parts of each batch (index, count), with get_state and
        set_state (JSON) for its position.
      clip_ids: names the clips of a batch by its number, to say which ones gave a loss that is not finite.
      profile: first step to record with JAX's profiler and the one after the last, into `profile/` of the job's folder.
      tracker: what Weights & Biases is to be told of this job (arguments of `wandb.init`); None: nothing is sent.

    Returns:
      The final state, also saved as a checkpoint.

    Raises:
      Preempted: after SIGTERM, with everything saved; or after the loss of a device or of another process of the job.
      Refused: unreadable checkpoints, a mesh or a network that does not fit, or a loss that is not finite.
    """
    recorded = Profile(job, profile)
    program = ShardedStep(job)
    failures.check_memory(program)
    saved = checkpoints.Checkpoints(job.folder / "checkpoints", job.settings.max_to_keep, job.settings.keep_period)
    iterator = batches(*sharding.rows_of_this_process(program.mesh))
    try:
        with (
            contextlib.ExitStack() as stack,
            failures.detect_device_loss(job),
            failures.explain_failures(job, saved, clip_ids),
        ):
            stack.enter_context(jax.set_mesh(program.mesh))
            start, state, clocks = _first_state(program, saved, iterator)
            recorded.starting(start)
            first = jax.process_index() == 0
            writer = metrics.Metrics(job.folder, start, tracker) if first else metrics.NullMetrics()
            stack.callback(writer.close)
            console = stack.enter_context(ProgressReport(job, start))
            watch = MetricsLogger(job, program.mesh, clocks, writer, console)
            stop = stack.enter_context(StopRequest())
            stack.enter_context(recorded)
            stack.enter_context(failures.note_failing_step(job, watch, start, clip_ids))
            return _run(program, state, start, iterator, saved, watch, clocks, stop, recorded)
    finally:
        if not isinstance(sys.exception(), DeviceLost):  # the checkpoints' writers wait for each other
            saved.close()


def _first_state(program: ShardedStep, saved: checkpoints.Checkpoints, iterator: Any) -> tuple[int, TrainState, Clocks]:
    """Step, state and clocks to start with, and the data at that step: from the newest checkpoint, or fresh ones."""
    found = saved.restore(program.state)
    if found is None:
        return 0, program.first_state(), Clocks()
    start, state, position, kept = found
    iterator.set_state(position)
    saved.delete_after(start)
    logger.info("%s goes on from step %d", program.job.name, start)
    return start, state, Clocks(trained=kept["trained"])


def _run(program, state, start, iterator, saved, watch, clocks, stop, profile) -> TrainState:
    job, last_saved = program.job, start if start else -1
    make_step: Any = None
    for step in range(start, job.steps + 1):
        stopping = stop.asked(step)
        due = step == job.steps or stopping or (step > start and step % job.settings.checkpoint_every_steps == 0)
        if due and step != last_saved:
            watch.line(step)  # what is not finite is not saved
            watch.flush()
            saved.save(step, state, iterator.get_state(), {"trained": clocks.total()})
            last_saved = step
        if step == job.steps:
            saved.wait()
            return state
        if stopping:
            saved.wait()
            raise Preempted(f"{job.name} was asked to stop and is saved at step {step} of {job.steps}")
        with clocks.waiting():
            batch = sharding.place_batch(next(iterator), program.mesh)
        if make_step is None:
            make_step = stop.compiled(job.name, program.step.lower(state, batch))
            clocks.lined, clocks.waited = time.perf_counter(), 0.0
        profile.before(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, values = make_step(state, batch)
        watch.add(step, values)
        profile.after(step, state)
    raise AssertionError("the loop ends by returning")
