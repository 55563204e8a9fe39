"""The safetensors files of one network of ours: a single one, or shards with an index where they are large.

    model.safetensors                         up to `SHARD_BYTES` of tensors
    model-00001-of-00003.safetensors, ...     more than that, with model.safetensors.index.json, as Hugging Face has it

Tensors are read into place one after the other, and hashed as they are read: what is used is what was hashed, and the
host needs the memory of the network alone.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import msgspec
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest, safe_files, tensors
from paris_jax.artifacts.schemas import FileEntry, TensorEntry, TensorsIndex
from paris_jax.artifacts.tensors import Shapes
from paris_jax.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # of tensors in one file; a larger tensor has a file of its own
HEADER_BYTES = 16 << 20  # of a safetensors file, at most
BLOCK = 4 << 20  # bytes that are read at once
REMEDY = "copy it again from its origin"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def write(
    folder: epath.PathLike, shapes: Shapes, chunks: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Writes the tensors of a network, and deletes weight files of an earlier one.

    Args:
      shapes: name -> (shape, dtype), in the order of the files.
      chunks: name and values, in that order; a tensor may come in several pieces along its first axis.
      shard_bytes: bytes of tensors in one file, at most, unless a single tensor has more.

    Returns:
      The names of the files, for the manifest.
    """
    folder, shards = epath.Path(folder), _shards(shapes, shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else [shard_name(i, len(shards)) for i in range(len(shards))]
    chunks = iter(chunks)
    for name, shard in zip(names, shards, strict=True):
        elements = sum(math.prod(shape) for shape, _ in shard.values())
        tensors.write(folder / name, shard, _take(chunks, elements))
    if (left := next(chunks, None)) is not None:
        raise ValueError(f"{left[0]} does not follow, or is too large")
    if len(shards) > 1:
        total = sum(_bytes(*described) for described in shapes.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        manifest.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        names = [*names, INDEX]
    for path in list(folder.iterdir()):
        if is_weight_file(path.name) and path.name not in names:
            path.unlink()
    return names


def shard_name(number: int, count: int) -> str:
    """The name of a shard, numbered from 0."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def is_weight_file(name: str) -> bool:
    return name in (WEIGHTS, INDEX) or bool(_SHARD.fullmatch(name))


def location(folder: epath.Path, files: Iterable[str]) -> epath.Path:
    """The file that `tensors.Tensors` opens: the single file of a network, or its index."""
    return folder / (INDEX if INDEX in files else WEIGHTS)


def check_names(folder: epath.Path, files: Mapping[str, FileEntry]) -> list[str]:
    """The safetensors files among a manifest's, in order.

    Raises:
      UserError: anything but one file, or an index with all its shards.
    """
    if files.keys() == {WEIGHTS}:
        return [WEIGHTS]
    shards = sorted(name for name in files if _SHARD.fullmatch(name))
    expected = [shard_name(i, len(shards)) for i in range(len(shards))]
    if len(shards) < 2 or shards != expected or files.keys() != {*shards, INDEX}:
        raise UserError(
            f"{folder}: its manifest must name {WEIGHTS} and no other file, or {INDEX} and all of its shards; {REMEDY}"
        )
    return shards


def describe(files: Mapping[str, FileEntry]) -> str:
    """The files, for a table of checks."""
    return WEIGHTS if INDEX not in files else f"{INDEX} and {len(files) - 1} shards"


class WeightFiles:
    """The weights in a folder, opened for one pass that checks and reads them.

    Args:
      folder: of the files.
      files: their sizes and hashes, as the manifest promises them.
      limit: bytes of tensors, at most.

    Raises:
      UserError: files that no manifest may name, or more bytes than `limit` and the headers.
    """

    def __init__(self, folder: epath.Path, files: Mapping[str, FileEntry], limit: int):
        self._folder, self._files = folder, files
        self.names = check_names(folder, files)
        total, largest = sum(files[name].bytes for name in self.names), limit + HEADER_BYTES * len(self.names)
        if total > largest:
            raise UserError(f"{folder / self.names[0]} is larger than its network, {largest:,} bytes at most; {REMEDY}")

    @property
    def path(self) -> epath.Path:
        """The name of the file in errors."""
        return location(self._folder, self._files)

    def describe_hashes(self) -> str:
        """The hashes of the files, in short, for a table of checks."""
        return "sha256 " + ", ".join(entry.sha256[:12] for entry in self._files.values())

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> (shape, dtype) of every tensor, from headers that are checked against each other and the index.

        Raises:
          UserError: a header or an index that is not sane; shards that overlap or miss tensors.
        """
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        holder: dict[str, str] = {}
        total = 0
        for name in self.names:
            for tensor, entry in self._header(name).items():
                if tensor in found:
                    raise UserError(f"{self._folder}: {holder[tensor]} and {name} both hold {tensor[:200]}; {REMEDY}")
                found[tensor], holder[tensor] = (entry.shape, _NAMES.get(entry.dtype, entry.dtype)), name
                total += entry.data_offsets[1] - entry.data_offsets[0]
        if INDEX in self._files:
            self._check_index(holder, total)
        return found

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields every tensor once, after `shapes`; the hash of each file is compared behind its last tensor.

        The tensors must not be used before the iterator ends.

        Raises:
          UserError: a file of another hash, or another size, than the manifest promises.
        """
        for name in self.names:
            path, digest = self._folder / name, hashlib.sha256()
            header = self._header(name)
            safe_files.check_regular(path)
            with path.open("rb") as file:
                begin = file.read(8)
                begin += file.read(min(int.from_bytes(begin, "little"), HEADER_BYTES))
                digest.update(begin)
                if _decode(begin[8:], path) != header:
                    raise UserError(f"{path} changed while it was read; {REMEDY}")
                for tensor, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
                    array = np.empty(entry.shape, tensors.DTYPES[entry.dtype])
                    _read_into(file, array, digest, path)
                    yield tensor, array
                digest.update(file.read(1))  # a file that grew has another hash
            manifest.check_hash(path, digest.hexdigest(), self._files[name])
        if INDEX in self._files:
            manifest.check_file(self._folder / INDEX, self._files[INDEX], contents=True)

    def check_hashes(self) -> None:
        """Raises UserError for a file that was altered; for files whose contents make no sense."""
        for name, entry in self._files.items():
            manifest.check_file(self._folder / name, entry, contents=True)

    def _header(self, name: str) -> dict[str, TensorEntry]:
        """The header of a file: the tensors must fill the rest of the file, without gaps or overlaps."""
        path = self._folder / name
        size = safe_files.check_regular(path)
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_BYTES, size - 8):
                raise UserError(f"{path} is not a readable safetensors file (a header of {length:,} bytes); {REMEDY}")
            header = _decode(file.read(length), path)
        end = 0
        for tensor, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
            start, stop = entry.data_offsets
            width = tensors.BITS.get(entry.dtype)
            if start != end or width is None or stop - start != math.prod(entry.shape) * width // 8:
                raise UserError(
                    f"{path} is not a readable safetensors file ({tensor[:200]} has bytes {start} to {stop} for "
                    f"{entry.dtype[:20]} of shape {entry.shape}); {REMEDY}"
                )
            end = stop
        if end != size - 8 - length:
            raise UserError(
                f"{path} is not a readable safetensors file ({size - 8 - length:,} bytes of tensors instead of "
                f"{end:,}); {REMEDY}"
            )
        return header

    def _check_index(self, holder: Mapping[str, str], total: int) -> None:
        """Compares the index with the tensors of the shards."""
        path = self._folder / INDEX
        index = manifest.read_json(path, TensorsIndex, REMEDY)
        outside = sorted(set(index.weight_map.values()) - set(self.names))
        if outside:
            raise UserError(f"{path} names {outside[0][:100]!r}, which is no shard of its manifest; {REMEDY}")
        wrong = sorted(n for n in index.weight_map.keys() | holder.keys() if index.weight_map.get(n) != holder.get(n))
        if wrong:
            where, really = index.weight_map.get(wrong[0], "nowhere"), holder.get(wrong[0], "nowhere")
            raise UserError(f"{path} has {wrong[0][:200]} in {where}, and it is in {really}; {REMEDY}")
        if (index.metadata or {}).get("total_size") != total:
            said = str((index.metadata or {}).get("total_size"))[:30]
            raise UserError(f"{path} promises a total_size of {said} bytes, its shards hold {total:,}; {REMEDY}")


def _decode(data: bytes, path: epath.Path) -> dict[str, TensorEntry]:
    """The tensors that a safetensors header names."""
    unreadable = f"{path} is not a readable safetensors file"
    try:
        entries = msgspec.json.decode(data, type=dict[str, Any])
        entries.pop("__metadata__", None)
        return msgspec.convert(entries, dict[str, TensorEntry])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{unreadable} ({str(error)[:200]}); {REMEDY}") from error


def _read_into(file: IO[bytes], array: np.ndarray, digest: Any, path: epath.Path) -> None:
    """Fills an array from a file, block by block, and the hash with it."""
    left = array.reshape(-1).view(np.uint8).data
    while left:
        block = file.read(min(BLOCK, len(left)))
        if not block:
            raise UserError(f"{path} changed while it was read; {REMEDY}")
        digest.update(block)
        left[: len(block)] = block
        left = left[len(block) :]


def _bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _shards(shapes: Shapes, limit: int) -> list[dict[str, tuple[tuple[int, ...], np.dtype]]]:
    """The tensors in order, cut before each that would make a file larger than `limit`."""
    shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
    filled = 0
    for name, (shape, dtype) in shapes.items():
        size = _bytes(shape, dtype)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = shape, dtype
        filled += size
    return shards


def _take(chunks: Iterator[tuple[str, np.ndarray]], elements: int) -> Iterator[tuple[str, np.ndarray]]:
    """The next chunks, of so many values together."""
    while elements > 0 and (chunk := next(chunks, None)) is not None:
        yield chunk
        elements -= chunk[1].size
