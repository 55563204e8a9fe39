"""Workers of a job array prepare the same bytes as one process, in any order, killed or not; runs share one result."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paris_jax import cli
from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import PartitionManifest
from paris_jax.clustering.build import cluster
from paris_jax.commands.table import COMMANDS
from paris_jax.config.experiment import Experiment
from paris_jax.data import shards
from paris_jax.data.parts import Part
from paris_jax.data.preparation import prepare, share
from paris_jax.errors import UserError

ROOT = Path(__file__).parents[2]


def experiment(**clustering) -> Experiment:
    made = {"data": {"num_clips": 90, "seed": 5, "heldout_fraction": 0.2}, "training": {"global_batch_size": 4}}
    return Experiment.from_config(made | {"clustering": clustering})


def contents(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(run.data).iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("whole"))
    prepare(experiment(), run, shard_size=10)
    return run


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_workers_in_any_order_write_the_bytes_of_one_and_the_last_finishes(whole, tmp_path, order):
    run = RunFolder(tmp_path)
    for index in order:
        assert not manifest.exists(run.data)
        prepare(experiment(), run, shard_size=10, part=Part(index, 4))
    assert contents(run) == contents(whole)
    prepare(experiment(), run, shard_size=10, part=Part(0, 4))  # does nothing
    assert contents(run) == contents(whole)


def test_more_workers_than_shards_and_another_number_of_workers_are_fine(whole, tmp_path):
    run = RunFolder(tmp_path)
    prepare(experiment(), run, shard_size=10, part=Part(40, 50))  # none of the nine shards
    prepare(experiment(), run, shard_size=10, part=Part(1, 2))
    for index in range(3):
        prepare(experiment(), run, shard_size=10, part=Part(index, 3))
    assert contents(run) == contents(whole)


def test_finish_names_the_shards_that_are_missing_and_prepares_none(whole, tmp_path):
    run = RunFolder(tmp_path)
    prepare(experiment(), run, shard_size=10, part=Part(0, 3))
    before = contents(run)
    with pytest.raises(UserError, match=r"6 of 9 shards are not there \(1, 2, 4, 5, 7, 8\); run .*--shard=I/N"):
        prepare(experiment(), run, shard_size=10, finish_only=True)
    assert contents(run) == before
    for index in (1, 2):
        prepare(experiment(), run, shard_size=10, part=Part(index, 3))
    assert contents(run) == contents(whole)


def test_a_worker_reads_each_of_its_shards_once_more_and_nobody_reads_them_all_again(tmp_path, monkeypatch):
    hashed = []
    original = manifest.hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda path: hashed.append(path.name) or original(path))
    run = RunFolder(tmp_path)
    for index in range(3):
        prepare(experiment(), run, shard_size=10, part=Part(index, 3))
    assert len(hashed) == len(set(hashed)) == 9 * 3  # records, index and previews of each shard


WORKER = """
import sys
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.data.parts import Part
from paris_jax.data.preparation import prepare
from tests.data.test_parts import experiment
prepare(experiment(), RunFolder(sys.argv[1]), shard_size=10, part=Part.parse(sys.argv[2]))
"""


def start(run: RunFolder, part: str, **environment: str) -> subprocess.Popen:
    path = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen([sys.executable, "-c", WORKER, str(run), part], env=path, stdout=subprocess.DEVNULL)


def test_processes_side_by_side_of_which_one_is_killed_end_in_the_same_bytes(whole, tmp_path):
    run = RunFolder(tmp_path)
    workers = [start(run, f"{index}/3") for index in range(3)]
    while not list(Path(run.data).glob("*.json")) and workers[1].poll() is None:
        time.sleep(0.01)
    workers[1].send_signal(signal.SIGKILL)
    assert [worker.wait() for worker in workers][::2] == [0, 0]
    again = start(run, "auto", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_MIN="1", SLURM_ARRAY_TASK_COUNT="3")
    assert again.wait() == 0
    assert contents(run) == contents(whole)


@pytest.mark.parametrize(
    ("text", "environment", "found"),
    [
        ("2/8", {"SLURM_ARRAY_TASK_ID": "5"}, Part(2, 8)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, Part(4, 8)),
        ("auto/8", {"JOB_COMPLETION_INDEX": "7"}, Part(7, 8)),
        ("auto", {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2"}, Part(1, 2)),
    ],
)
def test_flags_and_engines_name_the_worker(text, environment, found):
    assert Part.parse(text, environment) == found


@pytest.mark.parametrize(
    ("text", "environment", "said"),
    [
        ("8/8", {}, "worker 8 of 8: must be from 0 to 7"),
        ("3", {}, "must be I/N, such as 0/8, or auto"),
        ("-1/4", {}, "must be I/N"),
        ("a/b", {}, "must be I/N"),
        ("0/0", {}, "worker 0 of 0"),
        ("auto", {}, "none of SLURM_ARRAY_TASK_ID, .* is set"),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, "does not say how many workers there are; give auto/N"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX='x' must be a number"),
    ],
)
def test_other_parts_are_refused(text, environment, said):
    with pytest.raises(UserError, match=said):
        Part.parse(text, environment)


def test_partitions_of_several_k_share_one_data_folder(whole, tmp_path):
    before = contents(whole)
    runs = [RunFolder(tmp_path / str(k)) for k in (2, 3)]
    for k, run in zip((2, 3), runs, strict=True):
        made_for = dataclasses.replace(
            experiment(num_clusters=k), data=dataclasses.replace(experiment().data, heldout_fraction=0.1 * k)
        )
        share(made_for, run, whole.data)
        share(made_for, run, whole.data)  # again
        prepare(made_for, run)  # finds the clips
        cluster(made_for, run)
        assert not (run.path / "data").exists()
        found = manifest.read(run.partition, PartitionManifest)
        assert found.clusters == k and sum(found.sizes) + found.validation + found.test == 90
    assert contents(whole) == before


def test_shared_data_that_changed_or_are_gone_are_noticed(whole, tmp_path):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(whole.data, data)
    run = RunFolder(tmp_path / "run")
    share(experiment(), run, data)
    path = data / manifest.FILE_NAME
    manifest.write_json(path, manifest.read_json(path) | {"clips": 91})
    for command in (prepare, cluster):
        with pytest.raises(UserError, match=r"holds other data than when .* shared them"):
            command(experiment(), run)
    shutil.rmtree(data)
    with pytest.raises(UserError, match="are not there; bring them back"):
        cluster(experiment(), run)


def test_data_of_another_config_are_not_shared(whole, tmp_path):
    other = dataclasses.replace(experiment(), data=dataclasses.replace(experiment().data, num_clips=91))
    with pytest.raises(UserError, match="was made with another config"):
        share(other, RunFolder(tmp_path / "run"), whole.data)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="is there already; use a new --workdir"):
        share(experiment(), whole, whole.data)


def test_what_is_prepared_does_not_depend_on_clustering_held_out_videos_and_training():
    base = experiment()
    same = [
        experiment(num_clusters=5, restarts=2, seed=9),
        dataclasses.replace(base, data=dataclasses.replace(base.data, heldout_fraction=0.3, validation_share=0.5)),
        dataclasses.replace(base, training=dataclasses.replace(base.training, steps=7)),
    ]
    assert {e.prepared_hash for e in same} == {base.prepared_hash}
    assert len({e.hash for e in (base, *same)}) == 4
    changed = dataclasses.replace(base, data=dataclasses.replace(base.data, seed=6))
    assert changed.prepared_hash != base.prepared_hash


@pytest.mark.parametrize("flags", [["--shard=0/2", "--finish"], ["--finish", "--data=x"]])
def test_flags_that_exclude_each_other_are_refused(tmp_path, flags):
    name, call = cli.parse(["prepare", f"--workdir={tmp_path}", "--config=configs/shapes.py:tiny", *flags])
    with pytest.raises(UserError, match="exclude each other"):
        COMMANDS[name].run(call)


def test_markers_are_read_once_each(tmp_path, monkeypatch):
    """Not each by every later shard: at a million clips, that would be the work of a day."""
    run = RunFolder(tmp_path)
    reads = []
    original = shards.Shard.read_marker
    monkeypatch.setattr(shards.Shard, "read_marker", lambda job: reads.append(job.number) or original(job))
    prepare(experiment(), run, shard_size=2)
    assert len(reads) <= 3 * 45
