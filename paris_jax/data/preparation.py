"""`paris-jax prepare`: clips to cached latents, text and features, shard by shard."""

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
PUBLISHED = {"hunyuan", "t5+clip", "dinov2"}  # encoders that run on accelerators where there are any
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

    The files are the same, byte for byte, however often it was interrupted and on however many processes.

    Args:
      experiment: what to prepare.
      run: where to.
      processes: shards encoded at once.
      shard_size: clips of a shard.
      clips: the clips themselves, instead of those that `data.source` names.

    Raises:
      UserError: an encoder that cannot be run, a clip or caption that cannot be used, a full disk, or a run folder of
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
            f"--num_workers={processes}: these encoders work on the accelerators, which one process has; use 1"
        )
    if manifest.exists(run.data):
        run.claim(experiment.to_dict(), experiment.hash)
        found = manifest.read(run.data, DataManifest)
        if found.config_hash != experiment.data_hash:
            raise UserError(f"{run.data} was made with another config; use a new --workdir, or delete {run.data}")
        if weights_of(found.codec, found.text, found.features) != encoders:
            raise UserError(
                f"{run.data} was made with other weights of its encoders; name those, or use a new --workdir"
            )
        for name in found.files:  # of a run that was killed while it deleted them
            (run.data / f"{name}.json").unlink(missing_ok=True)
        logger.info("%d clips are prepared already (%s)", found.clips, run.data)
        return
    clips = clips if clips is not None else source(experiment.data)
    if not len(clips):
        raise UserError("The data source has no clips; raise data.num_clips or add videos to data.path")
    run.claim(experiment.to_dict(), experiment.hash)  # after the clips were checked
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
    """Manifest entries of codec, text encoder and features; raises UserError for one that cannot run here."""
    return {
        "codec": codecs.codec(**dataclasses.asdict(experiment.codec), store=store).describe(),
        "text": text_encoder(experiment, vocabulary, store).describe(),
        "features": features.features(**dataclasses.asdict(experiment.features), store=store).describe(),
    }


