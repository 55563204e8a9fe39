"""The Grain loader: shuffled training batches, identical on any number of processes and exactly resumable."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from etils import epath

from paris_jax.artifacts.schemas import ClusterManifest, RecordsManifest
from paris_jax.data.records import Record, Records, read_manifest, read_records, read_text_lengths
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
READ_AHEAD = 3  # prefetched batches
THREADS = 2  # threads that read records
KEPT_BYTES = 256 << 20  # of decoded records that a process keeps, where all of them fit
FIELDS = ("latent", "tokens", "length", "pooled", "cluster", "index")  # and cond_images, where records have them


class KeptRecords(Sequence[Record]):
    """Records that are decoded once and kept, if all of them fit in `KEPT_BYTES`; picklable without them.

    Reading and decoding take a tenth of a training step of the smallest networks.
    """

    def __init__(self, records: Records):
        self._records = records
        self._kept: dict[int, Record] = {}
        self._bytes = 0  # that are kept
        self._keeps = not len(records) or _bytes_of(records[0]) * len(records) <= KEPT_BYTES

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if not self._keeps or isinstance(index, slice):
            return self._records[index]
        position = int(index)
        if (found := self._kept.get(position)) is None:
            found = self._kept[position] = self._records[position]
            self._bytes += _bytes_of(found)
            if self._bytes > KEPT_BYTES:  # the first record was shorter than others
                self._keeps, self._kept = False, {}
        return found

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_kept": {}, "_bytes": 0}


def _bytes_of(record: Record) -> int:
    return sum(array.nbytes for array in vars(record).values() if isinstance(array, np.ndarray))


@dataclasses.dataclass(frozen=True)
class Collate:
    """Stacks (global sample index, record) pairs into one batch, in the dtypes of the records.

    Attributes:
      text_length: length to which tokens are padded with zeros.
      buckets: chooses a smaller one for some batches; None pads all to `text_length`.
      fields: arrays of the batch, some of `FIELDS` and cond_images.
    """

    text_length: int
    fields: tuple[str, ...] = FIELDS
    buckets: "TextBuckets | None" = None

    def __call__(self, samples: Sequence[tuple[int, Record]]) -> dict[str, np.ndarray]:
        records = [record for _, record in samples]
        batch: dict[str, np.ndarray] = {
            "length": np.asarray([len(r.tokens) for r in records], np.int32),
            "cluster": np.asarray([-1 if r.cluster is None else r.cluster for r in records], np.int32),
            "index": np.asarray([position % 2**31 for position, _ in samples], np.int32),
        }
        for name in {"latent", "pooled", "cond_images"} & set(self.fields):
            batch[name] = np.stack([getattr(record, name) for record in records])
        if "tokens" in self.fields:
            first = records[0].tokens
            length = self.buckets.length(samples[0][0]) if self.buckets else self.text_length
            batch["tokens"] = np.empty((len(records), length, first.shape[-1]), first.dtype)
            for row, record in zip(batch["tokens"], records, strict=True):
                row[: len(record.tokens)], row[len(record.tokens) :] = record.tokens, 0
        return {name: batch[name] for name in self.fields}


@dataclasses.dataclass(frozen=True)
class TextBuckets:
    """The static lengths that texts are padded to: each batch gets the shortest that holds its longest text.

    A process knows the texts of the whole batch, not only of its own rows, so that all processes choose alike.

    Attributes:
      lengths: allowed lengths, ascending; the last holds every text.
      texts: stream of the texts' lengths, in the order of the clips.
      batch: global batch size.
    """

    lengths: tuple[int, ...]
    texts: Any
    batch: int

    def length(self, position: int) -> int:
        """The length for the batch that holds the sample at this position of the stream."""
        begin = position - position % self.batch
        longest = max(int(self.texts[sample]) for sample in range(begin, begin + self.batch))
        return next(length for length in self.lengths if length >= longest)


def bucket_lengths(longest: int, count: int, multiple: int = 1, shortest: int = 1) -> tuple[int, ...]:
    """`count` lengths, evenly spaced up to `longest`, each rounded up to a multiple.

    There are fewer where some coincide, or are below `shortest`.
    """
    made = (-(-longest * i // count) for i in range(1, count + 1))
    return tuple(sorted({length + -length % multiple for length in made if length >= shortest}))


def training_batches(
    folders: epath.PathLike | Sequence[epath.PathLike],
    batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    text_length: int | None = None,
    fields: Sequence[str] = FIELDS,
    threads: int = THREADS,
    read_ahead: int = READ_AHEAD,
    workers: int = 0,
    text_lengths: Sequence[int] = (),
) -> Any:
    """Returns an endless iterator of batches, with `get_state()` and `set_state()` (JSON data).

    Each epoch visits every clip once, in its own order; batches cross epoch boundaries. The clips of all folders are
    shuffled together, so clusters occur in their natural proportions. Batch n depends only on (folders, seed, batch,
    n): each process gets its own rows, and together the processes get the whole batch.

    Args:
      folders: the folder of one cluster (expert) or of all clusters (monolith, router).
      batch: global batch size, in clips.
      seed: seed of the shuffle.
      process_index: index of the part of each batch to return, out of `process_count` equal parts.
      process_count: number of parts: one per process, or one per group of processes that need the same samples.
      text_length: length to which tokens are padded; by default that of the longest caption.
      text_lengths: static lengths of which each batch gets the shortest that holds its texts, the last being
        `text_length`; by default every batch has that.
      fields: arrays that the role reads; the others are not moved.
      threads: number of reader threads.
      read_ahead: number of prefetched batches; they take the memory of about (read_ahead + 1) batches.
      workers: processes that read, each with threads and prefetched batches of its own; 0: this process reads.

    Yields:
      A dict of arrays, b = batch / process_count:
      latent (b, T, H, W, C) float16, not normalised; tokens (b, L, Dt) float16 or bfloat16, padded with zeros; length
      (b,) int32, true lengths; pooled (b, Dp), of the dtype of the tokens; cluster (b,) int32, -1 if none; index (b,)
      int32, the sample's position in the stream; cond_images (b, 2, H, W, C) float16, not normalised.

    Raises:
      UserError: a folder is incomplete, the folders come from different data sets, or there are fewer clips than one
        batch.
    """
    sources = _read_sources(folders)
    check_batches(sources, batch, process_count)
    shared = sources[0][0]
    collate = Collate(text_length or shared.text_length, tuple(fields))
    if len(text_lengths) > 1 and "tokens" in fields:
        texts = np.concatenate([read_text_lengths(path) for _, path in sources])
        buckets = TextBuckets(tuple(text_lengths), _in_stream_order(texts, seed), batch)
        collate = dataclasses.replace(collate, buckets=buckets)
    rows = (
        _stream(sources, seed)
        .map_with_index(_with_position)
        .batch(batch // process_count, drop_remainder=True, batch_fn=collate)
    )
    process_rows = rows[process_index::process_count]
    example = dataclasses.replace(collate, buckets=None)([(0, read_records(sources[0][1])[0])])
    batch_bytes = sum(array.nbytes for array in example.values()) * batch // process_count
    logger.info("the loader prefetches up to %d batches, about %.0f MB", read_ahead, read_ahead * batch_bytes / 1e6)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read_ahead)
    batches = process_rows.to_iter_dataset(options)
    if workers:
        flags.FLAGS.mark_as_parsed()  # Grain passes absl's flags to its processes
        batches = batches.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(workers, read_ahead))
    return iter(batches)


def clip_ids(folders: epath.PathLike | Sequence[epath.PathLike], batch: int, seed: int, number: int) -> list[str]:
    """Returns the clip ids of global batch `number` (from 0) of `training_batches`, in order."""
    stream = _stream(_read_sources(folders), seed)
    return [stream[number * batch + row].id for row in range(batch)]


def _read_sources(folders: epath.PathLike | Sequence[epath.PathLike]) -> list[tuple[RecordsManifest, epath.PathLike]]:
    """Returns (manifest, folder) pairs, sorted so that the order of clips does not depend on the order of folders."""
    paths = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    sources = [(read_manifest(path), path) for path in paths]
    return sorted(sources, key=lambda pair: (getattr(pair[0], "cluster", 0), str(pair[1])))


def _stream(sources: Sequence[tuple[RecordsManifest, epath.PathLike]], seed: int) -> Any:
    return _in_stream_order(KeptRecords(Records([path for _, path in sources])), seed)


def _in_stream_order(source: Any, seed: int) -> Any:
    """An endless stream of items, each epoch in its own order, which depends on their number and on `seed` only."""
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def _with_position(position: int, record: Record) -> tuple[int, Record]:
    return position, record


def check_batches(sources: Sequence[tuple[RecordsManifest, Any]], batch: int, process_count: int) -> None:
    """Raises UserError if the folders cannot fill a batch or come from different data sets."""
    if batch % process_count:
        raise UserError(
            f"training.global_batch_size={batch}: must be a multiple of the {process_count} processes of this job"
        )
    for other, path in sources[1:]:
        for name in ("latent", "codec", "text", "text_length"):
            if getattr(other, name) != getattr(sources[0][0], name):
                raise UserError(
                    f"{path} and {sources[0][1]} differ in {name}; cluster again, so that all come from one data set"
                )
    clips = sum(data.clips for data, _ in sources)
    if clips < batch:
        first, path = sources[0]
        subject = f"{path}"
        if isinstance(first, ClusterManifest) and len(sources) == 1:
            subject = f"Cluster {first.cluster} ({path})"
        raise UserError(
            f"{subject} has {clips} clips, fewer than one batch of {batch}; lower training.global_batch_size, add "
            "clips, or use fewer clusters (clustering.num_clusters)"
        )
