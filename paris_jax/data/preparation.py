"""`paris-jax prepare`: encodes clips to cached latents, text embeddings and features, shard by shard."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import (
    CodecDescription,
    DataManifest,
    DroppedItem,
    FileEntry,
    ShardMarker,
    ShardStatistics,
    SourceItem,
    TextDescription,
)
from paris_jax.config.experiment import Experiment
from paris_jax.config.sections import CurationSettings
from paris_jax.data import curation, dropped, index, previews, provenance, records, scenes
from paris_jax.data.decoders import LIMITED, Decoders, Limits
from paris_jax.data.footage import DECODING_VERSION
from paris_jax.data.parts import Part
from paris_jax.data.records import Record
from paris_jax.data.sources.clip import OFF, Clip, Dropped, Video, video_of
from paris_jax.data.sources.source import Source
from paris_jax.data.sources.table import source
from paris_jax.encoders import codecs, features, text
from paris_jax.encoders.published import EncoderStore
from paris_jax.encoders.words import TextEncoding, split, words_of
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
STEM = "data"
PUBLISHED = {"hunyuan", "t5+clip", "dinov2"}  # encoders that run on an accelerator if there is one
BATCH = 16  # clips per encoder batch; another batch size may round differently
UNIT = {"mean": [0.0], "spread": [1.0]}  # statistics of latents that already have the scale of their published networks


def prepare(
    experiment: Experiment,
    run: RunFolder,
    processes: int = 1,
    shard_size: int | None = None,
    clips: Source | None = None,
    decoders: int | None = None,
    strict: bool = False,
    part: Part | None = None,
    finish_only: bool = False,
) -> None:
    """Encodes every clip of the experiment into RUN/data; resumes at the first missing shard.

    The files are identical, byte for byte, regardless of interruptions and of the number of processes and workers. A
    clip or file that cannot be used is dropped, and listed with its reason in dropped.jsonl.

    Args:
      experiment: config of the clips and encoders.
      run: run folder to write to.
      processes: number of shards encoded in parallel.
      shard_size: number of the source's items per shard.
      clips: source of the clips, instead of the one that `data.source` names.
      decoders: number of decoding processes; by default one for each CPU core.
      strict: refuse at the first clip or file that cannot be used.
      part: prepare the shards of one of several workers, which may run on any machines and in any order; the last one
        writes the manifest.
      finish_only: prepare nothing, and write the manifest of what all workers prepared.

    Raises:
      UserError: an encoder cannot run, too many clips cannot be used, the disk is full, or the run folder belongs to
        another config.
    """
    decoders = decoders or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    decoders = max(1, decoders // processes)
    run.check_shared_data()
    # A worker of several leaves the partial files of the others alone.
    lock = run.path / "data" if part is None else run.path / f"data-{part.index}-of-{part.count}"
    with locks.only_writer(lock):
        preparation = Preparation(experiment, run, shard_size, clips, strict)
        if not preparation.is_finished():
            if not finish_only:
                preparation.write_shards(processes, decoders, part)
            preparation.finish_all(wait_for=part is None)


class Preparation:
    """All shards of a data folder, those to write, and their manifest.

    Attributes:
      store: encoders that are loaded.
      clips, jobs: the source and its shards; listed when they are first needed.
    """

    def __init__(
        self, experiment: Experiment, run: RunFolder, shard_size: int | None, clips: Source | None, strict: bool
    ):
        self.experiment, self.run, self.strict = experiment, run, strict
        self.store = EncoderStore()
        self.encoders = weights_of(**describe_encoders(experiment, (), self.store))
        self._given, self._shard_size = clips, shard_size

    def is_finished(self) -> bool:
        """Whether the data are complete, and of what the source and the encoders are now.

        What has changed is said, and prepared again.

        Raises:
          UserError: they are of another config, or networks were trained on what has changed.
        """
        if not manifest.exists(self.run.data):
            return False
        self.run.claim(self.experiment.to_dict(), self.experiment.hash)
        existing = check_config(self.experiment, self.run.data)
        changes = None if self.run.shared_data.exists() else self._changes()
        if changes is None:
            check_prepared(self.experiment, self.run.data, self.encoders)
        if changes:
            self._check_untrained(changes)
            logger.warning("%s: %s; only this is prepared again", self.run.data, changes)
            for level in ("", "*/", "clusters/*/"):  # of other clips: `cluster` makes them again
                for path in self.run.partition.glob(level + manifest.FILE_NAME):
                    path.unlink()
            (self.run.data / manifest.FILE_NAME).unlink()
            return False
        logger.info("%d clips are prepared already (%s)", existing.clips, self.run.data)
        return True

    def _changes(self) -> provenance.Changes | None:
        """What has changed since the shards were written; None where that cannot be known."""
        if not any(self.run.data.glob(f"*{records.ENDING}.json")):  # an earlier version kept no provenance
            return None
        try:
            jobs = self.jobs
        except UserError as error:
            logger.warning("what %s was made of is not here, so changes are not noticed: %s", self.run.data, error)
            return None
        paths = sorted(self.run.data.glob(f"*{records.ENDING}.json"))
        changes, known = provenance.Changes(), 0
        if {path.name for path in paths} <= {job.marker.name for job in jobs}:
            for job in jobs[: len(paths)]:
                known += len(job.read_marker().items)
                changes.merge(job.renew_items())
        else:  # another number of shards
            markers = [manifest.read_json(path, ShardMarker) for path in paths]
            items = tuple(item for marker in markers for item in marker.items)
            ends = [marker.origin.get("indices", (0, 0))[-1] for marker in markers]
            then = {**markers[0].origin, "indices": [0, max(ends)]}
            whole, known = msgspec.structs.replace(markers[0], origin=then, items=items), len(items)
            now = {**jobs[0].origin, "indices": [0, len(self.clips)]}
            changes, _ = provenance.compare(whole, now, self.clips, range(len(self.clips)))
        if known and len(changes.gone) > known / 2:
            raise UserError(
                f"{self.run.data}: {changes}; more than half of the source is gone, as if its disk was not there; "
                "bring it back, or prepare what is left with a new --workdir"
            )
        return changes

    def _check_untrained(self, changes: provenance.Changes) -> None:
        trained = provenance.trained_networks(self.run)
        if trained:
            raise UserError(
                f"{self.run.data} is not what its source is now: {changes}; {', '.join(trained)} learned from the old "
                f"clips; use a new --workdir, or delete {', '.join(trained)} and run the same command again"
            )

    @functools.cached_property
    def clips(self) -> Source:
        if self.experiment.curation.scene_cuts:
            scenes.check_installed()
        clips = self._given if self._given is not None else source(self.experiment.data)
        if not len(clips):
            if clips.dropped:
                dropped.check_share(0, clips.dropped, self.experiment.data.max_dropped_share)
            raise UserError("The data source has no clips; raise data.num_clips or add videos to data.path")
        if self.strict and (faults := [item for item in clips.dropped if item.stage != "curate"]):
            raise _strictly(faults[0])
        self.run.claim(self.experiment.to_dict(), self.experiment.hash)  # only after the source has listed its items
        return clips

    @functools.cached_property
    def jobs(self) -> list["Shard"]:
        size = self._shard_size or self.clips.items_per_shard
        count, folder = -(-len(self.clips) // size), str(self.run.data)
        rest = (count, size, self.encoders, self.strict)
        return [Shard(self.experiment, self.clips, folder, number, *rest) for number in range(count)]

    def write_shards(self, processes: int, decoders: int, part: Part | None) -> None:
        """Writes the shards of one worker that are not there yet; by default all."""
        names = self.experiment.codec.name, self.experiment.text.name, self.experiment.features.name
        if processes > 1 and PUBLISHED.intersection(names) and jax.default_backend() != "cpu":
            raise UserError(
                f"--num_workers={processes}: these encoders run on the accelerators, which only one process can use; "
                "use 1"
            )
        own = self.jobs[part.index :: part.count] if part else self.jobs
        missing = [job for job in own if not job.is_done()]
        for job in missing if part else ():
            for path in (*job.files, job.marker):
                locks.delete_partial_files(path)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), Speed(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            total = sum(len(job.indices) for job in own)
            task = progress.add_task("items" if self.clips.isolated else "clips", total=total)
            progress.advance(task, total - sum(len(job.indices) for job in missing))
            if processes == 1:
                beyond = Beyond(self.jobs)
                with _decoders(self.experiment, self.clips, decoders) as pool:
                    for job in missing:
                        if beyond(job):
                            break
                        renew(job, lambda: progress.advance(task), self.store, pool)
            else:
                # Spawned, because a forked process would inherit locks of JAX's threads.
                context = multiprocessing.get_context("spawn")
                with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
                    started = [pool.submit(_write, job, decoders) for job in missing]
                    for done in concurrent.futures.as_completed(started):
                        progress.advance(task, done.result())

    def finish_all(self, wait_for: bool) -> None:
        """Writes the manifest once every shard is there.

        Args:
          wait_for: whether missing shards are an error; otherwise, other workers prepare them.
        """
        missing = self._missing()
        if missing and not wait_for:
            if not manifest.exists(self.run.data):
                text = "%d of %d shards are not there yet; the worker that writes the last of them finishes the data"
                logger.info(text, len(missing), len(self.jobs))
            return
        if missing:
            numbers = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
            raise UserError(
                f"{self.run.data}: {len(missing)} of {len(self.jobs)} shards are not there ({numbers}); run "
                "'paris-jax prepare --shard=I/N' for the workers that did not end, with the same N"
            )
        with contextlib.nullcontext() if wait_for else locks.only_writer(self.run.data, wait=True):
            if not manifest.exists(self.run.data):  # or another worker was the last, too
                finish(self.experiment, self.run, self.clips, self.jobs, self.store)
        self.store.drop()

    def _missing(self) -> list[int]:
        """Numbers of the shards that are not done, of those that the data set needs."""
        if any(not job.marker.exists() for job in self.jobs if job.most is None):
            return [job.number for job in self.jobs if not job.marker.exists()]
        beyond = Beyond(self.jobs)
        return [job.number for job in self.jobs if not beyond(job) and not job.is_done()]


class Beyond:
    """Tells whether the shards before one hold as many clips as the data set may have; reads each marker once."""

    def __init__(self, jobs: Sequence["Shard"]):
        self.jobs, self.read, self.clips = jobs, 0, 0

    def __call__(self, job: "Shard") -> bool:
        if job.most is None or not job.clips.isolated:
            return False
        while self.read < job.number and self.clips < job.most and self.jobs[self.read].marker.exists():
            self.clips += self.jobs[self.read].read_marker().tally.clips
            self.read += 1
        return self.clips >= job.most


def check_config(experiment: Experiment, folder: epath.Path) -> DataManifest:
    """The manifest of prepared clips; refuses those of another config."""
    found = manifest.read(folder, DataManifest)
    if found.config_hash != experiment.prepared_hash:
        raise UserError(f"{folder} was made with another config; use a new --workdir, or delete {folder}")
    return found


def check_prepared(experiment: Experiment, folder: epath.Path, encoders: Mapping[str, Any]) -> DataManifest:
    """The manifest of prepared clips; refuses those of another config, or of other weights of the encoders."""
    found = check_config(experiment, folder)
    if weights_of(found.codec, found.text, found.features) != encoders:
        raise UserError(f"{folder} was made with other weights of its encoders; use those weights, or a new --workdir")
    return found


def share(experiment: Experiment, run: RunFolder, folder: epath.PathLike) -> None:
    """Takes the prepared clips of another run folder, FOLDER = OTHER/data, for this one.

    Raises:
      UserError: they are not complete, or of another config; this run folder has data of its own, or others.
    """
    folder = epath.Path(folder)
    if (run.path / "data").exists():
        raise UserError(f"--data={folder}: {run.path / 'data'} is there already; use a new --workdir")
    encoders = weights_of(**describe_encoders(experiment, (), EncoderStore()))
    found = check_prepared(experiment, folder, encoders)
    if run.shared_data.exists():
        hashes = [manifest.hash_file(path) for f in (run.data, folder) if (path := f / manifest.FILE_NAME).exists()]
        if len(hashes) < 2 or hashes[0] != hashes[1]:
            raise UserError(f"--data={folder}: {run.path} shares {run.data} already; use a new --workdir")
    run.claim(experiment.to_dict(), experiment.hash)
    run.share_data(folder)
    logger.info("%d clips of %s are the data of %s", found.clips, folder, run.path)


def _decoders(experiment: Experiment, clips: Source, count: int) -> Any:
    """The decoding processes for a source; None for clips that are computed."""
    if not clips.isolated:
        return contextlib.nullcontext()
    limits = Limits(experiment.data.decode_seconds, experiment.data.decode_memory_mb)
    return Decoders(count, limits, experiment.curation)


def _strictly(item: Dropped) -> UserError:
    return UserError(f"{item} (stage {item.stage}); mend or remove it, or run without --strict")


class Speed(ProgressColumn):
    """Clips or items per second over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} {task.description}/s" if task.speed else "", style="progress.data.speed")


