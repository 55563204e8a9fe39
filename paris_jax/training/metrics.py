"""Training metrics: averaged over a window, written one step late to JSON lines, TensorBoard and the console."""

import collections
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from paris_jax.artifacts import manifest
from paris_jax.config import hashing
from paris_jax.config.experiment import Experiment
from paris_jax.errors import UserError
from paris_jax.models import flops
from paris_jax.training.job import Job
from paris_jax.training.losses import TIME_BINS

logger = logging.getLogger(__name__)


class NonFiniteStep(Exception):
    """The loss, its gradient or the parameters are not finite after step `step` (from 0)."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Writer(Protocol):
    def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _TensorBoardX:
    """TensorBoard files without TensorFlow. Entries after step `start`, of a run that was stopped, are purged."""

    def __init__(self, folder: epath.PathLike, start: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1, flush_secs=10)

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()  # its thread writes the rest within ten seconds

    def close(self) -> None:
        self._writer.close()


def tensorboard(folder: epath.PathLike, start: int) -> Writer:
    """clu's writer where TensorFlow is installed, otherwise tensorboardX."""
    if importlib.util.find_spec("tensorflow") and importlib.util.find_spec("tensorboard"):
        import tensorflow as tf
        from clu import metric_writers

        tf.config.set_visible_devices([], "GPU")  # it would allocate all memory
        return metric_writers.SummaryWriter(str(folder))
    return _TensorBoardX(folder, start)


class _WeightsAndBiases:
    """The same lines on Weights & Biases, as one run with a fixed id over all restarts of the job."""

    def __init__(self, arguments: dict[str, Any]):
        import wandb

        try:
            self._run = wandb.init(**arguments, resume="allow")
        except wandb.Error as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"wandb_project={arguments['project']!r}: Weights & Biases cannot be reached ({said}); run 'wandb "
                "login', "
                "set "
                "WANDB_MODE=offline, or leave wandb_project empty"
            ) from error

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def flush(self) -> None:
        pass  # wandb sends in the background

    def close(self) -> None:
        self._run.finish()


class NullMetrics:
    """Metrics of all processes but the first, which writes for all."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _JsonLines:
    """A text file that grows line by line; on a bucket, it is rewritten now and then."""

    PAUSE = 30.0  # seconds between two writes of an object

    def __init__(self, path: epath.Path, text: str):
        self._path, self._text, self._written = path, text, time.monotonic()
        manifest.write_atomically(path, text)
        self._file = None if "://" in str(path) else path.open("a")

    def add(self, line: str) -> None:
        if self._file:
            self._file.write(line)
            self._file.flush()
            return
        self._text += line
        if time.monotonic() - self._written > self.PAUSE:
            self.flush()

    def flush(self) -> None:
        if not self._file:
            self._path.write_text(self._text)
            self._written = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file:
            self._file.close()


class Metrics:
    """`metrics.jsonl` and TensorBoard of one job; lines after the first step of a resumed job are dropped.

    `tracker`: arguments of `wandb.init`, to log to Weights & Biases, too.
    """

    def __init__(self, folder: epath.PathLike, start: int, tracker: dict[str, Any] | None = None):
        self.path = epath.Path(folder) / "metrics.jsonl"
        kept = [line for line in _whole_lines(self.path) if line["step"] <= start]
        self._lines = _JsonLines(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._writers = [tensorboard(epath.Path(folder) / "tensorboard", start)]
        self._writers += [_WeightsAndBiases(tracker)] if tracker else []

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._lines.add(json.dumps({"step": step, **scalars}) + "\n")
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def flush(self) -> None:
        """Makes every line durable, so that those before a checkpoint survive a crash."""
        for each in (*self._writers, self._lines):
            each.flush()

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for each in (*self._writers, self._lines):
                stack.callback(each.close)


def read(path: epath.PathLike) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, oldest first."""
    return _whole_lines(epath.Path(path))


def newest(path: epath.PathLike) -> dict[str, float] | None:
    """The last whole line of a `metrics.jsonl`, without reading the rest; None where there is none yet."""
    path = epath.Path(path)
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - (1 << 14)))
        *whole, _ = file.read().split(b"\n")
    try:
        return json.loads(whole[-1]) if whole else None
    except (ValueError, RecursionError):  # half written, or damaged
        return None


def _whole_lines(path: epath.Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):  # the last line of a killed job
            break
    return lines


