"""What a job says about itself: JSON lines and TensorBoard files, averaged over the steps since the last line."""

import contextlib
import importlib.util
import json
import math
import os
import time
from typing import Any, Protocol

import numpy as np
from etils import epath

from paris_jax import manifest
from paris_jax.errors import Refused
from paris_jax.training.step import TIME_BINS


class FoundNotFinite(Exception):
    """The loss, its gradient or the parameters are not finite after step `step` (from 0)."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class Writer(Protocol):
    def write_scalars(self, step: int, scalars: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class _TensorBoardX:
    """TensorBoard files without TensorFlow. What a run that was stopped wrote after step `start` is not shown."""

    def __init__(self, folder: epath.PathLike, start: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1, flush_secs=10)

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()  # of what its thread has taken up; the rest follows within ten seconds

    def close(self) -> None:
        self._writer.close()


def tensorboard(folder: epath.PathLike, start: int) -> Writer:
    """clu's writer where TensorFlow is installed, otherwise one that needs none."""
    if importlib.util.find_spec("tensorflow") and importlib.util.find_spec("tensorboard"):
        import tensorflow as tf
        from clu import metric_writers

        tf.config.set_visible_devices([], "GPU")  # it would take the memory that the network needs
        return metric_writers.SummaryWriter(str(folder))
    return _TensorBoardX(folder, start)


class _WeightsAndBiases:
    """The same lines on Weights & Biases, as one run of a fixed id however often the job is stopped and goes on."""

    def __init__(self, told: dict[str, Any]):
        import wandb

        try:
            self._run = wandb.init(**told, resume="allow")
        except wandb.Error as error:
            said = " ".join(str(error).split())[:200]
            raise Refused(
                f"wandb={told['project']!r}: Weights & Biases cannot be reached ({said}); run 'wandb login', set "
                "WANDB_MODE=offline, or leave wandb empty"
            ) from error

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def flush(self) -> None:
        pass  # it sends on its own

    def close(self) -> None:
        self._run.finish()


class Nothing:
    """The metrics of a job's other processes: the first one writes for all."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    """A text file that grows by a line at a time; on a bucket, where nothing grows, it is written anew now and then."""

    PAUSE = 30.0  # seconds between two writings of an object

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
    """`metrics.jsonl` and TensorBoard of one job; lines after the step that a resumed job starts from are dropped.

    `tracker` holds the arguments of `wandb.init`, for those who want the lines on Weights & Biases, too.
    """

    def __init__(self, folder: epath.PathLike, start: int, tracker: dict[str, Any] | None = None):
        self.path = epath.Path(folder) / "metrics.jsonl"
        kept = [line for line in _whole_lines(self.path) if line["step"] <= start]
        self._lines = _Lines(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._writers = [tensorboard(epath.Path(folder) / "tensorboard", start)]
        self._writers += [_WeightsAndBiases(tracker)] if tracker else []

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._lines.add(json.dumps({"step": step, **scalars}) + "\n")
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def flush(self) -> None:
        """Puts every line of `metrics.jsonl` where it outlives this process: what led to a checkpoint is not lost."""
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
    except ValueError:  # being written, or damaged
        return None


def _whole_lines(path: epath.Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the last line of a killed job
            break
    return lines


def average(window: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over the steps of a window; the loss by time bin weighs every sample equally and leaves empty bins out."""
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
