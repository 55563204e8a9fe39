"""The latent cache: reads, writes and copies clips as records in ArrayRecord shards.

A record is encoded as safetensors: its arrays as tensors, its text as JSON metadata. The manifest of a folder lists the
shards (see `read_manifest`); records are numbered across the shards, in order of the shards' names.
"""

import contextlib
import dataclasses
import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
from array_record.python import array_record_data_source
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.safe_files import is_local
from paris_jax.artifacts.schemas import ClusterManifest, DataManifest, HeldoutManifest, RecordsManifest
from paris_jax.artifacts.tensors import loads
from paris_jax.config import hashing
from paris_jax.data import staging
from paris_jax.errors import UserError, first_line

T = TypeVar("T")
ENDING = ".array_record"
TEXT_LENGTHS = "text_lengths.safetensors"  # of a copy: tokens of each record, in order
NULL = "null.safetensors"  # the null text embedding, unless it is zeros
SHARD_SIZE = 512  # records
# Groups of one record, because training reads them in random order. Latents hardly shrink, and Snappy is read in half
# the time of the default compression (docs/benchmarks.md).
WRITER_OPTIONS = "group_size:1,snappy"
MOST_SHARDS = 128  # of a copy: a role reads all shards of all clusters, and each is an open file
READ_AT_ONCE = 64 << 20  # bytes that are copied, of 16 to 1024 records
SPARE_FILES = 256  # that a process has open beside shards
# Required entries of a manifest of records: with them a job runs from its folder alone.
CONTRACT = ("codec", "text", "features", "latent", "text_length", "fps", "source", "cond_images")


@dataclasses.dataclass(frozen=True)
class Record:
    """One clip of the latent cache.

    Attributes:
      id: id of the clip, unique and the same on every machine.
      latent: (T, H, W, C) float16, as encoded by the codec, not normalised.
      tokens: (L, Dt) float16 or bfloat16, text embedding of the caption without padding.
      pooled: (Dp,) of the same dtype, pooled text embedding.
      feature: (F,) float32, input of the clustering.
      caption: the caption's text.
      attributes: ground-truth attributes of the clip; {} if the source provides none.
      cluster: index of the clip's cluster; None before clustering.
      cond_images: (2, H, W, C) float16, the first and the last frame encoded as images; None where not asked for.
    """

    id: str
    latent: np.ndarray
    tokens: np.ndarray
    pooled: np.ndarray
    feature: np.ndarray
    caption: str
    attributes: dict[str, str]
    cluster: int | None = None
    cond_images: np.ndarray | None = None


ARRAYS = ("latent", "tokens", "pooled", "feature", "cond_images")


def encode_record(record: Record) -> bytes:
    """Encodes a record as safetensors bytes; equal records give equal bytes."""
    given = {name: getattr(record, name) for name in ARRAYS}
    arrays = {name: np.ascontiguousarray(array) for name, array in given.items() if array is not None}
    fields = {name: getattr(record, name) for name in ("id", "caption", "attributes", "cluster")}
    # A single metadata entry, because safetensors stores several in no fixed order.
    return safetensors.numpy.save(arrays, metadata={"record": hashing.canonical_json(fields)})


def decode_record(data: bytes) -> Record:
    """Decodes the bytes of `encode_record`."""
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["record"])
    arrays: dict[str, Any] = loads(data)
    return Record(**fields, **arrays)


# How `encode_record` writes a cluster that is not known yet; quotes inside captions and ids are escaped once more.
_NO_CLUSTER = rb",\"cluster\":null,\"id\":\""


