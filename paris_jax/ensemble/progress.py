"""Progress of sampling: a bar, previews, callbacks, and a clean stop on Ctrl-C.

One compiled program takes any number of steps. It is called for a few steps at a time, so that the time between calls
is negligible, and the device is idle while a preview is made.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from paris_jax.diffusion import solvers
from paris_jax.training import distributed

CALL_SECONDS = 0.1  # a call that takes less than half of it is given more steps, one of more than twice fewer
# Takes the steps from one up to another.
Advance = Callable[[solvers.State, int, int], solvers.State]
Preview = Callable[[int, np.ndarray], None]  # (steps done, data predicted so far (N, T, H, W, C))
# (steps done, state) -> latents that replace the state's, or None
StepEnd = Callable[[int, solvers.State], Any]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during sampling. `samples` holds the videos as predicted at the last finished step."""

    def __init__(self, done: int, steps: int, samples: Any = None):
        kept = "the prediction at this step is kept" if done else "there is nothing to keep yet"
        super().__init__(f"interrupted after {done} of {steps} steps; {kept}")
        self.done, self.steps, self.samples = done, steps, samples


@dataclasses.dataclass(frozen=True)
class Watcher:
    """The work between the steps.

    Attributes:
      bar: show a progress bar.
      every: steps between previews; 0 for none.
      preview: called with the data predicted so far.
      step_end: called after every step; may return latents that replace the state's.
    """

    bar: bool = False
    every: int = 0
    preview: Preview | None = None
    step_end: StepEnd | None = None

    @property
    def active(self) -> bool:
        return self.bar or self.preview is not None or self.step_end is not None

    def next_stop(self, done: int, at_once: int, steps: int) -> tuple[int, int]:
        """The step to run to, and the step of the next preview."""
        due = (done // self.every + 1) * self.every if self.every else steps
        return min(done + (1 if self.step_end else at_once), due, steps), due


def run_with_progress(
    advance: Advance, state: solvers.State, steps: int, watcher: Watcher, together: bool = False
) -> solvers.State:
    """The state after all steps, with the watcher's callbacks in between.

    Args:
      together: whether several processes take the steps together. Then they take one step at a time, agree before each
        whether to continue, and the first process shows the bar and the previews.

    Raises:
      Interrupted: with the solver state reached in `samples`, for the caller to decode.
    """
    reached, at_once, first = (0, state), 1, not together or jax.process_index() == 0
    failure: Exception | None = None
    try:
        with _agree_to_stop(together) as stop, Progress(disable=not (watcher.bar and first)) as progress:
            task = progress.add_task("compiling", total=steps)
            while (done := reached[0]) < steps and not stop(failure is not None):
                until, due = watcher.next_stop(done, at_once, steps)
                start = time.perf_counter()
                reached = until, jax.block_until_ready(advance(reached[1], done, until))
                took = time.perf_counter() - start
                progress.update(task, completed=until, description="sampling")
                if done and not together:  # the first call compiled
                    faster, slower = took < CALL_SECONDS / 2, took > 2 * CALL_SECONDS
                    at_once = 2 * at_once if faster else max(1, at_once // 2) if slower else at_once
                if watcher.step_end:
                    latents = watcher.step_end(until, reached[1])
                    if latents is not None:
                        reached = until, dataclasses.replace(reached[1], x=latents)
                if watcher.preview and first and until == due < steps:
                    try:
                        watcher.preview(until, np.asarray(reached[1].data))
                    except Exception as error:
                        failure = error  # the other processes learn of it before the next step
        if failure is not None:
            raise failure
        if reached[0] < steps:  # a process was interrupted
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Interrupted(reached[0], steps, reached[1]) from None
    return reached[1]


@contextlib.contextmanager
def _agree_to_stop(together: bool) -> Iterator[Callable[[bool], bool]]:
    """Whether to stop before a step: because this process failed, or because any process failed or was interrupted.

    A single process keeps the usual KeyboardInterrupt; one of several would leave the others waiting for ever.
    """
    if not together:
        yield lambda failed: failed
        return
    interrupted, main = [], threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True)) if main else None
    try:
        yield lambda failed: not distributed.minimum_over_processes(not (interrupted or failed))
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
