"""What people see while videos are drawn: a bar, previews, and an end when they ask for one.

The solver loop is one compiled call that asks the host before each step. It runs in a thread, so that the one that
called can be interrupted.
"""

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from paris_jax.ensemble import sampler

Preview = Callable[[int, np.ndarray], None]  # (steps done, the data predicted so far (N, T, H, W, C))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while videos were drawn. `samples` holds them as they were predicted at the last step that was done."""

    def __init__(self, done: int, steps: int, samples: Any = None):
        kept = "what was predicted by then is kept" if done else "there is nothing to keep yet"
        super().__init__(f"interrupted after {done} of {steps} steps; {kept}")
        self.done, self.steps, self.samples = done, steps, samples


class Watch:
    """One call of the sampler as it is seen from outside."""

    def __init__(self, steps: int, bar: bool, every: int = 0, preview: Preview | None = None):
        self._steps, self._every, self._preview = steps, every, preview
        self._stopped = threading.Event()
        self.done, self._ended = 0, False
        self.failure: BaseException | None = None
        self._bar = Progress(disable=not bar)

    def step(self, step: int) -> bool:
        """Called before each step; answers whether to take it."""
        if not self._ended:
            self.done = step
            self._bar.update(self._task, completed=step, description="sampling" if step else "first step")
            self._ended = self._stopped.is_set()
        return not self._ended

    def look(self, step: int, data: np.ndarray) -> bool:
        """Called before the steps that are to be looked at; answers whether to take them."""
        assert self._preview
        try:
            self._preview(step, data)
        except BaseException as error:  # raised where the sampler was called, not in the runtime's thread
            self.failure = error
            self._stopped.set()
        self._ended = self._stopped.is_set()
        return not self._ended

    def run(self, call: Callable[..., Any]) -> Any:
        """The result of `call(asking, look_every)`, which are to be handed to the compiled loop.

        Raises:
          Interrupted: with the result in `samples`, which the caller turns into what it would have returned.
        """
        global _current
        if threading.get_ident() == _asking:
            raise RuntimeError("on_preview cannot draw with a bar or previews of its own; draw without them there")
        with _one_at_a_time, self._bar, concurrent.futures.ThreadPoolExecutor(1) as pool:
            self._task, _current = self._bar.add_task("compiling", total=self._steps), self
            every = self._every if self._preview else 0
            result = pool.submit(lambda: jax.block_until_ready(call(_ASKING, every)))
            try:
                while not result.done():  # a wait without an end would not always hear of Ctrl-C
                    concurrent.futures.wait([result], timeout=0.2)
            except KeyboardInterrupt:
                self._stopped.set()
                found = result.result()
                raise Interrupted(self.done if self._ended else self._steps, self._steps, found) from None
            finally:
                self._stopped.set()  # whatever ended the wait: the loop does not go on unseen
                concurrent.futures.wait([result])
                _current = None
            if self.failure is not None:
                raise self.failure
            found = result.result()
            self._bar.update(self._task, completed=self._steps, description="sampling")
            return found


# The compiled loop knows one function for all calls, so that none compiles again.
_current: Watch | None = None
_one_at_a_time = threading.Lock()
_asking: int | None = None  # the thread that is in a preview


def _asked(answer: Callable[[Watch], bool]) -> np.ndarray:
    """What the watch of the call at hand answers."""
    global _asking
    watch, _asking = _current, threading.get_ident()
    try:
        return np.array(watch is None or answer(watch))
    finally:
        _asking = None


_ASKING = sampler.Asking(
    step=lambda step: _asked(lambda watch: watch.step(int(step))),
    look=lambda step, data: _asked(lambda watch: watch.look(int(step), np.asarray(data))),
)
