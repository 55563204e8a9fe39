"""How a job is asked to stop: by SIGTERM between two steps, and by SIGTERM or Ctrl-C while its step is compiled."""

import logging
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

from paris_jax.errors import Preempted
from paris_jax.training import waiting

logger = logging.getLogger(__name__)


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

    def compiled(self, name: str, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """The compiled step of a job, which takes minutes for a large network.

        Raises:
          Preempted: asked to stop meanwhile. Nothing has been trained that had to be saved; the compiler's thread goes
            on until the process ends. Processes of one job agree on a step once all have compiled.
        """
        began = time.perf_counter()
        logger.info("%s: compiling its step", name)

        def look() -> None:
            if self._asked:
                raise Preempted(f"{name} was asked to stop while its step was compiled, with nothing new to save")

        compiled = waiting.result_of("compiling", lowered.compile, look)
        logger.info("%s: compiled in %.1f s", name, time.perf_counter() - began)
        return compiled

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
