"""`paris-jax cluster`: splits off the held-out clips, then partitions the rest into K cluster folders."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import ClusterManifest, DataManifest, HeldoutManifest, Manifest, PartitionManifest
from paris_jax.clustering import clusters, report
from paris_jax.clustering.heldout import SPLITS, TEST, TRAIN, VALIDATION, split
from paris_jax.config import hashing
from paris_jax.config.experiment import Experiment
from paris_jax.data import records
from paris_jax.data.sources.clip import video_of
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
CENTROIDS, ASSIGNMENT, REPORT = "centroids.safetensors", "assignment.json", "report.json"


def cluster(experiment: Experiment, run: RunFolder) -> None:
    """Partitions the clips of RUN/data into RUN/partition.

    Held-out clips are chosen by their ids before anything is learned, and put into the cluster they are nearest to. The
    partition's manifest is written last; an interrupted call goes on with the folders that are not complete.

    Raises:
      UserError: the clips are not prepared, or do not allow the clusters that the config asks for; a full disk.
    """
    with locks.only_writer(run.partition):
        _cluster(experiment, run)


def _cluster(experiment: Experiment, run: RunFolder) -> None:
    run.claim(experiment.to_dict(), experiment.hash)
    if manifest.exists(run.partition):
        found = manifest.read(run.partition, PartitionManifest)
        _check_config(run.partition, found, experiment)
        _check_data(run, found)
        logger.info("%d clips are clustered already: %s (%s)", sum(found.sizes), list(found.sizes), run.partition)
        return
    if not manifest.exists(run.data):
        raise UserError(f"{run.data} is not there yet; run 'paris-jax prepare --config=... --workdir={run}' first")
    data = manifest.read(run.data, DataManifest)
    _check_config(run.data, data, experiment)

    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        clips = _read(run.data, _bar(progress, "reading clips", data.clips))
        splits = choose_splits(experiment, clips.ids)
        heldout = splits != TRAIN
        check_enough(experiment, int(np.sum(~heldout)))
        rounds = experiment.clustering.restarts * (2 if experiment.clustering.fine_clusters else 1)
        partition, labels = fit(experiment, clips, heldout, _bar(progress, "k-means", rounds))
        check_sizes(experiment, np.bincount(labels[~heldout], minlength=experiment.clustering.num_clusters).tolist())
        result = Result(partition, labels, splits, _describe(partition, clips, labels, splits))
        _write(experiment, run, data, clips, result, _bar(progress, "writing", data.clips))
    report.print_report(result.described, Console())
    logger.info("%d clips are clustered: %s", len(clips.ids), run.partition)


@dataclasses.dataclass(frozen=True)
class Clips:
    """Inputs of clustering for the N clips of a data folder, sorted by id: the result depends on no other order.

    numbers: of their records in the folder. features: (N, F) float32.
    """

    ids: list[str]
    numbers: list[int]
    features: np.ndarray
    captions: list[str]
    attributes: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of clustering: labels (N,) int32 and splits (N,) uint8 of all clips, and the report as JSON data."""

    partition: clusters.Clustering
    labels: np.ndarray
    splits: np.ndarray
    described: dict[str, Any]


def choose_splits(experiment: Experiment, ids: Sequence[str]) -> np.ndarray:
    """Returns (N,) uint8; refuses when a fraction is asked for and no clip is for the test."""
    fraction, share = experiment.data.heldout_fraction, experiment.data.validation_share
    splits = split(ids, fraction, share, experiment.data.seed)
    if fraction and not (splits == TEST).any():
        videos = len({video_of(clip) for clip in ids})
        raise UserError(
            f"config.data.heldout_fraction={fraction}: none of the {videos} videos ({len(ids)} clips) falls into the "
            "test split, so nothing could be evaluated; raise it, add videos, or set it to 0 to go without evaluation, "
            "with a new --workdir"
        )
    if fraction and share and not (splits == VALIDATION).any():
        logger.warning(
            "no video falls into the validation split (config.data.heldout_fraction=%g, validation_share=%g): "
            "'evaluate --vary' has nothing to tune settings on; raise one of them, or add videos",
            fraction,
            share,
        )
    return splits


