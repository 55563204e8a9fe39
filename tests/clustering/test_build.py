"""The cluster command: complete or absent results, the same after a kill, and one-sentence errors."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import ClusterManifest, DataManifest, HeldoutManifest, PartitionManifest
from paris_jax.clustering import clips, heldout
from paris_jax.clustering.build import cluster
from paris_jax.clustering.clusters import Clustering
from paris_jax.config import experiment as experiments
from paris_jax.config import sections
from paris_jax.config.training import TrainingSettings
from paris_jax.data import index, previews, records
from paris_jax.errors import UserError

WORLDS = ("flat", "textured", "digits")
SHARES = (0.5, 0.3, 0.2)


def experiment(batch: int = 8, fraction: float = 0.2, **partition) -> experiments.Experiment:
    settings = {"restarts": 2, **partition}
    return experiments.Experiment(
        data=sections.DataSettings(heldout_fraction=fraction),
        clustering=sections.ClusteringSettings(**settings),
        training=TrainingSettings(global_batch_size=batch),
    )


def prepared(path: Path, made_for: experiments.Experiment, num_clips: int = 120, order: int | None = None) -> RunFolder:
    """A run folder with clips of three worlds with separable features, in two shards."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(num_clips):
        world = rng.choice(3, p=SHARES)
        made.append(
            records.Record(
                id=f"clip-{i:04d}",
                latent=rng.normal(size=(2, 4, 4, 3)).astype(np.float16),
                tokens=rng.normal(size=(3, 8)).astype(np.float16),
                pooled=rng.normal(size=8).astype(np.float16),
                feature=(10 * np.eye(3, 6)[world] + rng.normal(size=6)).astype(np.float32),
                caption=f"a thing of the {WORLDS[world]} world",
                attributes={"world": WORLDS[world]},
            )
        )
    if order is not None:
        made = [made[i] for i in np.random.default_rng(order).permutation(num_clips)]
    run = RunFolder(path)
    run.claim(made_for.to_dict(), made_for.hash)
    half = num_clips // 2
    names = [records.shard_name("data", n, 2) for n in range(2)]
    for name, part in zip(names, (made[:half], made[half:]), strict=True):
        records.write_shard(run.data / name, part)
        entries = index.Writer()
        for clip in part:
            entries.add(clip.feature, index.Entry(clip.id, clip.caption, clip.attributes))
        entries.write(run.data / index.file_of(name))
        ids = [clip.id for clip in part]
        # Of every clip, so that they do not depend on the shard in which a clip lies.
        kept = {index.digests([c]).astype(">u8").tobytes(): video_of(c) for c in ids}
        previews.write(run.data / previews.file_of(name), previews.Previews(kept), ids)
    names += [beside(name) for name in names for beside in (index.file_of, previews.file_of)]
    contract = {
        "codec": {"name": "pixels", "time": 2, "height": 2, "width": 2},
        "text": {"name": "words", "vocabulary": ["a"], "width": 8, "max_tokens": 8},
        "features": {"name": "as prepared"},
        "latent": {"shape": [2, 4, 4, 3], "mean": [0.0], "spread": [1.0]},
        "text_length": 3,
        "fps": 8.0,
        "source": {"name": "as prepared"},
    }
    manifest.write(run.data, DataManifest, names, made_for.prepared_hash, clips=num_clips, **contract)
    return run


def video_of(clip: str) -> np.ndarray:
    return np.random.default_rng(int(clip[-4:])).integers(0, 255, (4, 8, 8, 3), np.uint8)


def files(folder) -> dict[str, bytes]:
    root = Path(folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory) -> RunFolder:
    run = prepared(tmp_path_factory.mktemp("run"), experiment())
    cluster(experiment(), run)
    return run


def test_every_clip_is_held_out_or_in_one_cluster(partitioned):
    lines = assigned(partitioned)
    assert len(lines) == len({line["id"] for line in lines}) == 120
    assignment = {split: {x["id"]: x["cluster"] for x in lines if x["split"] == split} for split in heldout.SPLITS}
    for k in range(3):
        stored = {r.id: r.cluster for r in records.read_records(partitioned.cluster(k))}
        assert stored == {name: k for name, c in assignment["train"].items() if c == k}
    for folder in (partitioned.validation, partitioned.test):
        assert {r.id: r.cluster for r in records.read_records(folder)} == assignment[folder.name]
        assert manifest.read(folder, HeldoutManifest).split == folder.name