def weights_of(codec: CodecDescription, text: TextDescription, features: Mapping[str, Any]) -> dict[str, Any]:
    """Hashes of the weights of described encoders; None for encoders without weights."""
    hashes = getattr(codec, "sha256", None), getattr(text, "weights", None), features.get("sha256")
    return dict(zip(("codec", "text", "features"), hashes, strict=True))


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard to write, independent of all others; a marker file written after it says that it is complete."""

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
    def mark(self) -> epath.Path:
        return self.path.parent / f"{self.path.name}.json"

    @property
    def indices(self) -> range:
        return range(self.number * self.size, min(len(self.clips), (self.number + 1) * self.size))

    @property
    def origin(self) -> dict[str, Any]:
        """The provenance of the shard: a marker with any other provenance is ignored."""
        made_of = {"config_hash": self.experiment.data_hash, "encoders": self.encoders}
        return {**made_of, "source": self.clips.describe(), "indices": [*self.indices]}

    def is_done(self) -> bool:
        return (
            self.path.exists()
            and self.mark.exists()
            and manifest.read_json(self.mark, ShardMarker).origin == self.origin
        )


class Tally:
    """Statistics of all clips for the manifest, accumulated clip by clip."""

    def __init__(self):
        self.clips = 0
        self.text_length = 0
        self.words: set[str] = set()
        self.numbers = 0  # of a latent's values in one channel
        self.sum = np.zeros(())  # by channel, (C,) float64
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
        """Adds the tally of a shard, as `to_json` wrote it."""
        self.clips += other.clips
        self.text_length = max(self.text_length, other.text_length)
        self.words.update(other.words)
        self.numbers += other.numbers
        self.sum = self.sum + np.asarray(other.sum)
        self.squares = self.squares + np.asarray(other.squares)
        self.shape = other.shape

    def latent(self, shared: bool) -> dict[str, Any]:
        """Shape, and mean and spread by channel (or one for all, `shared`), of the latents."""
        mean, square = self.sum / self.numbers, self.squares / self.numbers
        if shared:
            mean, square = mean.mean(keepdims=True), square.mean(keepdims=True)
        spread = np.sqrt(np.maximum(square - mean**2, 1e-8))
        # Six digits suffice, and are equal on machines that sum in another order.
        digits = {"mean": mean, "spread": spread}
        return {"shape": list(self.shape)} | {name: [round(float(x), 6) for x in v] for name, v in digits.items()}


def write(job: Shard, advance: Callable[[], object] = lambda: None, store: EncoderStore | None = None) -> int:
    """Encodes and writes one shard, then its mark; returns its number of clips."""
    tally = Tally()

    def counted() -> Iterator[Record]:
        for record in encode(job.experiment, (job.clips[i] for i in job.indices), store):
            tally.add(record)
            yield record
            advance()

    records.write_shard(job.path, counted())
    manifest.write_json(job.mark, {"origin": job.origin, "tally": tally.to_json()})
    return len(job.indices)


def encode(experiment: Experiment, clips: Iterable[Clip], store: EncoderStore | None = None) -> Iterator[Record]:
    """Turns clips into records, in order; the encoders see BATCH of them at a time."""
    store = store or EncoderStore()
    codec = codecs.codec(**dataclasses.asdict(experiment.codec), store=store)
    describe = features.features(**dataclasses.asdict(experiment.features), store=store)
    words: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # of the last batch: captions repeat
    clips = iter(clips)
    while batch := list(itertools.islice(clips, BATCH)):
        words |= _encode_captions(experiment, [clip for clip in batch if clip.caption not in words], store)
        words = {clip.caption: words[clip.caption] for clip in batch}
        videos = np.stack([clip.video for clip in batch])
        for clip, latent, feature in zip(batch, codec.encode(videos), describe(videos), strict=True):
            latent, (tokens, pooled) = latent.astype(np.float16), words[clip.caption]
            yield Record(clip.id, latent, tokens, pooled, feature, clip.caption, clip.attributes)


def _encode_captions(
    experiment: Experiment, clips: Sequence[Clip], store: EncoderStore
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tokens and pooled embedding of each caption, as stored; a UserError names the clip."""
    captions = list(dict.fromkeys(clip.caption for clip in clips))
    if not captions:
        return {}
    encoder = text_encoder(experiment, words_of(captions), store)
    try:
        made = encoder.encode(captions)
    except UserError:
        for clip in clips:
            try:
                encoder.encode([clip.caption])
            except UserError as error:
                raise UserError(f"The caption of clip {clip.id} cannot be used: {error}") from error
        raise
    return {caption: _stored(one, encoder.stored) for caption, one in zip(captions, made, strict=True)}


def _stored(encoding: TextEncoding, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and pooled embedding as stored."""
    return encoding.tokens.astype(dtype), encoding.pooled.astype(dtype)


def text_encoder(experiment: Experiment, vocabulary: Iterable[str], store: EncoderStore | None = None) -> Any:
    """The experiment's text encoder; `words` with this vocabulary."""
    settings = experiment.text
    own: dict[str, Any] = {}
    if settings.name == "words":
        own = {"vocabulary": vocabulary, "width": settings.width}
    elif settings.name == "t5+clip":
        own = {"t5": settings.t5, "clip": settings.clip, "pad_to_max_tokens": settings.pad_to_max_tokens}
    if store is not None and settings.name == "t5+clip":
        own["store"] = store
    return text.text_encoder(settings.name, max_tokens=settings.max_tokens, **own)


def finish(experiment: Experiment, run: RunFolder, clips: Source, jobs: Sequence[Shard], store: EncoderStore) -> None:
    """Writes the manifest of all shards, then removes their marks."""
    total = Tally()
    for job in jobs:
        total.merge(manifest.read_json(job.mark, ShardMarker).tally)
    codec = codecs.codec(**dataclasses.asdict(experiment.codec), store=store)
    encoder = text_encoder(experiment, total.words, store)
    none = _stored(encoder.null(), encoder.stored)
    manifest.write(
        run.data,
        DataManifest,
        [*(job.path.name for job in jobs), *records.write_null(run.data, *none)],
        experiment.data_hash,
        **describe_encoders(experiment, sorted(total.words), store),
        latent=total.latent(shared=codec.one_scale) | (UNIT if codec.scaled else {}),
        text_length=total.text_length,
        clips=total.clips,
        fps=experiment.data.fps,
        source=clips.describe(),
    )
    for job in jobs:
        job.mark.unlink(missing_ok=True)
