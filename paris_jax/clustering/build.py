"""`paris-jax cluster`: splits off the held-out clips, then partitions the rest into K cluster folders."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import ClusterManifest, DataManifest, HeldoutManifest, Manifest, PartitionManifest
from paris_jax.clustering import clips as clips_
from paris_jax.clustering import clusters, folders, page
from paris_jax.clustering.clips import Clips
from paris_jax.clustering.clusters import Clustering, Method
from paris_jax.clustering.heldout import SPLITS, TRAIN
from paris_jax.clustering.report import Report, print_report
from paris_jax.clustering.rows import Rows
from paris_jax.config.experiment import Experiment
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
BLOCK = 8192  # clips that are assigned at once
Done = Callable[[int], None]


def cluster(experiment: Experiment, run: RunFolder, partition: epath.PathLike | None = None) -> None:
    """Partitions the clips of RUN/data into RUN/partition.

    Held-out clips are chosen by the ids of their videos before anything is learned, and put into the cluster they are
    nearest to. The partition's manifest is written last; an interrupted call goes on with the folders that are not
    complete.

    Args:
      experiment: config of the run.
      run: run folder to write to.
      partition: folder of a partition whose clusters the clips are assigned to; by default, clusters are learned.

    Raises:
      UserError: the clips are not prepared, or do not allow the clusters that the config asks for; a full disk.
    """
    with locks.only_writer(run.partition):
        _cluster(experiment, run, partition)


def _cluster(experiment: Experiment, run: RunFolder, partition: epath.PathLike | None) -> None:
    run.claim(experiment.to_dict(), experiment.hash)
    if manifest.exists(run.partition):
        found = manifest.read(run.partition, PartitionManifest)
        _check_config(run.partition, found, experiment)
        _check_data(run, found)
        logger.info("%d clips are clustered already: %s (%s)", sum(found.sizes), list(found.sizes), run.partition)
        return
    data = read_data(experiment, run)
    given, origin = _given(experiment, data, partition)
    with progress_bars() as bar, features_on_disk(experiment, run) as scratch:
        clips = clips_.read(experiment, run.data, dict(data.files), scratch, bar("reading clips", data.clips))
        if warning := clips_.check_splits(experiment, clips):
            logger.warning("%s", warning)
        check_enough(experiment, len(clips.of_split(TRAIN)))
        method = method_of(experiment)
        learned, labels = (given, None) if given else fit(clips, method, bar("k-means", method.rounds))
        labels = assign_others(learned, clips, labels)
        trained = np.bincount(labels[clips.splits == TRAIN], minlength=method.num_clusters)
        check_sizes(experiment, trained.tolist())
        report = describe(learned, clips, labels, bar("describing", data.clips))
        described = report.to_json()
        files = {
            folders.CENTROIDS: learned.to_bytes(),
            folders.REPORT: manifest.json_text(described).encode(),
            folders.PAGE: page.make(experiment.name, described, learned, clips, labels, run.data, data).encode(),
        }
        folders.write(experiment, run, data, clips, labels, described, files, bar("writing", data.clips), origin)
    print_report(described, Console())
    logger.info("%d clips are clustered: %s", len(clips.order), run.partition / folders.PAGE)


def read_data(experiment: Experiment, run: RunFolder) -> DataManifest:
    """The manifest of RUN/data; refuses one that is missing, or of another config."""
    run.check_shared_data()
    if not manifest.exists(run.data):
        raise UserError(f"{run.data} is not there yet; run 'paris-jax prepare --config=... --workdir={run}' first")
    data = manifest.read(run.data, DataManifest)
    if data.config_hash != experiment.prepared_hash:
        raise UserError(f"{run.data} was made with another config; use a new --workdir, or the config it was made with")
    return data


@contextlib.contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Callable[..., None]]]:
    """Yields a function that adds a bar and returns the function that advances it, by one or by a number."""
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as progress:

        def bar(name: str, total: int) -> Callable[..., None]:
            task = progress.add_task(name, total=total)
            return lambda steps=1: progress.advance(task, steps)

        yield bar


@contextlib.contextmanager
def features_on_disk(experiment: Experiment, run: RunFolder) -> Iterator[epath.Path | None]:
    """A local file for the features while k-means reads them in mini-batches; None where they stay in memory."""
    if not experiment.clustering.batch_size:
        yield None
        return
    scratch = clips_.scratch_file(run.partition)
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def method_of(experiment: Experiment) -> Method:
    settings = dataclasses.asdict(experiment.clustering)
    return Method(**{field.name: settings[field.name] for field in dataclasses.fields(Method)})


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


def fit(clips: Clips, method: Method, done: Callable[[], None]) -> tuple[Clustering, np.ndarray]:
    """Learns a partition from the clips that are trained on; returns it and their clusters, in canonical order."""
    return clusters.fit_rows(Rows.of(clips.features, clips.of_split(TRAIN)), method, done)


def assign_others(partition: Clustering, clips: Clips, trained: np.ndarray | None) -> np.ndarray:
    """The cluster (N,) int32 of every clip, by number; `trained` has those of the clips that are trained on."""
    labels = np.empty(len(clips.order), np.int32)
    numbers = clips.of_split(TRAIN)
    rest = np.arange(len(labels))
    if trained is not None:
        labels[numbers] = trained
        rest = np.flatnonzero(clips.splits != TRAIN)
    for begin in range(0, len(rest), BLOCK):
        some = rest[begin : begin + BLOCK]
        labels[some] = partition.assign(clips.features[some])
    return labels


def describe(partition: Clustering, clips: Clips, labels: np.ndarray, done: Done) -> Report:
    """Reads all clips once more and counts the report's numbers."""
    report = Report(partition)
    for block in clips.index.blocks():
        part = slice(block.start, block.start + len(block))
        entries = list(block.entries())
        ids, captions, attributes = ([getattr(e, name) for e in entries] for name in ("id", "caption", "attributes"))
        report.add(block.features, labels[part], clips.splits[part], ids, captions, attributes)
        done(len(block))
    return report


