"""The metrics' writers: clu's where TensorFlow is there, one without it elsewhere, and lines that survive a stop."""

import dataclasses
import importlib.util
import json
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from paris_jax.errors import UserError
from paris_jax.training import metrics
from paris_jax.training.losses import TIME_BINS

HERE = importlib.util.find_spec("tensorflow") is not None and importlib.util.find_spec("tensorboard") is not None


def events(folder: Path) -> Iterator[Any]:
    """What TensorBoard would read, decoded from the event files' own records."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events*")):
        data, start = path.read_bytes(), 0
        while start < len(data):  # length (8 bytes), its checksum (4), an event, its checksum (4)
            length = int.from_bytes(data[start : start + 8], "little")
            yield Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            packed = np.frombuffer(value.tensor.tensor_content, np.float32)  # TensorFlow's way
            number = float(packed[0]) if packed.size else value.simple_value
            found.setdefault(value.tag, []).append((event.step, number))
    return found


def write(folder: Path) -> None:
    writer = metrics.tensorboard(folder, 0)
    writer.write_scalars(4, {"loss": 0.5, "loss_t/0.125": 0.25})
    writer.write_scalars(8, {"loss": 0.375})
    writer.close()


def test_tensorboard_reads_the_written_events(tmp_path):
    write(tmp_path)
    assert scalars(tmp_path) == {"loss": [(4, 0.5), (8, 0.375)], "loss_t/0.125": [(4, 0.25)]}


@pytest.mark.skipif(not HERE, reason="needs TensorFlow: pip install -e '.[tfds]'")
def test_with_tensorflow_it_is_clu_that_writes(tmp_path):
    from clu import metric_writers

    assert isinstance(metrics.tensorboard(tmp_path, 0), metric_writers.SummaryWriter)


@pytest.mark.skipif(HERE, reason="TensorFlow is installed, and the test above runs")
def test_clu_writes_where_tensorflow_is_installed(tmp_path, monkeypatch):
    """Stands in for the test above on machines without TensorFlow."""
    opened = []
    writers, tensorflow = types.ModuleType("clu.metric_writers"), types.ModuleType("tensorflow")
    writers.SummaryWriter = opened.append
    tensorflow.config = types.SimpleNamespace(set_visible_devices=lambda *hidden: opened.append(hidden))
    monkeypatch.setitem(sys.modules, "clu.metric_writers", writers)
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in ("tensorflow", "tensorboard"))
    metrics.tensorboard(tmp_path, 0)
    assert opened == [([], "GPU"), str(tmp_path)]  # the accelerator stays JAX's


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs Weights & Biases: pip install -e '.[wandb]'"
)
def test_a_resumed_job_is_one_run_of_weights_and_biases(tmp_path, monkeypatch):
    """Without a network: what would be sent lies in files, under the id that was fixed."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start, steps in ((0, (4, 8)), (8, (12,))):
        tracker = {"project": "p", "id": "fixed", "name": "expert 0", "dir": str(tmp_path)}
        job = metrics.Metrics(tmp_path, start, tracker)
        for step in steps:
            job.write(step, {"loss": 1 / step})
        job.close()
    assert {path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {"run-fixed.wandb"}


def test_weights_and_biases_gets_the_same_id_at_every_start(micro, tmp_path, monkeypatch):
    job = types.SimpleNamespace(folder=epath.Path(tmp_path) / "experts/0", name="expert 0")
    assert metrics.wandb_arguments(micro, job) is None
    experiment = dataclasses.replace(micro, wandb_project="project")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    first, again = (metrics.wandb_arguments(experiment, job) for _ in range(2))
    assert first == again and first["project"] == "project" and first["name"] == "micro, expert 0"
    other = types.SimpleNamespace(folder=epath.Path(tmp_path) / "experts/1", name="expert 1")
    assert metrics.wandb_arguments(experiment, other)["id"] != first["id"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"wandb_project='project': Weights & Biases is not installed; pip install -e '.\[wandb\]'"
    ):
        metrics.wandb_arguments(experiment, job)


def test_a_line_is_the_average_of_its_steps_and_time_bins_weigh_samples(tmp_path):
    """Two steps whose samples fall differently into the bins: a bin's loss is its sum over its count."""
    bins = np.zeros((2, 2, TIME_BINS))  # step, (sum, count), bin
    bins[0, :, 1], bins[1, :, 1] = (6.0, 3), (2.0, 1)
    bins[1, :, 5] = (1.5, 2)
    window = [
        {"loss": loss, "grad_norm": norm, "bin_sum": sums, "bin_count": counts}
        for loss, norm, (sums, counts) in zip((1.0, 2.0), (3.0, 5.0), bins, strict=True)
    ]
    assert metrics.average(window) == {"loss": 1.5, "grad_norm": 4.0, "loss_t/0.125": 2.0, "loss_t/0.625": 0.75}


def test_the_first_step_that_is_not_finite_is_found():
    good = {"loss": 1.0, "param_norm": 1.0, "grad_norm": 1.0}
    assert metrics.first_not_finite([good, good]) is None
    for name in good:
        assert metrics.first_not_finite([good, good | {name: np.inf}, good | {name: np.nan}]) == 1


def test_share_of_peak_is_the_flops_of_all_clips_over_the_peak_of_all_devices(monkeypatch):
    """Ten steps of 4 clips in 2 seconds, 1 GFLOP a clip, on two devices of 50 GFLOP/s: 20 of 100 GFLOP/s."""
    monkeypatch.setattr(metrics.flops, "chip_of", lambda device: types.SimpleNamespace(peak=50e9))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: 12.0)
    job = types.SimpleNamespace(settings=types.SimpleNamespace(global_batch_size=4), flops_per_sample=1e9)
    device = types.SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 5000})
    mesh = types.SimpleNamespace(devices=np.array([device, device]), local_devices=[device])
    clocks = metrics.Clocks(trained=100.0, waited=0.5, began=2.0, lined=10.0)
    found = metrics.throughput(job, 10, clocks, mesh)
    assert 1e6 < found.pop("host_memory") < 1e12
    assert found == {
        "seconds_per_step": 0.2,
        "clips_per_second": 20.0,
        "data_wait": 0.25,
        "seconds_trained": 110.0,
        "mfu": 0.2,
        "device_memory": 5000,
    }
    assert (clocks.waited, clocks.lined) == (0.0, 12.0)  # the next line starts here