def test_clusters_match_the_worlds_also_for_held_out_clips(partitioned):
    report = manifest.read_json(partitioned.partition / "report.json")
    assert report["purity"]["world"] == 1.0
    for name in ("validation", "test"):
        assert sum(c[name] for c in report["clusters"]) == report[name] > 0
    for folder in (partitioned.validation, partitioned.test, *(partitioned.cluster(k) for k in range(3))):
        for record in records.read_records(folder):
            assert record.attributes["world"] == WORLDS[record.cluster]


def test_cluster_folders_hold_everything_a_training_job_needs(partitioned):
    for k in range(3):
        described = manifest.read(partitioned.cluster(k), ClusterManifest, verify=True)
        assert described.cluster == k
        assert described.clips == len(records.read_records(partitioned.cluster(k)))
        prepared = manifest.read(partitioned.data, DataManifest)
        assert records.data_contract(described) == records.data_contract(prepared)
    partition = manifest.read(partitioned.partition, PartitionManifest, verify=True)
    assert sum(partition.sizes) + partition.validation + partition.test == 120
    # Held-out clips have another kind of manifest, so that no job trains on them by mistake.
    with pytest.raises(UserError, match="'heldout'"):
        manifest.read(partitioned.test, ClusterManifest)


def test_saved_centroids_reproduce_the_assignment(partitioned):
    partition = Clustering.from_bytes((partitioned.partition / "centroids.safetensors").read_bytes())
    for record in records.read_records([partitioned.cluster(0), partitioned.cluster(2), partitioned.test]):
        assert partition.assign(record.feature[None])[0] == record.cluster


def test_the_partition_does_not_depend_on_the_order_of_clips(partitioned, tmp_path):
    run = prepared(tmp_path, experiment(), order=1)
    cluster(experiment(), run)
    path = run.partition / manifest.FILE_NAME  # holds hashes of the shards in RUN/data, whose order differs
    manifest.write_json(
        path,
        manifest.read_json(path) | {"data": manifest.read_json(partitioned.partition / manifest.FILE_NAME)["data"]},
    )
    assert files(run.partition) == files(partitioned.partition)


def test_a_finished_partition_is_not_written_again(partitioned):
    before = {p: p.stat().st_mtime_ns for p in Path(partitioned.partition).rglob("*")}
    cluster(experiment(), partitioned)
    assert {p: p.stat().st_mtime_ns for p in Path(partitioned.partition).rglob("*")} == before


KILL = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_build as tests
from paris_jax.clustering.folders import manifest, records

def kill_at(module, name, count):
    original, calls = getattr(module, name), []
    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(module, name, wrapped)

