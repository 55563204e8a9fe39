"""Commands that are killed and rerun, and concurrent commands in one run folder."""

import concurrent.futures
import itertools
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
from paris_jax.commands.sample import Output, sample
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import prepare
from paris_jax.errors import UserError
from tests.conftest import micro_config
from tests.torture import commands, contents, start_of, survive, write_inputs


@pytest.fixture(scope="session")
def whole(trained, tmp_path_factory):
    """A run folder with the inputs of every command."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(trained.path, folder)
    write_inputs(RunFolder(folder))
    return folder


@pytest.mark.parametrize("name", ["prepare", "cluster", "assemble", "publish", "export", "seal", "import"])
def test_a_command_killed_at_any_file_operation_and_rerun_gives_the_same_files(
    name, micro, whole, tmp_path, exhaustive
):
    parts, command = commands(micro, whole)[name]
    every = 1 if exhaustive or name not in ("prepare", "cluster") else 5
    assert survive(start_of(whole, parts, tmp_path / "start"), tmp_path, command, every)


def run_command(name: str, folder: str) -> str:
    """Runs a command; returns the message of its UserError, or "" on success."""
    experiment, run = Experiment.from_config(micro_config()), RunFolder(folder)
    try:
        if name == "train":
            train_command.train(experiment, run, Role("expert", 0))
        elif name == "sample into a folder":
            sample(str(run.ensemble), ["a red ball"], Output(folder=f"{folder}/out"), num_inference_steps=1)
        else:
            commands(experiment, Path(folder))[name][1](Path(folder))
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def run_both():
    """Runs two commands at the same time in two processes; returns their error messages."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        list(pool.map(abs, range(2)))  # starts both processes

        def run(one: str, other: str, folder: Path) -> list[str]:
            calls = [pool.submit(run_command, name, str(folder)) for name in (one, other)]
            return [call.result(timeout=120) for call in calls]

        yield run


# Writing commands in the order of the pipeline, and the part of a run folder that each makes.
MAKES = {
    "prepare": "data",
    "cluster": "partition",
    "train": "experts/0",
    "seal": "experts/0/export/manifest.sig",
    "export": "exported.safetensors",
    "import": "imported",
    "assemble": "ensemble",
    "publish": "published",
    "sample": "out.gif",
    "evaluate": "evaluation",
}
ALL_PARTS = (
    "config.json",
    "data",
    "partition",
    "experts",
    "router",
    "monolith",
    "ensemble",
    "expert.safetensors",
    "key.pem",
)
# What pairs that share files meet with first; the others are exhaustive.
USUAL = (
    ("prepare", "prepare"),
    ("cluster", "cluster"),
    ("prepare", "cluster"),
    ("train", "assemble"),
    ("assemble", "assemble"),
    ("publish", "publish"),
    ("export", "export"),
    ("import", "import"),
)
LOCKED = "is being written by"
# Of a command whose input, which the other one makes, was not there yet.
NO_INPUT = (
    "is not there yet",
    "is not trained: run",
    "does not exist: the",
    "There is no ",
    "has no held-out",
)
# A claim changes a network, whose ensemble is refused until it is assembled again.
UNRELATED = (("seal", "publish"), ("seal", "sample"), ("seal", "evaluate"))
PAIRS = tuple(pair for pair in itertools.combinations_with_replacement(MAKES, 2) if pair not in UNRELATED)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "one, other", [pytest.param(*pair, marks=() if pair in USUAL else pytest.mark.exhaustive) for pair in PAIRS]
)
def test_two_concurrent_commands_give_the_files_of_a_sequential_run(one, other, run_both, whole, tmp_path):
    """Both start without what they make, so that both write."""
    sequential, concurrent_run = (start_of(whole, ALL_PARTS, tmp_path / name) for name in ("alone", "together"))
    for folder, name in itertools.product((sequential, concurrent_run), (one, other)):
        remove(folder / MAKES[name])
    for name in (one, other):
        assert run_command(name, str(sequential)) == ""
    first, second = run_both(one, other, concurrent_run)
    assert not first or LOCKED in first
    assert not second or LOCKED in second or (one != other and any(reason in second for reason in NO_INPUT))
    for name in (one, other):  # rerun in order
        assert run_command(name, str(concurrent_run)) == ""
    assert contents(concurrent_run) == contents(sequential)


def test_concurrent_sample_commands_write_different_file_names(run_both, whole, tmp_path):
    folder = start_of(whole, ALL_PARTS, tmp_path / "run")
    assert run_both(*["sample into a folder"] * 2, folder) == ["", ""]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "a-red-ball-seed0-2.mp4",
        "a-red-ball-seed0.mp4",
    ]


def test_the_lock_of_a_killed_process_is_released(tmp_path):
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
    message = rf"out is being written by process {holder.pid} \(paris-jax cluster, since \d\d:\d\d:\d\d\); wait for it"
    with pytest.raises(UserError, match=message), locks.only_writer(tmp_path / "out"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f".x.{'0' * 16}.partial").write_text("half")
    with locks.only_writer(tmp_path / "out"):
        assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / f".[a].mp4.{'0' * 16}.partial").write_text("half")
    with locks.only_writer(tmp_path / "[a].mp4"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_cannot_be_locked_raises_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with locks.only_writer(tmp_path / "file" / "out"), locks.only_writer("gs://bucket/run/data"):
        pass


def test_a_waiting_writer_starts_after_the_first_one_ends(tmp_path):
    def write(wait: bool) -> float:
        with locks.only_writer(tmp_path / "out", wait=wait):
            time.sleep(0.3)
            return time.monotonic()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = [call.result() for call in [pool.submit(write, True) for _ in range(2)]]
    assert abs(ends[1] - ends[0]) > 0.29


def test_a_finished_partition_counts_only_for_the_clips_it_was_made_from(micro, run):
    """A partition made from other clips is refused by name."""
    before = manifest.read(run.cluster(0), ClusterManifest)
    cluster(micro, run)  # finished already
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


def test_a_network_trained_on_another_partition_is_refused(micro, finished):
    path = finished.cluster(1) / manifest.FILE_NAME
    manifest.write_json(path, manifest.read_json(path) | {"partition": "0" * 64})
    with pytest.raises(UserError, match="was trained on another partition than"):
        train_command.train(micro, finished, Role("expert", 1))