def test_metrics_after_the_restored_step_are_dropped(tmp_path):
    for start, steps in ((0, (4, 8, 12)), (8, (12, 16))):
        job = metrics.Metrics(tmp_path, start)
        for step in steps:
            job.write(step, {"loss": 1 / (step + start)})
        job.close()
    lines = metrics.read(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(4, 1 / 4), (8, 1 / 8), (12, 1 / 20), (16, 1 / 24)]


@pytest.mark.skipif(HERE, reason="clu's writer, used where TensorFlow is installed, has no such event")
def test_tensorboard_purges_the_steps_that_are_repeated(tmp_path):
    """The session that starts at step 9 makes TensorBoard forget what it has of that step and later ones."""
    from tensorboardX.proto.event_pb2 import SessionLog

    for start in (0, 8):
        writer = metrics.tensorboard(tmp_path / str(start), start)
        writer.write_scalars(start + 4, {"loss": 0.5})
        until = time.monotonic() + 10
        while not scalars(tmp_path / str(start)) and time.monotonic() < until:  # a thread takes it up
            writer.flush()
        assert scalars(tmp_path / str(start)) == {"loss": [(start + 4, 0.5)]}  # before it is closed
        writer.close()
        read = events(tmp_path / str(start))
        sessions = [event.step for event in read if event.session_log.status == SessionLog.START]
        assert sessions == [start + 1]


def test_a_disk_that_is_full_at_a_new_start_keeps_the_lines(tmp_path, monkeypatch):
    job = metrics.Metrics(tmp_path, 0)
    job.write(4, {"loss": 1.0})
    job.close()
    before = (tmp_path / "metrics.jsonl").read_text()

    def full(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(type(job.path), "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        metrics.Metrics(tmp_path, 4)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert json.loads(before)["loss"] == 1.0


def test_where_there_is_no_terminal_lines_tell_speed_and_the_time_that_is_left(caplog, monkeypatch):
    now = iter([100.0, 105.0, 111.0, 112.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    console = metrics.ProgressReport(types.SimpleNamespace(name="expert 0", steps=4000), 0)
    said = {"loss": 1.25, "seconds_per_step": 0.5, "data_wait": 0.01}
    with caplog.at_level("INFO"), console:
        for step in (1000, 1010, 1022, 4000):
            console.show(step, said | {"mfu": 0.42})
    assert caplog.messages == [
        f"expert 0: step {step} of 4000, loss 1.2500, 500 ms a step, 42% of peak, 1.0% waiting for data, {left} left"
        for step, left in ((1000, "0:25:00"), (1022, "0:24:49"), (4000, "0:00:00"))
    ]
