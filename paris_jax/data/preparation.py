"""`paris-jax prepare`: encodes clips to cached latents, text embeddings and features, shard by shard."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
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
from paris_jax.artifacts.schemas import CodecDescription, DataManifest, ShardMarker, ShardStatistics, TextDescription
from paris_jax.config.experiment import Experiment
from paris_jax.data import dropped, index, previews, records
from paris_jax.data.decoders import LIMITED, Decoders, Limits
from paris_jax.data.footage import DECODING_VERSION
from paris_jax.data.records import Record
from paris_jax.data.sources.clip import Clip, Dropped, Video
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
) -> None:
    """Encodes every clip of the experiment into RUN/data; resumes at the first missing shard.

    The files are identical, byte for byte, regardless of interruptions and of the number of processes. A clip or file
    that cannot be used is dropped, and listed with its reason in dropped.jsonl.

    Args:
      experiment: config of the clips and encoders.
      run: run folder to write to.
      processes: number of shards encoded in parallel.
      shard_size: number of the source's items per shard.
      clips: source of the clips, instead of the one that `data.source` names.
      decoders: number of decoding processes; by default one for each CPU core.
      strict: refuse at the first clip or file that cannot be used.

    Raises:
      UserError: an encoder cannot run, too many clips cannot be used, the disk is full, or the run folder belongs to
        another config.
    """
    decoders = decoders or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    with locks.only_writer(run.data):
        _prepare(experiment, run, processes, shard_size, clips, max(1, decoders // processes), strict)


def _prepare(
    experiment: Experiment,
    run: RunFolder,
    processes: int,
    shard_size: int | None,
    clips: Source | None,
    decoders: int,
    strict: bool,
) -> None:
    store = EncoderStore()
    encoders = weights_of(**describe_encoders(experiment, (), store))
    names = experiment.codec.name, experiment.text.name, experiment.features.name
    if processes > 1 and PUBLISHED.intersection(names) and jax.default_backend() != "cpu":
        raise UserError(
            f"--num_workers={processes}: these encoders run on the accelerators, which only one process can use; use 1"
        )
    if manifest.exists(run.data):
        run.claim(experiment.to_dict(), experiment.hash)
        existing = manifest.read(run.data, DataManifest)
        if existing.config_hash != experiment.data_hash:
            raise UserError(f"{run.data} was made with another config; use a new --workdir, or delete {run.data}")
        if weights_of(existing.codec, existing.text, existing.features) != encoders:
            raise UserError(
                f"{run.data} was made with other weights of its encoders; use those weights, or a new --workdir"
            )
        for marker in run.data.glob(f"*{records.ENDING}.json"):  # left by a run that was killed while deleting them
            marker.unlink(missing_ok=True)
        logger.info("%d clips are prepared already (%s)", existing.clips, run.data)
        return
    clips = clips if clips is not None else source(experiment.data)
    if not len(clips):
        if clips.dropped:
            dropped.check_share(0, clips.dropped, experiment.data.max_dropped_share)
        raise UserError("The data source has no clips; raise data.num_clips or add videos to data.path")
    if strict and (faults := [item for item in clips.dropped if item.stage != "curate"]):
        raise _strictly(faults[0])
    run.claim(experiment.to_dict(), experiment.hash)  # only after the source has listed its items
    size = shard_size or clips.items_per_shard
    count = -(-len(clips) // size)
    jobs = [Shard(experiment, clips, str(run.data), k, count, size, encoders, strict) for k in range(count)]
    missing = [job for job in jobs if not job.is_done()]
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), Speed(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task("items" if clips.isolated else "clips", total=len(clips))
        progress.advance(task, len(clips) - sum(len(job.indices) for job in missing))
        if processes == 1:
            with _decoders(experiment, clips, decoders) as pool:
                for job in missing:
                    if job.is_beyond(jobs):
                        break
                    write(job, lambda: progress.advance(task), store, pool)
        else:
            # Spawned, because a forked process would inherit locks of JAX's threads.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
                for done in concurrent.futures.as_completed([pool.submit(_write, job, decoders) for job in missing]):
                    progress.advance(task, done.result())
    finish(experiment, run, clips, jobs, store)
    store.drop()


def _decoders(experiment: Experiment, clips: Source, count: int) -> Any:
    """The decoding processes for a source; None for clips that are computed."""
    if not clips.isolated:
        return contextlib.nullcontext()
    return Decoders(count, Limits(experiment.data.decode_seconds, experiment.data.decode_memory_mb))


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
        """Provenance of the shard; a marker with any other provenance is ignored."""
        items = hashlib.sha256()
        for number in self.indices:
            items.update(hashlib.sha256(self.clips.stamp(number).encode(errors="surrogateescape")).digest())
        config = {"config_hash": self.experiment.data_hash, "encoders": self.encoders}
        source = {"source": self.clips.describe(), "indices": [self.indices.start, self.indices.stop]}
        return {**config, **source, "items": items.hexdigest(), "decoding": DECODING_VERSION}

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
        if not all(path.exists() for path in (*self.files, self.marker)):
            return False
        found = self.read_marker()
        return found.origin == self.origin and found.limits in (None, self.limits)

    def is_beyond(self, jobs: Sequence["Shard"]) -> bool:
        """Whether the shards before hold as many clips as the data set may have."""
        if self.most is None or not self.clips.isolated:
            return False
        before = [job.read_marker().tally.clips for job in jobs[: self.number] if job.marker.exists()]
        return len(before) == self.number and sum(before) >= self.most


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
        return write(job, pool=pool)


def write(
    job: Shard,
    advance: Callable[[], object] = lambda: None,
    store: EncoderStore | None = None,
    pool: Decoders | None = None,
) -> int:
    """Decodes, encodes and writes one shard, then its marker; returns its number of items."""
    tally, lost, entries = Tally(), list[Dropped](), index.Writer()
    shown = previews.Previews()

    def drop(item: Dropped) -> None:
        if job.strict and item.stage != "curate":
            raise _strictly(item)
        lost.append(item)

    def videos() -> Iterator[Video | Dropped]:
        for number in job.indices:
            yield from job.clips.videos(number)
            advance()

    def clips() -> Iterator[Clip]:
        for item in pool.clips(videos()) if pool is not None else decode(videos()):
            if isinstance(item, Dropped):
                drop(item)
            else:
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
    items = [vars(item) for item in lost]
    manifest.write_json(
        job.marker, {"origin": job.origin, "tally": tally.to_json(), "dropped": items, "limits": limits}
    )
    return len(job.indices)


def decode(videos: Iterable[Video | Dropped]) -> Iterator[Clip | Dropped]:
    """Decodes videos in this process."""
    for video in videos:
        if isinstance(video, Dropped):
            yield video
        else:
            yield from (item for _, item in video.clips())


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
    """Writes the list of what was dropped and the manifest of all shards, then deletes their markers."""
    total, lost, kept = Tally(), list(clips.dropped), list[Shard]()
    for job in jobs:
        if job.most is not None and total.clips >= job.most:
            break
        marker = job.read_marker()
        lost += [Dropped(item.id, item.stage, item.reason, item.detail) for item in marker.dropped]
        if job.most is not None and total.clips + marker.tally.clips > job.most:
            marker = shorten(job, job.most - total.clips)
        total.merge(marker.tally)
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
        experiment.data_hash,
        **describe_encoders(experiment, sorted(total.words), store),
        latent=total.latent(shared=codec.one_scale) | (UNIT if codec.scaled else {}),
        text_length=total.text_length,
        clips=total.clips,
        fps=experiment.data.fps,
        source=clips.describe(),
        cond_images=experiment.data.cond_images,
        dropped=dropped.counts(lost),
    )
    for job in jobs:
        job.marker.unlink(missing_ok=True)
        if job not in kept:
            for path in job.files:
                path.unlink(missing_ok=True)
    logger.info("%d clips are prepared: %s", total.clips, run.data)


def shorten(job: Shard, clips: int) -> ShardMarker:
    """Cuts a shard to its first clips; returns its new marker, which is written for them."""
    tally, entries = Tally(), index.Writer()

    def first() -> Iterator[Record]:
        for record in itertools.islice(records.read_shard(job.path), clips):
            tally.add(record)
            entries.add(record.feature, index.Entry(record.id, record.caption, record.attributes))
            yield record

    marker = job.read_marker()
    records.write_shard(job.path, first())
    entries.write(job.index)
    previews.shorten(job.previews, clips)
    manifest.write_json(job.marker, {**msgspec.to_builtins(marker), "tally": tally.to_json()})
    return job.read_marker()