def describe_encoders(
    experiment: Experiment, vocabulary: Iterable[str], store: EncoderStore | None = None
) -> dict[str, Any]:
    """Returns the manifest entries of codec, text encoder and features; raises UserError if one cannot run here."""
    return {
        "codec": codecs.codec(**dataclasses.asdict(experiment.codec), store=store).describe(),
        "text": text_encoder(experiment, vocabulary, store).describe(),
        "features": features.features(**dataclasses.asdict(experiment.features), store=store).describe(),
    }


def weights_of(codec: CodecDescription, text: TextDescription, features: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hashes of the encoders' weights from their manifest entries; None for an encoder without weights."""
    hashes = getattr(codec, "sha256", None), getattr(text, "weights", None), features.get("sha256")
    return dict(zip(("codec", "text", "features"), hashes, strict=True))


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard to encode, independent of the others; its marker file, written last, shows that it is complete."""

    experiment: Experiment
    clips: Source
    folder: str
    number: int
    count: int
    size: int
    encoders: dict[str, Any]  # hashes of their weights
    strict: bool = False

    @property
    def path(self) -> epath.Path:
        return epath.Path(self.folder) / records.shard_name(STEM, self.number, self.count)

    @property
    def index(self) -> epath.Path:
        return self.path.parent / index.file_of(self.path.name)

    @property
    def previews(self) -> epath.Path:
        return self.path.parent / previews.file_of(self.path.name)

    @property
    def files(self) -> tuple[epath.Path, ...]:
        return self.path, self.index, self.previews

    @property
    def marker(self) -> epath.Path:
        return self.path.parent / f"{self.path.name}.json"

    @property
    def indices(self) -> range:
        return range(self.number * self.size, min(len(self.clips), (self.number + 1) * self.size))

    @functools.cached_property
    def origin(self) -> dict[str, Any]:
        """Provenance of the shard, beside that of its items."""
        config = {"config_hash": self.experiment.prepared_hash, "encoders": self.encoders}
        source = {"source": self.clips.identity(), "indices": [self.indices.start, self.indices.stop]}
        return {**config, **source, "decoding": DECODING_VERSION if self.clips.isolated else 0}

    @property
    def limits(self) -> tuple[float, int]:
        return self.experiment.data.decode_seconds, self.experiment.data.decode_memory_mb

    @property
    def most(self) -> int | None:
        """The largest number of clips of the whole data set; None for all."""
        return self.experiment.data.num_clips or None

    def read_marker(self) -> ShardMarker:
        return manifest.read_json(self.marker, ShardMarker)

    def is_done(self) -> bool:
        if not (self.path.exists() and self.marker.exists()):
            return False
        return not self.renew_items() and self.read_marker().limits in (None, self.limits)

    def renew_items(self) -> provenance.Changes:
        """What has changed since the shard was written; notes new times of files whose contents are the same."""
        marker = self.read_marker()
        changes, items = provenance.compare(marker, self.origin, self.clips, self.indices)
        if changes.touched and not changes:
            manifest.write_json(self.marker, msgspec.to_builtins(msgspec.structs.replace(marker, items=items)))
        return changes


class Tally:
    """Statistics of all clips for the manifest, accumulated clip by clip."""

    def __init__(self):
        self.clips = 0
        self.text_length = 0
        self.words: set[str] = set()
        self.numbers = 0  # of latent values per channel
        self.sum = np.zeros(())  # per channel, (C,) float64
        self.squares = np.zeros(())
        self.shape: tuple[int, ...] = ()

    def add(self, record: Record) -> None:
        latent = record.latent.astype(np.float64).reshape(-1, record.latent.shape[-1])
        self.clips += 1
        self.text_length = max(self.text_length, len(record.tokens))
        self.words.update(split(record.caption))
        self.numbers += len(latent)
        self.sum = self.sum + latent.sum(0)
        self.squares = self.squares + (latent**2).sum(0)
        self.shape = record.latent.shape

    def to_json(self) -> dict[str, Any]:
        sums = {"sum": self.sum.tolist(), "squares": self.squares.tolist()}
        return vars(self) | sums | {"words": sorted(self.words), "shape": list(self.shape)}

    def merge(self, other: ShardStatistics) -> None:
        """Adds the tally of one shard, read from the output of `to_json`."""
        self.clips += other.clips
        self.text_length = max(self.text_length, other.text_length)
        self.words.update(other.words)
        self.numbers += other.numbers
        self.sum = self.sum + np.asarray(other.sum)
        self.squares = self.squares + np.asarray(other.squares)
        self.shape = other.shape

    def latent(self, shared: bool) -> dict[str, Any]:
        """Returns the latents' shape, and their mean and standard deviation per channel (one of all if `shared`)."""
        mean, square = self.sum / self.numbers, self.squares / self.numbers
        if shared:
            mean, square = mean.mean(keepdims=True), square.mean(keepdims=True)
        spread = np.sqrt(np.maximum(square - mean**2, 1e-8))
        # Rounded to six digits, so that machines that sum in another order get the same numbers.
        digits = {"mean": mean, "spread": spread}
        return {"shape": list(self.shape)} | {name: [round(float(x), 6) for x in v] for name, v in digits.items()}


def _write(job: Shard, decoders: int) -> int:
    with _decoders(job.experiment, job.clips, decoders) as pool:
        return renew(job, pool=pool)


def renew(
    job: Shard,
    advance: Callable[[], object] = lambda: None,
    store: EncoderStore | None = None,
    pool: Decoders | None = None,
) -> int:
    """Writes a shard: with its old latents where only captions or the text encoder changed; returns its items."""
    is_text_only = job.path.exists() and job.marker.exists() and job.renew_items().is_text_only
    if is_text_only and write_texts(job, store):
        for _ in job.indices:
            advance()
        return len(job.indices)
    return write(job, advance, store, pool)


def write_texts(job: Shard, store: EncoderStore | None = None) -> bool:
    """Writes a shard anew with its old latents and the captions of now; False where that takes decoding, too."""
    marker, experiment = job.read_marker(), job.experiment
    items = provenance.read_items(job.clips, job.indices)
    then = {item.id: item.caption for item in marker.items}
    changed = {item.id: number for item, number in zip(items, job.indices) if item.caption != then[item.id]}
    captions = {name: job.clips.caption(number) for name, number in changed.items()}
    lost = {video_of(item.id) for item in marker.dropped}
    if not all(captions.values()) or lost & changed.keys() or (changed and experiment.curation != OFF):
        return False
    if any(item.stage == "caption" for item in marker.dropped):
        return False
    nothing = np.zeros((0, 1, 1, 3), np.uint8)
    clips = [
        Clip(old.id, nothing, 1.0, captions.get(video_of(old.id)) or old.caption, old.attributes)
        for old in records.read_shard(job.path)
    ]
    refused = list[Dropped]()
    found = list(_captioned(experiment, clips, store or EncoderStore(), refused.append))
    if refused:
        return False
    tally, entries = Tally(), index.Writer()

    def renewed() -> Iterator[Record]:
        for record, (clip, (tokens, pooled)) in zip(records.read_shard(job.path), found, strict=True):
            record = dataclasses.replace(record, caption=clip.caption, tokens=tokens, pooled=pooled)
            tally.add(record)
            entries.add(record.feature, index.Entry(record.id, record.caption, record.attributes))
            yield record

    records.write_shard(job.path, renewed())
    entries.write(job.index)
    content = {"tally": tally.to_json(), "items": msgspec.to_builtins(items)}
    write_marker(job, {**msgspec.to_builtins(marker), "origin": job.origin, **content})
    return True


def write(
    job: Shard,
    advance: Callable[[], object] = lambda: None,
    store: EncoderStore | None = None,
    pool: Decoders | None = None,
) -> int:
    """Decodes, encodes and writes one shard, then its marker; returns its number of items."""
    tally, lost, entries = Tally(), list[Dropped](), index.Writer()
    shown, settings = previews.Previews(), job.experiment.curation
    hashes: dict[str, str] = {}
    items = list[SourceItem]()

    def drop(item: Dropped) -> None:
        if job.strict and item.stage != "curate":
            raise _strictly(item)
        lost.append(item)

    def videos() -> Iterator[Video | Dropped]:
        for number in job.indices:
            items.extend(provenance.read_items(job.clips, [number]))
            yield from job.clips.videos(number)
            advance()

    def clips() -> Iterator[Clip]:
        for item in pool.clips(videos()) if pool is not None else decode(videos(), settings):
            if isinstance(item, Dropped):
                drop(item)
                continue
            curation.check_flip(item, settings)
            if settings.near_duplicate_bits >= 0:
                hashes[item.id] = curation.perceptual_hash(item.video).hex()
            yield item

    def counted() -> Iterator[Record]:
        for record in encode(job.experiment, shown.watch(clips()), store, drop):
            tally.add(record)
            entries.add(record.feature, index.Entry(record.id, record.caption, record.attributes))
            yield record
            if tally.clips == job.most:
                return

    records.write_shard(job.path, counted())
    entries.write(job.index)
    previews.write(job.previews, shown, [entry.id for entry in entries.entries])
    limits = job.limits if any(item.reason in LIMITED for item in lost) else None
    content: dict[str, Any] = {"tally": tally.to_json(), "dropped": [vars(item) for item in lost], "limits": limits}
    items += provenance.read_items(job.clips, job.indices[len(items) :])  # behind the last clip that is wanted
    provenance.check_unchanged(items, job.clips, job.indices)
    content["items"] = msgspec.to_builtins(items)
    content["hashes"] = [hashes[entry.id] for entry in entries.entries] if hashes else []
    write_marker(job, content)
    return len(job.indices)


def write_marker(job: Shard, content: Mapping[str, Any]) -> None:
    """Writes the marker of a finished shard, with the hashes of its files."""
    files = {path.name: msgspec.to_builtins(manifest.describe_file(path)) for path in job.files}
    marker = msgspec.convert({**content, "origin": job.origin, "files": files}, ShardMarker)
    manifest.write_json(job.marker, msgspec.to_builtins(marker))


def decode(videos: Iterable[Video | Dropped], settings: CurationSettings = OFF) -> Iterator[Clip | Dropped]:
    """Decodes videos in this process."""
    for video in videos:
        if isinstance(video, Dropped):
            yield video
        else:
            yield from (item for _, item in curation.clips(video, 0, settings))


def _refuse(item: Dropped) -> None:
    raise UserError(f"Clip {item} cannot be used; mend or remove it")


def encode(
    experiment: Experiment,
    clips: Iterable[Clip],
    store: EncoderStore | None = None,
    drop: Callable[[Dropped], None] = _refuse,
) -> Iterator[Record]:
    """Encodes clips to records, in order and in batches of BATCH clips.

    Args:
      experiment: config of the encoders.
      clips: of one size.
      store: encoders that are loaded already.
      drop: called with each clip that cannot be encoded; by default raises UserError.
    """
    store = store or EncoderStore()
    codec = codecs.codec(**dataclasses.asdict(experiment.codec), store=store)
    extract_features = features.features(**dataclasses.asdict(experiment.features), store=store)
    source = _captioned(experiment, clips, store, drop)
    while batch := list(itertools.islice(source, BATCH)):
        videos = np.stack([clip.video for clip, _ in batch])
        images: Any = [None] * len(batch)
        if experiment.data.cond_images:
            ends = codecs.encode_images(codec, videos[:, [0, -1]].reshape(-1, *videos.shape[2:]))
            images = ends.reshape(len(batch), 2, *ends.shape[1:]).astype(np.float16)
        encoded = zip(batch, codec.encode(videos), extract_features(videos), images, strict=True)
        for (clip, (tokens, pooled)), latent, feature, ends in encoded:
            latent = latent.astype(np.float16)
            if not (np.isfinite(latent).all() and np.isfinite(feature).all()):
                drop(Dropped(clip.id, "encode", "has a latent or feature that is not finite"))
                continue
            yield Record(clip.id, latent, tokens, pooled, feature, clip.caption, clip.attributes, cond_images=ends)


def _captioned(
    experiment: Experiment, clips: Iterable[Clip], store: EncoderStore, drop: Callable[[Dropped], None]
) -> Iterator[tuple[Clip, tuple[np.ndarray, np.ndarray]]]:
    """The clips whose captions can be encoded, with tokens and pooled embedding; BATCH captions are encoded at once."""
    embeddings: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the last captions, which often repeat
    clips = iter(clips)
    while batch := list(itertools.islice(clips, BATCH)):
        new = [clip for clip in batch if clip.caption not in embeddings]
        embeddings |= _encode_captions(experiment, new, store, drop)
        embeddings = {clip.caption: embeddings[clip.caption] for clip in batch if clip.caption in embeddings}
        yield from ((clip, embeddings[clip.caption]) for clip in batch if clip.caption in embeddings)


def _encode_captions(
    experiment: Experiment, clips: Sequence[Clip], store: EncoderStore, drop: Callable[[Dropped], None]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Encodes each distinct caption to tokens and pooled embedding, in the dtype they are stored in.

    Clips whose captions cannot be encoded are dropped.
    """
    captions = list(dict.fromkeys(clip.caption for clip in clips))
    if not captions:
        return {}
    encoder = text_encoder(experiment, words_of(captions), store)
    try:
        encodings = encoder.encode(captions)
    except UserError:
        for clip in clips:
            try:
                encoder.encode([clip.caption])
            except UserError as error:
                drop(Dropped(clip.id, "caption", "has a caption that cannot be encoded", str(error)[:500]))
                captions = [caption for caption in captions if caption != clip.caption]
        encodings = encoder.encode(captions) if captions else []
    pairs = zip(captions, encodings, strict=True)
    return {caption: _stored(encoding, encoder.stored) for caption, encoding in pairs}


def _stored(encoding: TextEncoding, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and pooled embedding in the dtype they are stored in."""
    return encoding.tokens.astype(dtype), encoding.pooled.astype(dtype)


def text_encoder(experiment: Experiment, vocabulary: Iterable[str], store: EncoderStore | None = None) -> Any:
    """Returns the experiment's text encoder; only the encoder `words` uses `vocabulary`."""
    settings = experiment.text
    options: dict[str, Any] = {}
    if settings.name == "words":
        options = {"vocabulary": vocabulary, "width": settings.width}
    elif settings.name == "t5+clip":
        options = {name: getattr(settings, name) for name in ("t5", "clip", "pad_to_max_tokens", "suffix")}
    if store is not None and settings.name == "t5+clip":
        options["store"] = store
    return text.text_encoder(settings.name, max_tokens=settings.max_tokens, **options)


def finish(experiment: Experiment, run: RunFolder, clips: Source, jobs: Sequence[Shard], store: EncoderStore) -> None:
    """Writes the list of what was dropped and the manifest of all shards; their markers say what they were made of."""
    total, lost, kept, known = Tally(), list(clips.dropped), list[Shard](), dict[str, FileEntry]()
    leave_out_near_duplicates(jobs, experiment.curation)
    for job in jobs:
        if job.most is not None and total.clips >= job.most:
            break
        marker = job.read_marker()
        lost += [Dropped(item.id, item.stage, item.reason, item.detail) for item in marker.dropped]
        if job.most is not None and total.clips + marker.tally.clips > job.most:
            marker = keep(job, range(job.most - total.clips))
        total.merge(marker.tally)
        known |= marker.files
        kept.append(job)
    dropped.print_table(total.clips, lost, Console())
    dropped.check_share(total.clips, lost, experiment.data.max_dropped_share)
    codec = codecs.codec(**dataclasses.asdict(experiment.codec), store=store)
    encoder = text_encoder(experiment, total.words, store)
    null = _stored(encoder.null(), encoder.stored)
    manifest.write(
        run.data,
        DataManifest,
        [
            *(path.name for job in kept for path in job.files),
            *records.write_null(run.data, *null),
            *([dropped.write(run.data, lost)] if lost else []),
        ],
        experiment.prepared_hash,
        known,
        **describe_encoders(experiment, sorted(total.words), store),
        latent=total.latent(shared=codec.one_scale) | (UNIT if codec.scaled else {}),
        text_length=total.text_length,
        clips=total.clips,
        fps=experiment.data.fps,
        source=clips.describe(),
        cond_images=experiment.data.cond_images,
        dropped=dropped.counts(lost),
    )
    if not lost:
        (run.data / dropped.FILE_NAME).unlink(missing_ok=True)
    names = {name for job in kept for name in (*(path.name for path in job.files), job.marker.name)}
    for path in run.data.glob(f"{STEM}-*-of-*"):  # of another number of shards, or behind the last that is wanted
        if path.name not in names:
            path.unlink(missing_ok=True)
    logger.info("%d clips are prepared: %s", total.clips, run.data)


def leave_out_near_duplicates(jobs: Sequence[Shard], settings: CurationSettings) -> None:
    """Rewrites the shards that hold clips nearly the same as an earlier one; does nothing where all stay."""
    if settings.near_duplicate_bits < 0:
        return
    present = [job for job in jobs if job.marker.exists()]
    sizes = [len(job.read_marker().hashes) for job in present]
    hashes = (bytes.fromhex(found) for job in present for found in job.read_marker().hashes)
    repeated = np.asarray(curation.near_duplicates(hashes, settings.near_duplicate_bits), np.int64)
    for job, start, size in zip(present, np.cumsum([0, *sizes]), sizes):
        rows = {int(row) for row in repeated[(repeated >= start) & (repeated < start + size)] - start}
        if rows:
            keep(job, [row for row in range(size) if row not in rows], "is nearly the same as an earlier clip")


def keep(job: Shard, rows: Sequence[int], reason: str = "") -> ShardMarker:
    """Rewrites a shard with some of its clips; returns its new marker, which is written for them.

    Args:
      job: the shard.
      rows: numbers of the records that stay, ascending.
      reason: lists the others as left out by the config.
    """
    tally, entries, lost = Tally(), index.Writer(), list[DroppedItem]()
    chosen = set(rows)

    def kept() -> Iterator[Record]:
        for row, record in enumerate(records.read_shard(job.path)):
            if row not in chosen:
                lost.append(DroppedItem(record.id, "curate", reason))
                continue
            tally.add(record)
            entries.add(record.feature, index.Entry(record.id, record.caption, record.attributes))
            yield record

    marker = job.read_marker()
    records.write_shard(job.path, kept())
    entries.write(job.index)
    previews.keep(job.previews, rows)
    changed = {
        "tally": tally.to_json(),
        "hashes": [marker.hashes[row] for row in rows] if marker.hashes else [],
        "dropped": msgspec.to_builtins([*marker.dropped, *lost] if reason else marker.dropped),
    }
    write_marker(job, msgspec.to_builtins(marker) | changed)
    return job.read_marker()