def with_cluster(data: bytes, cluster: int) -> bytes:
    """The encoded record with another cluster, as `encode_record` would write it; copies arrays as they are."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if header.count(_NO_CLUSTER) != 1:  # it has a cluster already
        return encode_record(dataclasses.replace(decode_record(data), cluster=cluster))
    header = header.rstrip(b" ").replace(_NO_CLUSTER, _NO_CLUSTER.replace(b"null", str(cluster).encode()))
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def text_length_of(data: bytes) -> int:
    """The number of text tokens of an encoded record, from its header alone."""
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    return json.loads(header)["tokens"]["shape"][0]


def shard_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05d}-of-{count:05d}{ENDING}"


def write_shard(path: epath.PathLike, records: Iterable[Record | bytes]) -> None:
    """Writes a shard under a partial name, then renames it: a shard that exists is complete.

    Raises:
      UserError: the shard cannot be written, for example because the disk is full.
    """
    path = epath.Path(path)
    with tempfile.TemporaryDirectory() as scratch:
        # ArrayRecord writes local files only; a bucket gets the finished copy.
        local = manifest.partial_path(path) if is_local(path) else epath.Path(scratch) / path.name
        try:
            with _write_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = ArrayRecordWriter(str(local), WRITER_OPTIONS)
            with contextlib.closing(_Closing(writer, path)):
                for record in records:
                    data = record if isinstance(record, bytes) else encode_record(record)
                    with _write_errors(path):
                        writer.write(data)
            with _write_errors(path):
                if is_local(path):
                    local.replace(path)
                else:
                    local.copy(path, overwrite=True)
        except BaseException:
            local.unlink(missing_ok=True)
            raise


@dataclasses.dataclass(frozen=True)
class _Closing:
    """Closes a writer and raises UserError if its last writes fail."""

    writer: Any
    path: epath.Path

    def close(self) -> None:
        with _write_errors(self.path):
            self.writer.close()


@contextlib.contextmanager
def _write_errors(path: epath.Path) -> Iterator[None]:
    """Raises UserError for a failed write, which ArrayRecord reports as RuntimeError or ValueError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"Cannot write {path} ({error}); free some space or choose another --workdir, "
            "then run the same command again"
        ) from error


def read_manifest(folder: epath.PathLike) -> RecordsManifest:
    """Reads the manifest of a folder of records (data, cluster or held-out split).

    Raises:
      UserError: the manifest is missing or of another kind, or a shard is missing.
    """
    schemas = {manifest.kind(schema): schema for schema in (DataManifest, ClusterManifest, HeldoutManifest)}
    kind = manifest.read_kind(folder)
    if kind and kind not in schemas:
        path = epath.Path(folder) / manifest.FILE_NAME
        raise UserError(f"{path} describes a {kind!r}, where one of {', '.join(schemas)} is expected")
    return manifest.read(folder, schemas.get(kind, DataManifest))


def data_contract(source: RecordsManifest) -> dict[str, Any]:
    """Returns the manifest entries that the manifest of every copy of these records must repeat."""
    return {name: getattr(source, name) for name in CONTRACT}


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
        return self.read(int(index) + (len(self) if index < 0 else 0), decode_record)

    def read(self, position: int, decode: Callable[[bytes], T]) -> T:
        """A record as `decode` makes it of its bytes."""
        if not 0 <= position < len(self):
            raise IndexError(f"record {position} of {len(self)}")
        try:
            return decode(self._source[position])
        except Exception as error:  # ArrayRecord raises RuntimeError or ValueError, safetensors an error of its own
            path, number = self._shard_of(position)
            raise _damaged(f"{path}: record {number}", error) from error

    def read_many(self, positions: Sequence[int]) -> list[bytes]:
        """Encoded records, read by several threads: alone, each would wait for the disk or the network."""
        try:
            return list(self._source.__getitems__(positions))
        except Exception:  # found again one by one, so that the error names the damaged record
            return [self.read(position, bytes) for position in positions]

    def _shard_of(self, position: int) -> tuple[str, int]:
        """Returns the shard that holds a record, and the record's index in that shard."""
        for path in self._paths:
            count = len(_open([path]))
            if position < count:
                return path, position
            position -= count
        raise IndexError(position)

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def _open(paths: Sequence[str]) -> Any:
    """Opens shards as one sequence of encoded records; reads only their index."""
    _allow_open_files(len(paths))
    try:
        source = array_record_data_source.ArrayRecordDataSource(paths)
        len(source)
    except (RuntimeError, ValueError) as error:
        if len(paths) > 1:
            for path in paths:
                _open([path])
        raise _damaged(paths[0] if paths else "No shard", error) from error
    return source


def _allow_open_files(count: int) -> None:
    """Raises the limit of open files where readers of so many shards need it."""
    needed, (soft, hard) = count + SPARE_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed <= soft or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"{count} shards are more than the {hard} files that a process may open here; raise the limit (ulimit -n "
            f"{needed}, or LimitNOFILE of the service)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _damaged(what: str, error: Exception) -> UserError:
    return UserError(
        f"{what} cannot be read ({first_line(error)[:200]}); copy the file again from its origin, or delete its folder "
        "and rerun the command that wrote it"
    )


