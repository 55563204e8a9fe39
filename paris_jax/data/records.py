"""The latent cache: clips as records in ArrayRecord shards, and copies of chosen records.

A record is a safetensors file in memory: its arrays, and its text as JSON metadata. A folder of records is described by
a manifest of the kinds below, which lists the shards; the record number runs through the shards in order of name.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from array_record.python import array_record_data_source
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import ClusterManifest, DataManifest, HeldoutManifest, RecordsManifest
from paris_jax.artifacts.tensors import loads
from paris_jax.config import hashing
from paris_jax.errors import UserError, first_line

ENDING = ".array_record"
NULL = "null.safetensors"  # the null text embedding, where it is not zeros
SHARD_SIZE = 512  # records
# Required entries of a manifest of records: with them a job runs from its folder alone.
CONTRACT = ("codec", "text", "features", "latent", "text_length", "fps", "source")


@dataclasses.dataclass(frozen=True)
class Record:
    """One clip of the latent cache.

    Attributes:
      id: the clip's, unique and the same on every machine.
      latent: (T, H, W, C) float16, the codec's, not normalised.
      tokens: (L, Dt) float16 or bfloat16, the caption at its true length.
      pooled: (Dp,) likewise.
      feature: (F,) float32, what is clustered.
      caption: the text.
      attributes: what is truly in the clip, where the source knows; {} otherwise.
      cluster: number of its cluster, once it has one.
    """

    id: str
    latent: np.ndarray
    tokens: np.ndarray
    pooled: np.ndarray
    feature: np.ndarray
    caption: str
    attributes: dict[str, str]
    cluster: int | None = None


ARRAYS = ("latent", "tokens", "pooled", "feature")


def encode_record(record: Record) -> bytes:
    """Encodes a record as safetensors bytes; equal records give equal bytes."""
    arrays = {name: np.ascontiguousarray(getattr(record, name)) for name in ARRAYS}
    facts = {name: getattr(record, name) for name in ("id", "caption", "attributes", "cluster")}
    # One metadata entry only: safetensors keeps several in no fixed order.
    return safetensors.numpy.save(arrays, metadata={"record": hashing.canonical_json(facts)})


def decode_record(data: bytes) -> Record:
    """Decodes the bytes of `encode_record`."""
    length = int.from_bytes(data[:8], "little")
    facts = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["record"])
    arrays: dict[str, Any] = loads(data)
    return Record(**facts, **arrays)


def shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}{ENDING}"


def write_shard(path: epath.PathLike, records: Iterable[Record]) -> None:
    """Writes a shard under a partial name, then renames it: a shard that exists is complete.

    Raises:
      UserError: the disk is full or cannot be written.
    """
    path = epath.Path(path)
    with tempfile.TemporaryDirectory() as scratch:
        # ArrayRecord writes local files only; a bucket gets the finished copy.
        local = manifest.partial_path(path) if _is_local(path) else epath.Path(scratch) / path.name
        try:
            with _refusing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                # Groups of one record, because training reads them in random order.
                writer = ArrayRecordWriter(str(local), "group_size:1")
            with contextlib.closing(_Closing(writer, path)):
                for record in records:
                    data = encode_record(record)
                    with _refusing(path):
                        writer.write(data)
            with _refusing(path):
                if _is_local(path):
                    local.replace(path)
                else:
                    local.copy(path, overwrite=True)
        except BaseException:
            local.unlink(missing_ok=True)
            raise


@dataclasses.dataclass(frozen=True)
class _Closing:
    """Closes a writer; an error of its last writes becomes a UserError."""

    writer: Any
    path: epath.Path

    def close(self) -> None:
        with _refusing(self.path):
            self.writer.close()


@contextlib.contextmanager
def _refusing(path: epath.Path) -> Iterator[None]:
    """Raises UserError for a failed write, which ArrayRecord reports as RuntimeError or ValueError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"Cannot write {path} ({error}); free some space or choose another --workdir, "
            "then run the same command again"
        ) from error


def read_manifest(folder: epath.PathLike) -> RecordsManifest:
    """Reads the manifest of a folder of records, of any kind, and checks that no shard is missing."""
    schemas = {manifest.kind(schema): schema for schema in (DataManifest, ClusterManifest, HeldoutManifest)}
    kind = manifest.read_kind(folder)
    if kind and kind not in schemas:
        path = epath.Path(folder) / manifest.FILE_NAME
        raise UserError(f"{path} describes a {kind!r}, where one of {', '.join(schemas)} is expected")
    return manifest.read(folder, schemas.get(kind, DataManifest))


