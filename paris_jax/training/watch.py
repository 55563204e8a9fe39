"""What is seen of a job while it runs: averages over its last steps, a step behind, in files and on the console."""

import collections
import contextlib
import dataclasses
import datetime
import logging
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from paris_jax.training import chips, metrics
from paris_jax.training.program import Job

logger = logging.getLogger(__name__)

# Steps that the devices may have before them: they never wait for the host, and a job that has to stop soon can.
IN_FLIGHT = 2
LINE_EVERY = 10.0  # seconds, where there is no terminal
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


@dataclasses.dataclass
class Clocks:
    """Seconds since the last line, and of the whole job over all its restarts."""

    trained: float = 0.0  # seconds of training before this start
    waited: float = 0.0  # seconds waiting for data since the last line
    began: float = dataclasses.field(default_factory=time.perf_counter)
    lined: float = dataclasses.field(default_factory=time.perf_counter)

    def total(self) -> float:
        return self.trained + time.perf_counter() - self.began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what is done inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began


class Watch:
    """Takes every step's values as they are promised and writes their averages once they have come."""

    def __init__(self, job: Job, mesh: jax.sharding.Mesh, clocks: Clocks, writer: Any, console: "Console"):
        self._job, self._mesh, self._clocks, self._writer, self._console = job, mesh, clocks, writer, console
        self._window: list[dict[str, jax.Array]] = []
        self._running: collections.deque[jax.Array] = collections.deque()
        self.handed: int | None = None  # the last step (from 0) that the devices were given

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the values of step `step` (from 0), just handed to the devices; a line that is due is of those before.

        Raises:
          metrics.FoundNotFinite: a step before has a loss, gradient or parameter that is not a number.
        """
        self.handed = step
        if step % self._job.settings.log_every == 0:
            self.line(step)
        self._window.append(values)
        self._running.append(values["loss"])
        if len(self._running) > IN_FLIGHT:
            self._running.popleft().block_until_ready()

    def line(self, step: int) -> None:
        """Waits for all steps before `step` that have no line yet, and writes it."""
        if not self._window:
            return
        values = jax.device_get(self._window)
        self._window.clear()
        bad = metrics.first_not_finite(values)
        if bad is not None:
            raise metrics.FoundNotFinite(step - len(values) + bad)
        scalars = metrics.average(values) | speed(self._job, len(values), self._clocks, self._mesh)
        self._writer.write(step, scalars)
        self._console.show(step, scalars)

    def flush(self) -> None:
        """Puts the lines where they outlive this process."""
        self._writer.flush()


def speed(job: Job, steps: int, clocks: Clocks, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Step time, clips a second, share of peak and share of time spent waiting for data, since the last line."""
    now = time.perf_counter()
    elapsed, clocks.lined = now - clocks.lined, now
    waited, clocks.waited = clocks.waited, 0.0
    scalars = {
        "seconds_per_step": elapsed / steps,
        "clips_per_second": steps * job.settings.batch / elapsed,
        "data_wait": waited / elapsed,
        "seconds_trained": clocks.total(),
        "host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,  # bytes, the most so far
    }
    if stats := mesh.local_devices[0].memory_stats():  # CPUs have none
        scalars["device_memory"] = stats["peak_bytes_in_use"]
    if chip := chips.of(mesh.devices.flat[0]):
        scalars["share_of_peak"] = scalars["clips_per_second"] * job.flops_per_sample / (chip.peak * mesh.devices.size)
    return scalars


class Console:
    """A progress bar on a terminal; elsewhere a log line at least every ten seconds. A context manager."""

    def __init__(self, job: Job, start: int):
        self._job, self._last = job, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._task = self._bar.add_task(job.name, total=job.steps, completed=start, note="compiling")

    def __enter__(self) -> "Console":
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def show(self, step: int, scalars: dict[str, float]) -> None:
        peak = f", {scalars['share_of_peak']:.0%} of peak" if "share_of_peak" in scalars else ""
        note = (
            f"loss {scalars['loss']:.4f}, {scalars['seconds_per_step'] * 1e3:.0f} ms a step{peak}, "
            f"{scalars['data_wait']:.1%} waiting for data"
        )
        self._bar.update(self._task, completed=step, note=note)
        now = time.perf_counter()
        if not self._bar.console.is_terminal and (now - self._last > LINE_EVERY or step == self._job.steps):
            self._last = now
            left = datetime.timedelta(seconds=round((self._job.steps - step) * scalars["seconds_per_step"]))
            logger.info("%s: step %d of %d, %s, %s left", self._job.name, step, self._job.steps, note, left)
