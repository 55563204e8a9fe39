"""Clustering of many clips that take no disk to speak of: index, held-out split, k-means, cluster folders, and memory.

python -m tests.benchmarks.large --clips=10000000 --workdir=/tmp/large

Prepared clips are synthetic: tiny latents, features around a few centres, four clips of each video. Workers write them,
each its own shards, as `prepare --shard` does; then `cluster` runs as it is. Printed are seconds and the largest
resident memory of each stage; each stage is a process of its own.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import time
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.config.experiment import Experiment
from paris_jax.data import index, previews, records

PER_VIDEO = 4
CENTRES = 20
WORDS = ("river", "street", "forest", "kitchen", "football", "ocean", "piano", "desert", "crowd", "snow")


def experiment(clips: int, clusters: int, batch_size: int) -> Experiment:
    """The config of the run; `num_clips` is only written down."""
    clustering = {"num_clusters": clusters, "batch_size": batch_size, "restarts": 2}
    return Experiment.from_config({"data": {"num_clips": clips}, "clustering": clustering})


def make_shard(folder: Path, number: int, count: int, size: int, clips: int, width: int) -> dict[str, dict]:
    """Writes one shard with index and previews; returns sizes and hashes of its files."""
    rng = np.random.default_rng(number)
    begin, end = number * size, min(clips, (number + 1) * size)
    centres = np.random.default_rng(0).normal(size=(CENTRES, width)) * 3
    kinds = rng.integers(CENTRES, size=end - begin)
    features = (centres[kinds] + rng.normal(size=(end - begin, width))).astype(np.float32)
    name = records.shard_name("data", number, count)
    example = records.Record(
        "ID", np.zeros((1, 2, 2, 4), np.float16), np.zeros((2, 8), np.float16), np.zeros(8, np.float16),
        np.zeros(width, np.float32), "CAPTION", {},
    )  # fmt: skip
    encoded = records.encode_record(example)
    length = int.from_bytes(encoded[:8], "little")
    header, body = encoded[8 : 8 + length].rstrip(b" "), encoded[8 + length + 4 * width :]
    writer = ArrayRecordWriter(str(folder / name), "group_size:1")
    entries = index.Writer()
    for row, number_of_clip in enumerate(range(begin, end)):
        clip = f"video-{number_of_clip // PER_VIDEO:08d}.mp4#{number_of_clip % PER_VIDEO:04d}"
        caption = f"a {WORDS[kinds[row] % len(WORDS)]} seen from camera {number_of_clip % 7}"
        entries.add(features[row], index.Entry(clip, caption, {"kind": str(kinds[row])}))
        own = header.replace(b'\\"ID\\"', f'\\"{clip}\\"'.encode()).replace(b"CAPTION", caption.encode())
        own += b" " * (-len(own) % 8)
        writer.write(len(own).to_bytes(8, "little") + own + features[row].tobytes() + body)
    writer.close()
    entries.write(folder / index.file_of(name))
    video = np.full((4, 16, 16, 3), number % 256, np.uint8)
    kept = {index.digests([entry.id]).astype(">u8").tobytes(): video for entry in entries.entries[:16]}
    previews.write(folder / previews.file_of(name), previews.Previews(kept), [e.id for e in entries.entries])
    files = (name, index.file_of(name), previews.file_of(name))
    return {
        file: {"bytes": e.bytes, "sha256": e.sha256} for file in files if (e := manifest.describe_file(folder / file))
    }


def make_part(workdir: str, part: int, parts: int, clips: int, size: int, width: int) -> None:
    """The shards of one worker, and a list of their hashes."""
    folder, count = Path(workdir) / "data", -(-clips // size)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for number in range(part, count, parts):
        found |= make_shard(folder, number, count, size, clips, width)
    (Path(workdir) / f"part-{part}.json").write_text(json.dumps(found))


def finish(workdir: str, parts: int, clips: int, made_for: Experiment) -> None:
    """The manifest of all shards."""
    run = RunFolder(workdir)
    run.claim(made_for.to_dict(), made_for.hash)
    found = {}
    for part in range(parts):
        found |= json.loads((Path(workdir) / f"part-{part}.json").read_text())
        (Path(workdir) / f"part-{part}.json").unlink()
    content = {
        "codec": {"name": "pixels", "time": 2, "height": 2, "width": 2},
        "text": {"name": "words", "vocabulary": ["a"], "width": 8, "max_tokens": 8},
        "features": {"name": "synthetic"},
        "latent": {"shape": [1, 2, 2, 4], "mean": [0.0], "spread": [1.0]},
        "text_length": 2,
        "fps": 8.0,
        "source": {"name": "synthetic"},
    }
    known = {name: manifest.FileEntry(entry["bytes"], entry["sha256"]) for name, entry in found.items()}
    manifest.write(run.data, DataManifest, known, made_for.prepared_hash, known, clips=clips, **content)


def cluster(workdir: str, made_for: Experiment) -> None:
    from paris_jax.clustering.build import cluster

    cluster(made_for, RunFolder(workdir))


def measured(name: str, function, *arguments) -> dict[str, float]:
    """Runs a function in a fresh process; prints and returns its seconds and largest resident memory."""
    queue: multiprocessing.Queue = multiprocessing.get_context("spawn").Queue()
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(queue, function, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} failed")
    found = queue.get()
    print(f"{name}: {found['seconds']:.0f} s, {found['gib']:.2f} GiB", flush=True)
    return found


def _measure(queue, function, arguments) -> None:
    began = time.perf_counter()
    function(*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    queue.put({"seconds": time.perf_counter() - began, "gib": peak})


def run_all(workdir: str, clips: int, clusters: int, size: int, width: int, parts: int, batch_size: int) -> dict:
    """Writes, finishes and clusters; returns seconds and memory by stage."""
    made_for = experiment(clips, clusters, batch_size)
    found = {}
    for part in range(parts):
        arguments = (workdir, part, parts, clips, size, width)
        found[f"write {part}"] = measured(f"shards of worker {part} of {parts}", make_part, *arguments)
    found["finish"] = measured("manifest", finish, workdir, parts, clips, made_for)
    found["cluster"] = measured("cluster", cluster, workdir, made_for)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--shard_size", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=65_536)
    parser.add_argument("--workdir", default="/tmp/large")
    flags = parser.parse_args()
    shutil.rmtree(flags.workdir, ignore_errors=True)
    run_all(
        flags.workdir, flags.clips, flags.clusters, flags.shard_size, flags.features, flags.workers, flags.batch_size
    )