def average(window: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over the steps of a window; the loss by timestep bin weighs samples equally and omits empty bins."""
    scalars = {name: float(np.mean([w[name] for w in window])) for name in window[0] if not name.startswith("bin_")}
    sums, counts = (np.sum([w[name] for w in window], axis=0) for name in ("bin_sum", "bin_count"))
    for b in range(TIME_BINS):
        if counts[b]:
            scalars[f"loss_t/{b / TIME_BINS:.3f}"] = float(sums[b] / counts[b])
    return scalars


def first_not_finite(window: list[dict[str, np.ndarray]]) -> int | None:
    """Index of the first step of the window whose loss or parameters are not finite, or None when all are."""
    for i, w in enumerate(window):
        if not (math.isfinite(w["loss"]) and math.isfinite(w["param_norm"]) and math.isfinite(w["grad_norm"])):
            return i
    return None


def wandb_arguments(experiment: Experiment, job: Job) -> dict[str, Any] | None:
    """Arguments of `wandb.init` for a job, or None; the id derives from its folder and stays the same over restarts."""
    if not experiment.wandb_project:
        return None
    if importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"wandb_project={experiment.wandb_project!r}: Weights & Biases is not installed; pip install -e '.[wandb]'"
        )
    return {
        "project": experiment.wandb_project,
        "id": hashing.hash_text(f"{experiment.hash} {job.folder.resolve()}")[:16],
        "name": f"{experiment.name}, {job.name}",
        "group": experiment.name,
        "dir": None if "://" in str(job.folder) else str(job.folder),
        "config": experiment.to_dict(),
    }


# Steps in flight on the devices: enough that they never wait for the host, few enough to stop soon.
IN_FLIGHT = 2
LINE_EVERY = 10.0  # seconds between log lines without a terminal
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


@dataclasses.dataclass
class Clocks:
    """Times in seconds: since the last line, and of the whole job over all restarts."""

    trained: float = 0.0  # seconds of training before this start
    waited: float = 0.0  # seconds waiting for data since the last line
    began: float = dataclasses.field(default_factory=time.perf_counter)
    lined: float = dataclasses.field(default_factory=time.perf_counter)

    def total(self) -> float:
        return self.trained + time.perf_counter() - self.began

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began


class MetricsLogger:
    """Collects the metrics of every step without waiting for them, and writes their averages one line late."""

    def __init__(self, job: Job, mesh: jax.sharding.Mesh, clocks: Clocks, writer: Any, console: "ProgressReport"):
        self._job, self._mesh, self._clocks, self._writer, self._console = job, mesh, clocks, writer, console
        self._window: list[dict[str, jax.Array]] = []
        self._running: collections.deque[jax.Array] = collections.deque()
        self.handed: int | None = None  # the last step (from 0) that was dispatched

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the metrics of step `step` (from 0), just dispatched; a line that is due covers the steps before.

        Raises:
          NonFiniteStep: an earlier step has a non-finite loss, gradient or parameter.
        """
        self.handed = step
        if step % self._job.settings.log_every_steps == 0:
            self.line(step)
        self._window.append(values)
        self._running.append(values["loss"])
        if len(self._running) > IN_FLIGHT:
            self._running.popleft().block_until_ready()

    def line(self, step: int) -> None:
        """Waits for all steps before `step` that have no line yet, and writes one."""
        if not self._window:
            return
        values = jax.device_get(self._window)
        self._window.clear()
        bad = first_not_finite(values)
        if bad is not None:
            raise NonFiniteStep(step - len(values) + bad)
        scalars = average(values) | throughput(self._job, len(values), self._clocks, self._mesh)
        self._writer.write(step, scalars)
        self._console.show(step, scalars)

    def flush(self) -> None:
        """Makes the lines durable."""
        self._writer.flush()


def throughput(job: Job, steps: int, clocks: Clocks, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Step time, clips per second, MFU and the fraction of time spent waiting for data, since the last line."""
    now = time.perf_counter()
    elapsed, clocks.lined = now - clocks.lined, now
    waited, clocks.waited = clocks.waited, 0.0
    scalars = {
        "seconds_per_step": elapsed / steps,
        "clips_per_second": steps * job.settings.global_batch_size / elapsed,
        "data_wait": waited / elapsed,
        "seconds_trained": clocks.total(),
        "host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,  # bytes, peak
    }
    if stats := mesh.local_devices[0].memory_stats():  # CPUs have none
        scalars["device_memory"] = stats["peak_bytes_in_use"]
    if chip := flops.chip_of(mesh.devices.flat[0]):
        scalars["mfu"] = scalars["clips_per_second"] * job.flops_per_sample / (chip.peak * mesh.devices.size)
    return scalars


class ProgressReport:
    """A progress bar on a terminal; elsewhere a log line at least every ten seconds. A context manager."""

    def __init__(self, job: Job, start: int):
        self._job, self._last = job, 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn())
        self._task = self._bar.add_task(job.name, total=job.steps, completed=start, note="compiling")

    def __enter__(self) -> "ProgressReport":
        if self._bar.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def show(self, step: int, scalars: dict[str, float]) -> None:
        peak = f", {scalars['mfu']:.0%} of peak" if "mfu" in scalars else ""
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