kill_at({module}, {name!r}, {count})
tests.cluster(tests.experiment(), tests.RunFolder({run!r}))
"""


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        ("records", "with_cluster", 40),  # within a cluster's shard
        ("manifest", "write", 4),  # after a cluster's shards, before its manifest
        ("manifest", "write", 6),  # before the partition's manifest, the last file
    ],
)
def test_a_killed_run_leaves_no_partial_result_and_resumes(partitioned, tmp_path, module, name, count):
    run = prepared(tmp_path, experiment())
    script = KILL.format(tests=str(Path(__file__).parent), module=module, name=name, count=count, run=str(run))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()

    assert not manifest.exists(run.partition)
    for k in range(3):
        if manifest.exists(run.cluster(k)):
            manifest.read(run.cluster(k), ClusterManifest, verify=True)
    cluster(experiment(), run)
    assert files(run.partition) == files(partitioned.partition)


def test_a_full_disk_is_reported_and_leaves_no_finished_partition(partitioned, tmp_path):
    run = prepared(tmp_path, experiment())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))  # bytes; too few for the largest shard only
    try:
        with pytest.raises(UserError, match=r"Cannot write .*free some space"):
            cluster(experiment(), run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not manifest.exists(run.partition)
    cluster(experiment(), run)
    assert files(run.partition) == files(partitioned.partition)


def test_refuses_a_run_folder_without_prepared_clips(tmp_path):
    with pytest.raises(UserError, match=r"run 'paris-jax prepare .* first"):
        cluster(experiment(), RunFolder(tmp_path))


def test_refuses_another_config(partitioned):
    with pytest.raises(UserError, match=r"another config .*clustering.seed"):
        cluster(experiment(seed=1), partitioned)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"num_clusters": 13},
            r"num_clusters=13: \d+ clips .* at most 1[12] clusters of config.training.global_batch_size=8",
        ),
        (
            {"batch": 24},
            r"Cluster 2 has \d+ clips, fewer than config.training.global_batch_size=24 \(all sizes: .*lower",
        ),
        ({"fine_clusters": 119}, r"fine_clusters=119: must be at most \d+"),
        ({"fraction": 1e-9}, r"heldout_fraction=1e-09: none of the 120 videos \(120 clips\) .* raise it"),
    ],
)
def test_refuses_settings_that_the_number_of_clips_does_not_allow(tmp_path, settings, sentence):
    made_for = experiment(**settings)
    run = prepared(tmp_path, made_for)
    with pytest.raises(UserError, match=sentence):
        cluster(made_for, run)
    assert not run.partition.exists()


def test_refuses_a_nonfinite_feature_and_names_the_clip(tmp_path, monkeypatch):
    run = prepared(tmp_path, experiment())
    original = index.ClipIndex._read_uncached

    def broken(self, number):
        arrays = original(self, number)
        return arrays | {"features": np.where(np.arange(60)[:, None] == 7, np.float32(np.nan), arrays["features"])}

    monkeypatch.setattr(index.ClipIndex, "_read_uncached", broken)
    with pytest.raises(UserError, match="'clip-0007' is not finite"):
        cluster(experiment(), run)


def test_without_held_out_clips_no_held_out_folder_is_written(tmp_path):
    made_for = experiment(fraction=0.0, fine_clusters=9)
    run = prepared(tmp_path, made_for)
    cluster(made_for, run)
    assert not run.validation.exists() and not run.test.exists()
    assert sum(manifest.read(run.partition, PartitionManifest).sizes) == 120


def test_new_clips_get_clusters_of_another_partition_and_move_no_old_one(partitioned, tmp_path):
    run = prepared(tmp_path, experiment(), num_clips=200)
    cluster(experiment(), run, partitioned.partition)
    old, new = ({r["id"]: r for r in assigned(folder)} for folder in (partitioned, run))
    assert len(new) == 200 and all(new[clip] == row for clip, row in old.items())
    centroids = (partitioned.partition / "centroids.safetensors").read_bytes()
    assert (run.partition / "centroids.safetensors").read_bytes() == centroids
    found = manifest.read(run.partition, PartitionManifest)
    assert found.assigned_from == hashlib.sha256(centroids).hexdigest()
    for k in range(3):
        assert all(r.attributes["world"] == WORLDS[k] for r in records.read_records(run.cluster(k)))


def assigned(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (run.partition / "assignment.jsonl").read_text().splitlines()]


def test_a_partition_of_other_features_or_another_number_of_clusters_is_refused(partitioned, tmp_path):
    run = prepared(tmp_path / "other", experiment())
    path = run.data / manifest.FILE_NAME
    manifest.write_json(path, manifest.read_json(path) | {"features": {"name": "dinov2", "sha256": "a"}})
    with pytest.raises(UserError, match=r"was made from other features .*prepare them with the same"):
        cluster(experiment(), run, partitioned.partition)
    run = prepared(tmp_path / "two", experiment(num_clusters=2))
    with pytest.raises(UserError, match=r"has 3 clusters; set config\.clustering\.num_clusters=3"):
        cluster(experiment(num_clusters=2), run, partitioned.partition)
    assert not run.partition.exists()


def test_mini_batches_from_disk_give_the_exact_clusters_and_leave_no_files(partitioned, tmp_path):
    made_for = experiment(batch_size=32)
    run = prepared(tmp_path, made_for)
    cluster(made_for, run)
    assert assigned(run) == assigned(partitioned)  # the worlds are far apart
    assert not list(Path(tmp_path).rglob("*.partial"))


def test_features_beyond_memory_are_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(clips, "EXACT_BYTES", 2000)
    run = prepared(tmp_path, experiment())
    with pytest.raises(UserError, match=r"exact k-means would hold in memory; set config\.clustering\.batch_size"):
        cluster(experiment(), run)


def test_two_clips_of_one_name_are_refused(tmp_path):
    run = prepared(tmp_path, experiment())
    first, second = (run.data / index.file_of(records.shard_name("data", n, 2)) for n in range(2))
    second.write_bytes(first.read_bytes())
    path = run.data / manifest.FILE_NAME
    found = manifest.read_json(path)
    found["files"][second.name] = found["files"][first.name]
    manifest.write_json(path, found)
    with pytest.raises(UserError, match="holds two clips called 'clip-00"):
        cluster(experiment(), run)


def test_data_without_an_index_is_refused(tmp_path):
    run = prepared(tmp_path, experiment())
    path = run.data / manifest.FILE_NAME
    found = manifest.read_json(path)
    manifest.write_json(path, found | {"files": {n: e for n, e in found["files"].items() if "index" not in n}})
    with pytest.raises(UserError, match="has no index of its clips, because an earlier version made it"):
        cluster(experiment(), run)
