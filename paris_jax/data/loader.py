"""The Grain loader: shuffled batches of a data folder, equal on any number of processes, exactly resumable."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from paris_jax.artifacts.schemas import ClusterManifest, RecordsManifest
from paris_jax.data.records import Record, Records, read_manifest, read_records
from paris_jax.encoders.codecs import LatentScale
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
READ_AHEAD = 3  # prefetched batches
THREADS = 2  # threads that read records


@dataclasses.dataclass(frozen=True)
class Collate:
    """Stacks (global sample index, record) pairs to one batch.

    Attributes:
      scale: mean and spread that latents are normalised with.
      text_length: tokens are padded with zeros to this length.
    """

    scale: LatentScale
    text_length: int

    def __call__(self, samples: Sequence[tuple[int, Record]]) -> dict[str, np.ndarray]:
        records = [record for _, record in samples]
        tokens = np.zeros((len(records), self.text_length, records[0].tokens.shape[-1]), np.float32)
        for row, record in zip(tokens, records):
            row[: len(record.tokens)] = record.tokens
        return {
            "latent": self.scale.normalise(np.stack([r.latent for r in records])),
            "tokens": tokens,
            "length": np.asarray([len(r.tokens) for r in records], np.int32),
            "pooled": np.stack([r.pooled for r in records]).astype(np.float32),
            "cluster": np.asarray([-1 if r.cluster is None else r.cluster for r in records], np.int32),
            "index": np.asarray([place % 2**31 for place, _ in samples], np.int32),
        }


def training_batches(
    folders: epath.PathLike | Sequence[epath.PathLike],
    batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    text_length: int | None = None,
    threads: int = THREADS,
    read_ahead: int = READ_AHEAD,
) -> Any:
    """Returns an endless iterator of batches, with `get_state()` and `set_state()` (JSON data).

    Each epoch visits every clip once, in its own order; batches run across the border of two epochs. All clips of all
    folders are shuffled together, so clusters come in their natural proportions. Batch n depends on (folders, seed,
    batch, n) only: each process gets its own rows of it, and all processes together get all of them.

    Args:
      folders: one cluster's folder (an expert) or all (monolith, router).
      batch: clips of the global batch.
      seed: of the order.
      process_index: which of `process_count` equal parts of each batch to give.
      process_count: how many parts there are, one for each process or for several that need the same samples.
      text_length: tokens are padded to this many; by default to the longest caption's.
      threads: that read records.
      read_ahead: batches kept ready; memory is about (read_ahead + 1) batches.

    Yields:
      A dict of arrays, b = batch / process_count:
      latent (b, T, H, W, C) float32, normalised; tokens (b, L, Dt) float32, padded with zeros; length (b,) int32, true
      lengths; pooled (b, Dp) float32; cluster (b,) int32, -1 if none; index (b,) int32, the sample's place in the
      stream.

    Raises:
      UserError: a folder that is not finished, folders that do not belong together, or fewer clips than one batch.
    """
    found = _found(folders)
    check_batches(found, batch, process_count)
    shared = found[0][0]
    collate = Collate(LatentScale.from_manifest(shared.latent), text_length or shared.text_length)
    rows = (
        _stream(found, seed)
        .map_with_index(_with_place)
        .batch(batch // process_count, drop_remainder=True, batch_fn=collate)
    )
    mine = rows[process_index::process_count]
    width = read_records(found[0][1])[0].tokens.shape[-1]
    numbers = math.prod(shared.latent.shape) + collate.text_length * width
    each = 4 * numbers * batch // process_count  # float32
    logger.info("the data keep up to %d batches ready, about %.0f MB", read_ahead, read_ahead * each / 1e6)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read_ahead)
    return iter(mine.to_iter_dataset(options))


def clip_ids(folders: epath.PathLike | Sequence[epath.PathLike], batch: int, seed: int, number: int) -> list[str]:
    """Ids of the clips of global batch `number` (from 0) of `training_batches`, in order."""
    stream = _stream(_found(folders), seed)
    return [stream[number * batch + row].id for row in range(batch)]


def _found(folders: epath.PathLike | Sequence[epath.PathLike]) -> list[tuple[RecordsManifest, epath.PathLike]]:
    """Manifests and folders, sorted: the order of clips must not depend on the order of the folders."""
    paths = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
    found = [(read_manifest(path), path) for path in paths]
    return sorted(found, key=lambda pair: (getattr(pair[0], "cluster", 0), str(pair[1])))


def _stream(found: Sequence[tuple[RecordsManifest, epath.PathLike]], seed: int) -> Any:
    return grain.MapDataset.source(Records([path for _, path in found])).seed(seed).shuffle().repeat()


def _with_place(place: int, record: Record) -> tuple[int, Record]:
    return place, record


def check_batches(found: Sequence[tuple[RecordsManifest, Any]], batch: int, process_count: int) -> None:
    """Raises UserError for folders that cannot fill a batch or do not belong together."""
    if batch % process_count:
        raise UserError(
            f"training.global_batch_size={batch}: must be a multiple of the {process_count} processes of this job"
        )
    for other, path in found[1:]:
        for name in ("latent", "codec", "text", "text_length"):
            if getattr(other, name) != getattr(found[0][0], name):
                raise UserError(
                    f"{path} and {found[0][1]} differ in {name}; cluster again, so that all come from one data set"
                )
    clips = sum(other.clips for other, _ in found)
    if clips < batch:
        first, path = found[0]
        what = (
            f"Cluster {first.cluster} ({path})" if isinstance(first, ClusterManifest) and len(found) == 1 else f"{path}"
        )
        raise UserError(
            f"{what} has {clips} clips, fewer than one batch of {batch}; lower training.global_batch_size, add clips, "
            "or use fewer clusters (clustering.num_clusters)"
        )
