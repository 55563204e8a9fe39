"""`paris-jax prepare`: encodes clips to cached latents, text embeddings and features, shard by shard."""

import concurrent.futures
import dataclasses
import itertools
import logging
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import CodecDescription, DataManifest, ShardMarker, ShardStatistics, TextDescription
from paris_jax.config.experiment import Experiment
from paris_jax.data import records
from paris_jax.data.records import Record
from paris_jax.data.sources.clip import Clip
from paris_jax.data.sources.source import Source, source
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
    shard_size: int = records.SHARD_SIZE,
    clips: Source | None = None,
) -> None:
    """Encodes every clip of the experiment into RUN/data; resumes at the first missing shard.

    The files are identical, byte for byte, regardless of interruptions and of the number of processes.

    Args:
      experiment: config of the clips and encoders.
      run: run folder to write to.
      processes: number of shards encoded in parallel.
      shard_size: number of clips per shard.
      clips: source of the clips, instead of the one that `data.source` names.

    Raises:
      UserError: an encoder cannot run, a clip or caption cannot be used, the disk is full, or the run folder belongs to
        another config.
    """
    with locks.only_writer(run.data):
        _prepare(experiment, run, processes, shard_size, clips)


def _prepare(experiment: Experiment, run: RunFolder, processes: int, shard_size: int, clips: Source | None) -> None:
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
        raise UserError("The data source has no clips; raise data.num_clips or add videos to data.path")
    run.claim(experiment.to_dict(), experiment.hash)  # only after the source has checked its clips
    count = -(-len(clips) // shard_size)
    jobs = [Shard(experiment, clips, str(run.data), k, count, shard_size, encoders) for k in range(count)]
    missing = [job for job in jobs if not job.is_done()]
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), Speed(), TimeRemainingColumn()
    ) as progress:
        task = progress.add_task("clips", total=len(clips))
        progress.advance(task, len(clips) - sum(len(job.indices) for job in missing))
        if processes == 1:
            for job in missing:
                write(job, lambda: progress.advance(task), store)
        else:
            # Spawned, because a forked process would inherit locks of JAX's threads.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
                for done in concurrent.futures.as_completed([pool.submit(write, job) for job in missing]):
                    progress.advance(task, done.result())
    finish(experiment, run, clips, jobs, store)
    store.drop()
    logger.info("%d clips are prepared: %s", len(clips), run.data)


class Speed(ProgressColumn):
    """Clips per second over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} clips/s" if task.speed else "", style="progress.data.speed")


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

    @property
    def path(self) -> epath.Path:
        return epath.Path(self.folder) / records.shard_name(STEM, self.number, self.count)

    @property
    def marker(self) -> epath.Path:
        return self.path.parent / f"{self.path.name}.json"

    @property
    def indices(self) -> range:
        return range(self.number * self.size, min(len(self.clips), (self.number + 1) * self.size))

    @property
    def origin(self) -> dict[str, Any]:
        """Provenance of the shard; a marker with any other provenance is ignored."""
        config = {"config_hash": self.experiment.data_hash, "encoders": self.encoders}
        return {**config, "source": self.clips.describe(), "indices": [*self.indices]}

    def is_done(self) -> bool:
        return (
            self.path.exists()
            and self.marker.exists()
            and manifest.read_json(self.marker, ShardMarker).origin == self.origin
        )


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


def write(job: Shard, advance: Callable[[], object] = lambda: None, store: EncoderStore | None = None) -> int:
    """Encodes and writes one shard, then its marker; returns its number of clips."""
    tally = Tally()

    def counted() -> Iterator[Record]:
        for record in encode(job.experiment, (job.clips[i] for i in job.indices), store):
            tally.add(record)
            yield record
            advance()

    records.write_shard(job.path, counted())
    manifest.write_json(job.marker, {"origin": job.origin, "tally": tally.to_json()})
    return len(job.indices)


def encode(experiment: Experiment, clips: Iterable[Clip], store: EncoderStore | None = None) -> Iterator[Record]:
    """Encodes clips to records, in order and in batches of BATCH clips."""
    store = store or EncoderStore()
    codec = codecs.codec(**dataclasses.asdict(experiment.codec), store=store)
    extract_features = features.features(**dataclasses.asdict(experiment.features), store=store)
    embeddings: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the last batch's captions, which often repeat
    clips = iter(clips)
    while batch := list(itertools.islice(clips, BATCH)):
        new = [clip for clip in batch if clip.caption not in embeddings]
        embeddings |= _encode_captions(experiment, new, store)
        embeddings = {clip.caption: embeddings[clip.caption] for clip in batch}
        videos = np.stack([clip.video for clip in batch])
        images: Any = [None] * len(batch)
        if experiment.data.cond_images:
            ends = codecs.encode_images(codec, videos[:, [0, -1]].reshape(-1, *videos.shape[2:]))
            images = ends.reshape(len(batch), 2, *ends.shape[1:]).astype(np.float16)
        encoded = zip(batch, codec.encode(videos), extract_features(videos), images, strict=True)
        for clip, latent, feature, ends in encoded:
            latent, (tokens, pooled) = latent.astype(np.float16), embeddings[clip.caption]
            yield Record(clip.id, latent, tokens, pooled, feature, clip.caption, clip.attributes, cond_images=ends)


def _encode_captions(
    experiment: Experiment, clips: Sequence[Clip], store: EncoderStore
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Encodes each distinct caption to tokens and pooled embedding, in the dtype they are stored in.

    Raises:
      UserError: a caption cannot be encoded; the message names its clip.
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
                raise UserError(f"The caption of clip {clip.id} cannot be used: {error}") from error
        raise
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
    """Writes the manifest of all shards, then deletes their markers."""
    total = Tally()
    for job in jobs:
        total.merge(manifest.read_json(job.marker, ShardMarker).tally)
    codec = codecs.codec(**dataclasses.asdict(experiment.codec), store=store)
    encoder = text_encoder(experiment, total.words, store)
    null = _stored(encoder.null(), encoder.stored)
    manifest.write(
        run.data,
        DataManifest,
        [*(job.path.name for job in jobs), *records.write_null(run.data, *null)],
        experiment.data_hash,
        **describe_encoders(experiment, sorted(total.words), store),
        latent=total.latent(shared=codec.one_scale) | (UNIT if codec.scaled else {}),
        text_length=total.text_length,
        clips=total.clips,
        fps=experiment.data.fps,
        source=clips.describe(),
        cond_images=experiment.data.cond_images,
    )
    for job in jobs:
        job.marker.unlink(missing_ok=True)
