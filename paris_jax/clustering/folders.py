"""Writes RUN/partition: the assignment, a folder for each held-out split and each cluster, and the manifest."""

import hashlib
import tempfile
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.safe_files import is_local
from paris_jax.artifacts.schemas import ClusterManifest, DataManifest, HeldoutManifest, Manifest, PartitionManifest
from paris_jax.clustering.clips import Clips
from paris_jax.clustering.heldout import SPLITS, TRAIN
from paris_jax.config.experiment import Experiment
from paris_jax.data import records

CENTROIDS, ASSIGNMENT, REPORT, PAGE = "centroids.safetensors", "assignment.jsonl", "report.json", "report.html"
SORTED = 200_000  # lines of the assignment that are sorted in memory at once


class Assigned(msgspec.Struct, frozen=True):
    """A line of the assignment."""

    id: str
    cluster: int
    split: str


def write_assignment(path: epath.Path, clips: Clips, labels: np.ndarray) -> None:
    """Writes a JSON line for each clip, in canonical order, without holding all of them in memory."""
    encoder = msgspec.json.Encoder()
    starts = np.zeros(len(labels) + 1, np.int64)
    with (
        manifest.partial_file(path, "--workdir") as partial,
        partial.open("wb") as out,
        _scratch(path.parent) as unsorted,
    ):
        for block in clips.index.blocks():
            for number, entry in enumerate(block.entries(), block.start):
                line = encoder.encode(Assigned(entry.id, int(labels[number]), SPLITS[clips.splits[number]])) + b"\n"
                starts[number + 1] = starts[number] + unsorted.write(line)
        for begin in range(0, len(labels), SORTED):
            numbers = clips.order[begin : begin + SORTED]
            lines: list[bytes] = [b""] * len(numbers)
            for place in np.argsort(numbers):  # in the order in which they lie
                number = int(numbers[place])
                unsorted.seek(int(starts[number]))
                lines[place] = unsorted.read(int(starts[number + 1] - starts[number]))
            out.write(b"".join(lines))


def _scratch(folder: epath.Path) -> Any:
    """A file without a name, on the disk of a local folder."""
    if is_local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=str(folder) if is_local(folder) else None)


def identity(clips: Clips, labels: np.ndarray) -> str:
    """Hash of which clip is in which cluster and split; the same in whichever order the clips are prepared."""
    digest = hashlib.sha256()
    for part in (clips.digests, labels.astype(np.int32), clips.splits):
        digest.update(np.ascontiguousarray(part[clips.order]).tobytes())
    return digest.hexdigest()


def write(
    experiment: Experiment,
    run: RunFolder,
    data: DataManifest,
    clips: Clips,
    labels: np.ndarray,
    described: dict[str, Any],
    files: dict[str, bytes],
    done: Callable[[int], None],
    assigned_from: str = "",
) -> None:
    """Writes the folders of RUN/partition and its manifest.

    A folder that an earlier, interrupted call completed is kept if it was made with this very assignment.

    Args:
      labels: (N,) int32, by number of the clip.
      described: contents of the report.
      files: small files by name.
      done: called with a number of clips.
      assigned_from: hash of the centroids of another partition that the clips were assigned with.
    """
    made_of = identity(clips, labels)
    write_assignment(run.partition / ASSIGNMENT, clips, labels)
    for name, content in files.items():
        manifest.write_atomically(run.partition / name, content)
    folders: list[tuple[epath.Path, type[Manifest], np.ndarray, dict[str, Any]]] = []
    for number, name in enumerate(SPLITS):
        chosen = clips.of_split(number)
        if number != TRAIN and len(chosen):
            content = {"split": name, "sizes": [c[name] for c in described["clusters"]]}
            folders.append((run.partition / name, HeldoutManifest, chosen, content))
    trained = clips.of_split(TRAIN)
    for k in range(experiment.clustering.num_clusters):
        folders.append((run.cluster(k), ClusterManifest, trained[labels[trained] == k], {"cluster": k}))
    for folder, schema, numbers, content in folders:
        if not (manifest.exists(folder) and getattr(manifest.read(folder, schema), "partition", "") == made_of):
            _write_folder(experiment, run, data, folder, schema, numbers, labels, content | {"partition": made_of})
        done(len(numbers))
    names = [f"{f.relative_to(run.partition)}/{manifest.FILE_NAME}" for f, *_ in folders]
    manifest.write(
        run.partition,
        PartitionManifest,
        [ASSIGNMENT, *files, *names],
        experiment.data_hash,
        clusters=experiment.clustering.num_clusters,
        sizes=[c["clips"] for c in described["clusters"]],
        validation=described["validation"],
        test=described["test"],
        data=manifest.contents_hash(data),
        features=data.features,
        assigned_from=assigned_from,
    )


def _write_folder(
    experiment: Experiment,
    run: RunFolder,
    data: DataManifest,
    folder: epath.Path,
    schema: type[Manifest],
    numbers: np.ndarray,
    labels: np.ndarray,
    content: dict[str, Any],
) -> None:
    if folder.exists():
        folder.rmtree()
    shards = records.copy_records(run.data, numbers, labels[numbers], folder)
    if null := records.read_null(run.data):
        shards += records.write_null(folder, **null)
    content |= records.data_contract(data) | {"clips": len(numbers)}
    manifest.write(folder, schema, shards, experiment.data_hash, **content)
