"""What people see while videos are drawn: a bar, previews, and an end when they ask for one.

The steps are taken by one compiled program that takes any number of them: a few at a time, so that what lies between
two calls costs next to nothing of them, and nothing is at work on the device while a preview is made.
"""

import contextlib
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

CALL_SECONDS = (
    0.1  # seconds; calls that take less than half of it take more steps, calls of more than twice that take fewer
)
# Takes the steps from one up to another.
Advance = Callable[[solvers.State, int, int], solvers.State]
Preview = Callable[[int, np.ndarray], None]  # (steps done, the data predicted so far (N, T, H, W, C))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while videos were drawn. `samples` holds them as they were predicted at the last step that was done."""

    def __init__(self, done: int, steps: int, samples: Any = None):
        kept = "what was predicted by then is kept" if done else "there is nothing to keep yet"
        super().__init__(f"interrupted after {done} of {steps} steps; {kept}")
        self.done, self.steps, self.samples = done, steps, samples


def run_with_progress(
    advance: Advance,
    state: solvers.State,
    steps: int,
    bar: bool,
    every: int = 0,
    preview: Preview | None = None,
    together: bool = False,
) -> solvers.State:
    """The state after all steps; every so many of them, `preview` is called with what is predicted by then.

    Args:
      together: whether the processes of a job take the steps together. Then all of them take one at a time, agree
        before each whether to go on, and the first shows the bar and the previews.

    Raises:
      Interrupted: with the state that was reached in `samples`, which the caller turns into what is kept.
    """
    reached, at_once, first = (0, state), 1, not together or jax.process_index() == 0
    failure: Exception | None = None
    try:
        with _agree_to_stop(together) as stop, Progress(disable=not (bar and first)) as shown:
            task = shown.add_task("compiling", total=steps)
            while (done := reached[0]) < steps and not stop(failure is not None):
                due = (done // every + 1) * every if every else steps
                until, begun = min(done + at_once, due, steps), time.perf_counter()
                reached = until, jax.block_until_ready(advance(reached[1], done, until))
                took = time.perf_counter() - begun
                shown.update(task, completed=until, description="sampling")
                if done and not together:  # the first call compiled
                    at_once = (
                        2 * at_once
                        if took < CALL_SECONDS / 2
                        else max(1, at_once // 2)
                        if took > 2 * CALL_SECONDS
                        else at_once
                    )
                if preview and first and until == due < steps:
                    try:
                        preview(until, np.asarray(reached[1].data))
                    except Exception as error:
                        failure = error  # of which the others, too, hear before the next step
        if failure is not None:
            raise failure
        if reached[0] < steps:  # somebody was interrupted
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise Interrupted(reached[0], steps, reached[1]) from None
    return reached[1]


@contextlib.contextmanager
def _agree_to_stop(together: bool) -> Iterator[Callable[[bool], bool]]:
    """Whether to stop before a step: because this process failed, or any that goes with it did or was interrupted.

    Alone, Ctrl-C is the exception that it always is; together, whoever left would have the others wait for ever.
    """
    if not together:
        yield lambda failed: failed
        return
    asked, main = [], threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, lambda *_: asked.append(True)) if main else None
    try:
        yield lambda failed: not distributed.minimum_over_processes(not (asked or failed))
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