def read_shard(path: epath.PathLike) -> Iterator[Record]:
    """Yields the records of one local shard."""
    source = _open([os.fspath(path)])
    return (decode_record(source[index]) for index in range(len(source)))


def read_records(folder: epath.PathLike | Sequence[epath.PathLike]) -> Records:
    """Returns the records of a finished folder (or of several, in the order given) as a lazy sequence."""
    return Records(folder)


def copy_records(
    source: epath.PathLike | Sequence[epath.PathLike],
    indices: Sequence[int] | np.ndarray,
    clusters: Sequence[int] | np.ndarray,
    out: epath.PathLike,
    shard_size: int | None = None,
    stem: str = "clips",
) -> list[str]:
    """Copies the selected records into new shards and sets their clusters; writes no manifest.

    The lengths of their texts are written beside them (`read_text_lengths`).

    Args:
      source: folder or folders of records.
      indices: indices of the records to copy, in output order.
      clusters: cluster of each copied record.
      out: output folder; write its manifest (with `data_contract`) afterwards.
      shard_size: maximum number of records per shard; by default SHARD_SIZE, or more where there would be more than
        MOST_SHARDS shards.
      stem: prefix of the shards' names.

    Returns:
      The names of the files.
    """
    if len(indices) != len(clusters):
        raise ValueError(f"{len(indices)} indices and {len(clusters)} clusters: the numbers must be equal")
    records, out = Records(source), epath.Path(out)
    shard_size = shard_size or max(SHARD_SIZE, -(-len(indices) // MOST_SHARDS))
    count = max(1, -(-len(indices) // shard_size))
    names = [shard_name(stem, number, count) for number in range(count)]
    lengths: list[int] = []

    def copied(chosen: slice) -> Iterator[bytes]:
        numbers, labels = np.asarray(indices[chosen]).tolist(), np.asarray(clusters[chosen]).tolist()
        step = min(max(READ_AT_ONCE // len(records.read(numbers[0], bytes)), 16), 1024) if numbers else 1
        for begin in range(0, len(numbers), step):
            some = slice(begin, begin + step)
            for data, cluster in zip(records.read_many(numbers[some]), labels[some], strict=True):
                lengths.append(text_length_of(data))
                yield with_cluster(data, cluster)

    for number, name in enumerate(names):
        write_shard(out / name, copied(slice(number * shard_size, (number + 1) * shard_size)))
    lengths_file = safetensors.numpy.save({"lengths": np.asarray(lengths, np.uint16)})
    manifest.write_atomically(out / TEXT_LENGTHS, lengths_file)
    return [*names, TEXT_LENGTHS]


def read_text_lengths(folder: epath.PathLike) -> np.ndarray:
    """The number of text tokens (N,) uint16 of each record of a folder that `copy_records` wrote, in order.

    Raises:
      UserError: an earlier version wrote the folder.
    """
    folder = epath.Path(folder)
    if TEXT_LENGTHS not in read_manifest(folder).files:
        raise UserError(
            f"{folder} does not say how long its texts are, because an earlier version wrote it; cluster again in a "
            "new --workdir, or set config.training.text_buckets=1"
        )
    return safetensors.numpy.load((folder / TEXT_LENGTHS).read_bytes())["lengths"]


def write_null(folder: epath.PathLike, tokens: np.ndarray, pooled: np.ndarray) -> list[str]:
    """Writes the null text embedding, tokens (L, Dt) and pooled (Dp,), unless it is one token of zeros.

    Returns:
      A list of the file's name; empty if no file is needed.
    """
    if len(tokens) == 1 and not tokens.any() and not pooled.any():
        return []
    data = safetensors.numpy.save({"tokens": tokens, "pooled": pooled})
    manifest.write_atomically(epath.Path(folder) / NULL, data)
    return [NULL]


def read_null(folder: epath.PathLike) -> dict[str, np.ndarray]:
    """Reads the null text embedding that `write_null` wrote, as "tokens" and "pooled"; {} without a file."""
    path = epath.Path(folder) / NULL
    return loads(path.read_bytes()) if NULL in read_manifest(folder).files else {}


def _shards(folder: epath.Path) -> list[str]:
    """Returns local paths of a folder's shards; shards in a bucket are first copied to this machine."""
    files = read_manifest(folder).files
    names = sorted(name for name in files if name.endswith(ENDING))
    if is_local(folder):
        return [str(folder / name) for name in names]
    return staging.stage(folder, {name: files[name].bytes for name in names})