def check_enough(experiment: Experiment, num_clips: int) -> None:
    """Raises UserError for more clusters than the clips can fill with one batch each."""
    settings, batch = experiment.clustering, experiment.training.global_batch_size
    allowed = num_clips // batch
    if settings.num_clusters > allowed:
        raise UserError(
            f"config.clustering.num_clusters={settings.num_clusters}: {num_clips} clips (without the held-out) allow "
            f"at most {allowed} clusters of config.training.global_batch_size={batch}; lower one of them, or prepare "
            "more clips, "
            "with a new --workdir"
        )
    if settings.fine_clusters > num_clips:
        raise UserError(
            f"config.clustering.fine_clusters={settings.fine_clusters}: must be at most {num_clips}, the number of "
            "clips without the held-out ones"
        )


def check_sizes(experiment: Experiment, sizes: Sequence[int]) -> None:
    """Refuses a cluster that cannot fill one batch: its expert would see fewer clips a step than the others."""
    batch, smallest = experiment.training.global_batch_size, int(np.argmin(sizes))
    if sizes[smallest] < batch:
        raise UserError(
            f"Cluster {smallest} has {sizes[smallest]} clips, fewer than config.training.global_batch_size={batch} "
            "(all sizes: "
            f"{', '.join(map(str, sizes))}); lower config.training.global_batch_size or config.clustering.num_clusters="
            f"{len(sizes)}, or prepare more clips, with a new --workdir"
        )


def fit(
    experiment: Experiment, clips: Clips, heldout: np.ndarray, done: Callable[..., None]
) -> tuple[clusters.Clustering, np.ndarray]:
    """Learns the partition from the clips that are not held out, and returns it with the cluster (N,) of every clip."""
    learned = np.flatnonzero(~heldout)
    settings = experiment.clustering
    partition, found = clusters.fit(
        [clips.ids[i] for i in learned],
        clips.features[learned],
        num_clusters=settings.num_clusters,
        fine_clusters=settings.fine_clusters,
        iterations=settings.iterations,
        restarts=settings.restarts,
        seed=settings.seed,
        done=done,
    )
    labels = np.empty(len(heldout), np.int32)
    labels[learned] = found
    if heldout.any():
        labels[heldout] = partition.assign(clips.features[heldout])
    return partition, labels


def _check_config(folder: epath.Path, found: Manifest, experiment: Experiment) -> None:
    if found.config_hash != experiment.data_hash:
        raise UserError(f"{folder} was made with another config; use a new --workdir, or the config it was made with")


def _check_data(run: RunFolder, found: PartitionManifest) -> None:
    """Checks that a partition is of the clips that RUN/data holds now, and that its folders are whole."""
    folders: list[tuple[epath.Path, type[Manifest]]] = [
        (run.cluster(k), ClusterManifest) for k in range(found.clusters)
    ]
    folders += [(run.partition / name, HeldoutManifest) for name in SPLITS[1:] if getattr(found, name)]
    for folder, schema in folders:
        manifest.read(folder, schema)
    if not found.data or not manifest.exists(run.data):  # a run folder may be used without its data
        return
    if manifest.contents_hash(manifest.read(run.data, DataManifest)) != found.data:
        raise UserError(
            f"{run.partition} was made from other clips than {run.data} holds now; to cluster again, delete "
            f"{run.partition} and the networks that were trained on it, or use a new --workdir"
        )


def _bar(progress: Progress, name: str, total: int) -> Callable[..., None]:
    """Returns a function that advances a new bar, by one or by a number."""
    task = progress.add_task(name, total=total)
    return lambda steps=1: progress.advance(task, steps)


