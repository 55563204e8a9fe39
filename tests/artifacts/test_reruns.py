"""Commands that are killed and run again, and two commands at once, in one run folder."""

import concurrent.futures
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import ClusterManifest
from paris_jax.clustering.build import cluster
from paris_jax.commands import train as train_command
from paris_jax.commands.import_weights import export_weights
from paris_jax.commands.sample import Output, sample
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import prepare
from paris_jax.errors import UserError
from tests.conftest import micro_config
from tests.torture import commands, contents, start_of, survive


@pytest.fixture(scope="session")
def whole(trained, tmp_path_factory):
    """A run folder with every part that a command starts from."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(trained.path, folder)
    export_weights(str(trained.export(Role("expert", 0))), "bfl", str(folder / "expert.safetensors"))
    return folder


@pytest.mark.parametrize("name", ["prepare", "cluster", "assemble", "publish", "export", "import"])
def test_a_command_killed_at_any_file_operation_ends_as_if_undisturbed(name, micro, whole, tmp_path, exhaustive):
    parts, command = commands(micro, whole)[name]
    every = 1 if exhaustive or name not in ("prepare", "cluster") else 5
    assert survive(start_of(whole, parts, tmp_path / "start"), tmp_path, command, every)


def perform(name: str, folder: str) -> str:
    """Runs a command in a process of its own; its refusal, or "" when it is done."""
    experiment, run = Experiment.from_config(micro_config()), RunFolder(folder)
    try:
        if name == "train":
            train_command.train(experiment, run, Role("expert", 0))
        elif name == "sample":
            sample(str(run.ensemble), ["a red ball"], Output(folder=f"{folder}/out"), num_inference_steps=1)
        else:
            commands(experiment, Path(folder))[name][1](Path(folder))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def two():
    """Runs two commands at once in two processes, and returns their refusals."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        list(pool.map(abs, range(2)))  # starts both

        def both(one: str, other: str, folder: Path) -> list[str]:
            calls = [pool.submit(perform, name, str(folder)) for name in (one, other)]
            return [call.result(timeout=120) for call in calls]

        yield both


EVERYTHING = ("config.json", "data", "partition", "experts", "router", "monolith", "ensemble")
ONCE = ("config.json", "data", "partition")


@pytest.mark.parametrize(
    "one, other, parts",
    [
        ("prepare", "prepare", ()),
        ("cluster", "cluster", ("config.json", "data")),
        ("prepare", "cluster", ()),
        ("train", "assemble", EVERYTHING),
        ("assemble", "assemble", EVERYTHING[:-1]),
        ("publish", "publish", EVERYTHING),
        ("export", "export", EVERYTHING),
        ("import", "import", ("expert.safetensors",)),
        pytest.param("train", "train", ONCE, marks=pytest.mark.exhaustive),
        pytest.param("evaluate", "evaluate", EVERYTHING, marks=pytest.mark.exhaustive),
        pytest.param("evaluate", "assemble", EVERYTHING, marks=pytest.mark.exhaustive),
        pytest.param("sample", "assemble", EVERYTHING, marks=pytest.mark.exhaustive),
    ],
)
def test_two_commands_at_once_leave_what_they_would_one_after_the_other(one, other, parts, two, whole, tmp_path):
    alone, together = (start_of(whole, parts, tmp_path / name) for name in ("alone", "together"))
    for name in (one, other):
        assert perform(name, str(alone)) == ""
    refusals = [said for said in two(one, other, together) if said]
    for said in refusals:  # the second one, or one that came before its turn
        assert "is being written by" in said or "is not there yet" in said, said
    for name in (one, other):  # again, in their order
        assert perform(name, str(together)) == ""
    assert contents(together) == contents(alone)


def test_samples_of_two_commands_get_names_of_their_own(two, whole, tmp_path):
    folder = start_of(whole, EVERYTHING, tmp_path / "run")
    assert two("sample", "sample", folder) == ["", ""]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "a-red-ball-seed0-2.mp4",
        "a-red-ball-seed0.mp4",
    ]


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    code = f"""
import sys, time
from paris_jax.artifacts import locks
sys.argv = ["paris-jax", "cluster"]
with locks.only_writer({str(tmp_path / "out")!r}):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "held\n"
    told = rf"out is being written by process {holder.pid} \(paris-jax cluster, since \d\d:\d\d:\d\d\); wait for it"
    with pytest.raises(UserError, match=told), locks.only_writer(tmp_path / "out"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".x.{'0' * 16}.partial").write_text("half")
    with locks.only_writer(tmp_path / "out"):
        assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_locked_is_left_to_the_command(tmp_path):
    (tmp_path / "file").write_text("")
    with locks.only_writer(tmp_path / "file" / "out"), locks.only_writer("gs://bucket/run/data"):
        pass


def test_a_waiting_command_follows(tmp_path):
    def write(wait: bool) -> float:
        with locks.only_writer(tmp_path / "out", wait=wait):
            time.sleep(0.3)
            return time.monotonic()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = [call.result() for call in [pool.submit(write, True) for _ in range(2)]]
    assert abs(ends[1] - ends[0]) > 0.29


def test_done_already_means_done_with_these_inputs(micro, run):
    """A partition of other clips, and a network of another partition, are refused by name."""
    before = manifest.read(run.cluster(0), ClusterManifest)
    cluster(micro, run)  # done already
    shutil.rmtree(run.data)
    prepare(micro, run)
    cluster(micro, run)  # the same clips, prepared again
    for folder in (run.partition, run.data):
        path = folder / manifest.FILE_NAME
        path.write_text(path.read_text())
    first = next(iter(manifest.read_json(run.data / manifest.FILE_NAME)["files"]))
    changed = manifest.read_json(run.data / manifest.FILE_NAME)
    changed["files"][first]["sha256"] = "0" * 64
    manifest.write_json(run.data / manifest.FILE_NAME, changed)
    with pytest.raises(UserError, match=r"partition was made from other clips than .*/data holds now"):
        cluster(micro, run)
    assert manifest.read(run.cluster(0), ClusterManifest) == before
    (run.cluster(1) / manifest.FILE_NAME).unlink()
    with pytest.raises(UserError, match=r"clusters/1/manifest.json"):
        cluster(micro, run)


def test_a_network_of_another_partition_is_not_done(micro, finished):
    path = finished.cluster(1) / manifest.FILE_NAME
    manifest.write_json(path, manifest.read_json(path) | {"partition": "0" * 64})
    with pytest.raises(UserError, match="was trained on another partition than"):
        train_command.train(micro, finished, Role("expert", 1))