def data_contract(found: RecordsManifest) -> dict[str, Any]:
    """Returns the entries of a manifest of records that every copy of some of its records must carry."""
    return {name: getattr(found, name) for name in CONTRACT}


class Records(Sequence[Record]):
    """The concatenated records of one or several folders, read lazily; picklable."""

    def __init__(self, folders: epath.PathLike | Sequence[epath.PathLike]):
        folders = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
        self._paths = [path for folder in folders for path in _shards(epath.Path(folder))]
        self._source = _open(self._paths)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return decode_record(self._source[position])
        except Exception as error:  # ArrayRecord raises RuntimeError or ValueError, safetensors an error of its own
            path, number = self._shard_of(position)
            raise _damaged(f"{path}: record {number}", error) from error

    def _shard_of(self, position: int) -> tuple[str, int]:
        """The file of a record, and its number there."""
        for path in self._paths:
            count = len(_open([path]))
            if position < count:
                return path, position
            position -= count
        raise IndexError(position)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def _open(paths: Sequence[str]) -> Any:
    """The records of shards, one after another; reads where they are, and not the records."""
    try:
        source = array_record_data_source.ArrayRecordDataSource(paths)
        len(source)
    except (RuntimeError, ValueError) as error:
        if len(paths) > 1:
            for path in paths:
                _open([path])
        raise _damaged(paths[0] if paths else "No shard", error) from error
    return source


def _damaged(what: str, error: Exception) -> UserError:
    return UserError(
        f"{what} cannot be read ({first_line(error)[:200]}); copy the file again from its origin, or delete its folder "
        "and run the command that wrote it again"
    )


def read_records(folder: epath.PathLike | Sequence[epath.PathLike]) -> Records:
    """Returns the records of a finished folder (or of several, in the order given) as a lazy sequence."""
    return Records(folder)


def copy_records(
    source: epath.PathLike | Sequence[epath.PathLike],
    indices: Sequence[int],
    clusters: Sequence[int],
    out: epath.PathLike,
    shard_size: int = SHARD_SIZE,
    stem: str = "clips",
) -> list[str]:
    """Copies chosen records with their cluster filled in, and returns the names of the shards, without a manifest.

    Args:
      source: folder or folders of records.
      indices: numbers of the records to copy, in the order wanted.
      clusters: the cluster of each.
      out: the folder to write; write its manifest (with `data_contract`) afterwards.
      shard_size: the most records of a shard.
      stem: start of the shards' names.
    """
    if len(indices) != len(clusters):
        raise ValueError(f"{len(indices)} indices with {len(clusters)} clusters: must be as many")
    records, out = Records(source), epath.Path(out)
    count = max(1, -(-len(indices) // shard_size))
    names = [shard_name(stem, number, count) for number in range(count)]
    for number, name in enumerate(names):
        chosen = slice(number * shard_size, (number + 1) * shard_size)
        pairs = zip(indices[chosen], clusters[chosen], strict=True)
        write_shard(out / name, (dataclasses.replace(records[int(i)], cluster=int(k)) for i, k in pairs))
    return names


def write_null(folder: epath.PathLike, tokens: np.ndarray, pooled: np.ndarray) -> list[str]:
    """Writes the null text embedding, tokens (L, Dt) and pooled (Dp,), unless it is one token of zeros.

    Returns:
      The file's name, if there is one.
    """
    if len(tokens) == 1 and not tokens.any() and not pooled.any():
        return []
    data = safetensors.numpy.save({"tokens": tokens, "pooled": pooled})
    manifest.write_atomically(epath.Path(folder) / NULL, data)
    return [NULL]


def read_null(folder: epath.PathLike) -> dict[str, np.ndarray]:
    """The null text embedding of `write_null` as tokens and pooled; {} if there is no file."""
    path = epath.Path(folder) / NULL
    return loads(path.read_bytes()) if NULL in read_manifest(folder).files else {}


def _shards(folder: epath.Path) -> list[str]:
    """Returns local paths of a folder's shards; those on a bucket are copied to this machine once."""
    names = sorted(name for name in read_manifest(folder).files if name.endswith(ENDING))
    if _is_local(folder):
        return [str(folder / name) for name in names]
    digest = hashlib.sha256(str(folder).encode() + (folder / manifest.FILE_NAME).read_bytes()).hexdigest()
    cache = epath.Path(tempfile.gettempdir()) / "paris_jax" / digest[:16]
    cache.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (cache / name).exists():
            partial = cache / f".{name}.{os.getpid()}.partial"  # other jobs on this machine may copy it, too
            (folder / name).copy(partial, overwrite=True)
            partial.replace(cache / name)
    return [str(cache / name) for name in names]


def _is_local(path: epath.Path) -> bool:
    return "://" not in str(path)