def _given(
    experiment: Experiment, data: DataManifest, partition: epath.PathLike | None
) -> tuple[Clustering | None, str]:
    """The clusters of another partition and the hash of its centroids; refuses one of other features or another K."""
    if partition is None:
        return None, ""
    folder = epath.Path(partition)
    found = manifest.read(folder, PartitionManifest)
    if found.features and found.features != data.features:
        raise UserError(
            f"--partition={folder} was made from other features ({found.features}) than these clips have "
            f"({data.features}); prepare them with the same config.features"
        )
    if found.clusters != experiment.clustering.num_clusters:
        raise UserError(
            f"--partition={folder} has {found.clusters} clusters; set config.clustering.num_clusters={found.clusters}"
        )
    entry = found.files[folders.CENTROIDS]
    manifest.check_file(folder / folders.CENTROIDS, entry, contents=True)
    return Clustering.from_bytes((folder / folders.CENTROIDS).read_bytes()), entry.sha256


def _check_config(folder: epath.Path, found: Manifest, experiment: Experiment) -> None:
    if found.config_hash != experiment.data_hash:
        raise UserError(f"{folder} was made with another config; use a new --workdir, or the config it was made with")


def _check_data(run: RunFolder, found: PartitionManifest) -> None:
    """Checks that a partition is of the clips that RUN/data holds now, and that its folders are whole."""
    parts: list[tuple[epath.Path, type[Manifest]]] = [(run.cluster(k), ClusterManifest) for k in range(found.clusters)]
    parts += [(run.partition / name, HeldoutManifest) for name in SPLITS[1:] if getattr(found, name)]
    for folder, schema in parts:
        manifest.read(folder, schema)
    if not found.data or not manifest.exists(run.data):  # a run folder may be used without its data
        return
    if manifest.contents_hash(manifest.read(run.data, DataManifest)) != found.data:
        raise UserError(
            f"{run.partition} was made from other clips than {run.data} holds now; to cluster again, delete "
            f"{run.partition} and the networks that were trained on it, or use a new --workdir"
        )
