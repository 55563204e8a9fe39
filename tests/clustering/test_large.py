"""What `python -m tests.benchmarks.large` shows for ten million clips, with thousands."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import ClusterManifest, DataManifest, PartitionManifest
from paris_jax.clustering import build, clips, kmeans, minibatch
from paris_jax.clustering.heldout import TRAIN
from paris_jax.clustering.rows import Rows
from paris_jax.data import index, records
from paris_jax.data.sources.clip import video_of
from tests.benchmarks import large


def test_synthetic_clips_go_from_workers_into_cluster_folders(tmp_path):
    made_for = large.experiment(3000, 4, 512)
    for part in range(2):
        large.make_part(str(tmp_path), part, 2, 3000, 400, 16)
    large.finish(str(tmp_path), 2, 3000, made_for)
    run = RunFolder(tmp_path)
    manifest.read(run.data, DataManifest, verify=True)
    large.cluster(str(tmp_path), made_for)
    found = manifest.read(run.partition, PartitionManifest, verify=True)
    assert sum(found.sizes) + found.validation + found.test == 3000
    sides = {}
    for line in (run.partition / "assignment.jsonl").read_text().splitlines():
        row = json.loads(line)
        sides.setdefault(video_of(row["id"]), set()).add(row["split"])
    assert len(sides) == 750 and all(len(side) == 1 for side in sides.values())
    for k, size in enumerate(found.sizes):
        copied = records.read_records(run.cluster(k))
        assert len(copied) == size == manifest.read(run.cluster(k), ClusterManifest).clips
        assert {copied[0].cluster, copied[size - 1].cluster} == {k}


def write_index(folder: Path, count: int, width: int = 8) -> dict[str, None]:
    """An index of so many clips, in shards of a thousand, without records."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = {}
    for begin in range(0, count, 1000):
        entries = index.Writer()
        for number in range(begin, begin + 1000):
            name = f"some/folder/of/videos/{number // 3:09d}.mp4#{number % 3:04d}"
            entries.add(rng.normal(size=width), index.Entry(name, f"caption {number}", {}))
        names[f"data-{begin // 1000:05d}{index.ENDING}"] = None
        entries.write(folder / list(names)[-1])
    return names


def test_memory_grows_by_less_than_a_hundred_bytes_for_each_clip(tmp_path, monkeypatch):
    # Blocks and the sample that seeds centroids have one size for any number of clips: smaller ones show the rest.
    for module, name in ((minibatch, "SAMPLE"), (kmeans, "BLOCK_ROWS"), (build, "BLOCK")):
        monkeypatch.setattr(module, name, 1024)
    made_for = large.experiment(1, 3, 1024)
    method = dataclasses.replace(build.method_of(made_for), restarts=1, iterations=1)

    def peak(count: int) -> int:
        folder = tmp_path / f"{count}-{len(list(tmp_path.iterdir()))}"
        names = write_index(folder, count)
        tracemalloc.start()
        try:
            read = clips.read(made_for, folder, names, folder / "scratch", lambda n: None)
            learned, labels = build.fit(read, method, lambda: None)
            assert len(build.assign_others(learned, read, labels)) == count
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2000)  # compiles
    small, many = peak(2000), peak(12_000)
    assert (many - small) / 10_000 < 100


def test_features_on_disk_are_not_kept_in_memory(tmp_path):
    names = write_index(tmp_path / "index", 4000, width=512)
    read = clips.read(large.experiment(1, 3, 256), tmp_path / "index", names, tmp_path / "scratch", lambda n: None)
    rows = Rows.of(read.features, read.of_split(TRAIN))
    tracemalloc.start()
    for begin in range(0, len(rows), 100):
        rows[begin : begin + 100]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4000 * 512 * 4 / 8


@pytest.mark.parametrize("count", [1, 3])
def test_a_worker_writes_its_own_shards_only(tmp_path, count):
    for part in range(count):
        large.make_part(str(tmp_path), part, count, 1000, 300, 4)
    written = [json.loads((tmp_path / f"part-{part}.json").read_text()) for part in range(count)]
    assert sum(map(len, written)) == len(set().union(*written)) == 4 * 3