def _read(folder: epath.Path, done: Callable[..., None]) -> Clips:
    """Reads ids, features and text of all records; refuses repeated ids and features that are not finite."""
    remedy = "delete it and prepare the data again"
    clips: dict[str, tuple[int, np.ndarray, str, dict[str, str]]] = {}
    for number, record in enumerate(records.read_records(folder)):
        if record.id in clips:
            raise UserError(f"{folder} holds two clips called {record.id!r}; {remedy}")
        if not np.isfinite(record.feature).all():
            raise UserError(f"{folder}: the feature of clip {record.id!r} is not finite; {remedy}")
        clips[record.id] = number, record.feature, record.caption, record.attributes
        done()
    ids = sorted(clips)
    numbers, features, captions, attributes = zip(*(clips[name] for name in ids), strict=True)
    return Clips(ids, list(numbers), np.stack(features).astype(np.float32), list(captions), list(attributes))


def _describe(partition: clusters.Clustering, clips: Clips, labels: np.ndarray, splits: np.ndarray) -> dict[str, Any]:
    learned = np.flatnonzero(splits == TRAIN)
    return report.report(
        partition,
        clips.features[learned],
        labels[learned],
        [clips.captions[i] for i in learned],
        [clips.attributes[i] for i in learned],
        {name: labels[splits == number] for number, name in enumerate(SPLITS) if number != TRAIN},
    )


def _write(
    experiment: Experiment,
    run: RunFolder,
    data: DataManifest,
    clips: Clips,
    result: Result,
    done: Callable[..., None],
) -> None:
    """Writes RUN/partition: the small files, a folder for each held-out split and each cluster, the manifest."""
    labels, splits, described = result.labels, result.splits, result.described
    assignment = {
        key: {clips.ids[i]: int(labels[i]) for i in np.flatnonzero(splits == number)}
        for number, key in enumerate(("clusters", "validation", "test"))
    }
    manifest.write_atomically(run.partition / CENTROIDS, result.partition.to_bytes())
    manifest.write_json(run.partition / ASSIGNMENT, assignment)
    manifest.write_json(run.partition / REPORT, described)
    # A folder that an earlier, interrupted call completed is kept only if it was made with this very assignment.
    identity = hashing.hash_text(hashing.canonical_json(assignment))

    folders = []
    for number, name in enumerate(SPLITS):
        if number != TRAIN and (splits == number).any():
            content = {"split": name, "sizes": [c[name] for c in described["clusters"]]}
            folders.append((run.partition / name, HeldoutManifest, np.flatnonzero(splits == number), content))
    for k in range(experiment.clustering.num_clusters):
        indices = np.flatnonzero((splits == TRAIN) & (labels == k))
        folders.append((run.cluster(k), ClusterManifest, indices, {"cluster": k}))
    null = records.read_null(run.data)
    for folder, schema, indices, content in folders:
        if not (manifest.exists(folder) and manifest.read(folder, schema).partition == identity):
            if folder.exists():
                folder.rmtree()
            shards = records.copy_records(
                run.data, [clips.numbers[i] for i in indices], labels[indices].tolist(), folder
            )
            if null:
                shards += records.write_null(folder, **null)
            content |= records.data_contract(data)
            content |= {"clips": len(indices), "partition": identity}
            manifest.write(folder, schema, shards, experiment.data_hash, **content)
        done(len(indices))

    manifest.write(
        run.partition,
        PartitionManifest,
        [CENTROIDS, ASSIGNMENT, REPORT, *(f"{f.relative_to(run.partition)}/{manifest.FILE_NAME}" for f, *_ in folders)],
        experiment.data_hash,
        clusters=experiment.clustering.num_clusters,
        sizes=[c["clips"] for c in described["clusters"]],
        validation=described["validation"],
        test=described["test"],
        data=manifest.contents_hash(data),
    )
