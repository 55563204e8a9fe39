"""One shard of prepared clips: its place and provenance, writing it, and writing it again with changed items."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import (
    DroppedItem,
    ShardMarker,
    ShardStatistics,
    SourceItem,
)
from paris_jax.config.experiment import Experiment
from paris_jax.config.sections import CurationSettings
from paris_jax.data import curation, index, previews, provenance, records
from paris_jax.data.decoding.decoders import LIMITED, Decoders, Limits
from paris_jax.data.decoding.footage import DECODING_VERSION
from paris_jax.data.encoding import captioned, encode
from paris_jax.data.records import Record
from paris_jax.data.sources.clip import OFF, Clip, Dropped, Video, video_of
from paris_jax.data.sources.source import Source
from paris_jax.encoders.published import EncoderStore
from paris_jax.encoders.words import split
from paris_jax.errors import UserError

STEM = "data"


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
        """The changes since the shard was written; notes new times of files whose contents are the same."""
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


def write_in_process(job: Shard, decoders: int) -> int:
    with decoders_for(job.experiment, job.clips, decoders) as pool:
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
    found = list(captioned(experiment, clips, store or EncoderStore(), refused.append))
    if refused:
        return False
    tally, _ = write_records(
        job,
        (
            dataclasses.replace(record, caption=clip.caption, tokens=tokens, pooled=pooled)
            for record, (clip, (tokens, pooled)) in zip(records.read_shard(job.path), found, strict=True)
        ),
    )
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
    lost, shown, settings = list[Dropped](), previews.Previews(), job.experiment.curation
    hashes: dict[str, str] = {}
    items = list[SourceItem]()

    def drop(item: Dropped) -> None:
        if job.strict and item.stage != "curate":
            raise strictly(item)
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

    encoded = itertools.islice(encode(job.experiment, shown.watch(clips()), store, drop), job.most)
    tally, ids = write_records(job, encoded)
    previews.write(job.previews, shown, ids)
    limits = job.limits if any(item.reason in LIMITED for item in lost) else None
    content: dict[str, Any] = {"tally": tally.to_json(), "dropped": [vars(item) for item in lost], "limits": limits}
    items += provenance.read_items(job.clips, job.indices[len(items) :])  # behind the last clip that is wanted
    provenance.check_unchanged(items, job.clips, job.indices)
    content["items"] = msgspec.to_builtins(items)
    content["hashes"] = [hashes[name] for name in ids] if hashes else []
    write_marker(job, content)
    return len(job.indices)


def write_records(job: Shard, found: Iterable[Record]) -> tuple[Tally, list[str]]:
    """Writes the records of a shard and their index; returns their statistics and ids."""
    tally, entries = Tally(), index.Writer()

    def counted() -> Iterator[Record]:
        for record in found:
            tally.add(record)
            entries.add(record.feature, index.Entry(record.id, record.caption, record.attributes))
            yield record

    records.write_shard(job.path, counted())
    entries.write(job.index)
    return tally, [entry.id for entry in entries.entries]


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


def decoders_for(experiment: Experiment, clips: Source, count: int) -> Any:
    """The decoding processes for a source; None for clips that are computed."""
    if not clips.isolated:
        return contextlib.nullcontext()
    limits = Limits(experiment.data.decode_seconds, experiment.data.decode_memory_mb)
    return Decoders(count, limits, experiment.curation)


def strictly(item: Dropped) -> UserError:
    return UserError(f"{item} (stage {item.stage}); mend or remove it, or run without --strict")


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
    lost, chosen = list[DroppedItem](), set(rows)

    def kept() -> Iterator[Record]:
        for row, record in enumerate(records.read_shard(job.path)):
            if row not in chosen:
                lost.append(DroppedItem(record.id, "curate", reason))
            else:
                yield record

    marker = job.read_marker()
    tally, _ = write_records(job, kept())
    previews.keep(job.previews, rows)
    changed = {
        "tally": tally.to_json(),
        "hashes": [marker.hashes[row] for row in rows] if marker.hashes else [],
        "dropped": msgspec.to_builtins([*marker.dropped, *lost] if reason else marker.dropped),
    }
    write_marker(job, msgspec.to_builtins(marker) | changed)
    return job.read_marker()
