"""Safetensors files, read and written tensor by tensor, so that no whole network has to fit in memory.

Nothing is unpickled: files of other kinds raise an error.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from paris_jax.artifacts import manifest, safe_files
from paris_jax.artifacts.schemas import TensorsIndex
from paris_jax.errors import UserError, first_line

ENDING, INDEX = ".safetensors", ".safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16}
BITS |= {"I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64}  # of every dtype that a header may name
_CODES = {dtype: code for code, dtype in DTYPES.items()}
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # name -> (shape, dtype)


class Tensors:
    """Tensors of one or several safetensors files by name; read lazily.

    Attributes:
      shapes: name -> (shape, dtype) of every tensor; of one that is not of floats, and cannot be read, what it says.
      files: the files, in the order in which they were found.
    """

    def __init__(self, paths: epath.PathLike | Sequence[epath.PathLike]):
        """Opens files, folders of them, or the index of a network in several files.

        Raises:
          UserError: a file that is missing, cut, of another kind, or holds a tensor that another one holds, too.
        """
        given: Any = paths if isinstance(paths, list | tuple) else [paths]
        self.files = [file for path in given for file in _found(epath.Path(path))]
        self._handles: dict[str, Any] = {}
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
        for file in self.files:
            handle = _opened(file)
            for name in sorted(handle.keys()):
                if name in shapes:
                    raise UserError(f"{file} and another file both hold {name}; give the files of one network")
                piece = handle.get_slice(name)
                kind = piece.get_dtype()
                shapes[name] = tuple(piece.get_shape()), DTYPES.get(kind, kind)
                self._handles[name] = handle
        self.shapes: Shapes = shapes

    def read(self, name: str, index: Any = ...) -> np.ndarray:
        """A tensor, or a part of it: `index` as of an array, slices and whole numbers."""
        kind = self.shapes[name][1]
        if kind not in _CODES:
            raise UserError(f"{self.files[0].parent}: {name} has dtype {kind}; must be one of {', '.join(DTYPES)}")
        if index is ...:
            return self._handles[name].get_tensor(name)
        return self._handles[name].get_slice(name)[index]


def loads(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file in memory, bfloat16 included, which `safetensors.numpy` does not read."""
    dtypes = DTYPES | {"F64": np.dtype(np.float64)}
    return {
        name: np.frombuffer(entry["data"], dtypes[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(data)
    }


def _found(path: epath.Path) -> list[epath.Path]:
    """The safetensors files that a path stands for."""
    if not safe_files.is_local(path):
        raise UserError(f"{path}: weights are read from this machine's disks; copy them here first")
    if not path.exists():
        raise UserError(f"{path} does not exist; name a {ENDING} file, an index ({INDEX}), or a folder of them")
    if path.is_dir():
        indices = [p for p in path.iterdir() if p.name.endswith(INDEX)]
        inside = indices[:1] or sorted(p for p in path.iterdir() if p.name.endswith(ENDING))
        if not inside:
            raise UserError(f"{path} holds no {ENDING} file; name the folder that the weights were downloaded to")
        return [file for p in inside for file in _found(p)]
    if path.name.endswith(INDEX):
        names = set(manifest.read_json(path, TensorsIndex, "download it again").weight_map.values())
        if outside := sorted(name for name in names if not safe_files.is_plain(name) or "/" in name):
            raise UserError(f"{path} names {outside[0][:100]!r}: must be a file beside it; download it again")
        return [file for name in sorted(names) for file in _found(path.parent / name)]
    if not path.name.endswith(ENDING):
        raise UserError(f"{path} is not a {ENDING} file, the only kind that is read; look for one at its publisher's")
    return [path]


def _opened(path: epath.Path) -> Any:
    try:
        return safetensors.safe_open(str(path), "np")
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        reason = first_line(error)[:120]
        raise UserError(f"{path} is not a whole safetensors file ({reason}); download it again") from error


def write(path: epath.PathLike, shapes: Shapes, chunks: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a safetensors file of these tensors, atomically.

    Args:
      shapes: shape and dtype of each tensor of the file, in order.
      chunks: name and values, in that order; a tensor may come in several pieces along its first axis.
    """
    path = epath.Path(path)
    header, start = {}, 0
    for name, (shape, dtype) in shapes.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = manifest.partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, values in _in_order(shapes, chunks):
                array = np.ascontiguousarray(values, shapes[name][1])
                file.write(array.reshape(-1).view(np.uint8).data)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _in_order(shapes: Shapes, chunks: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The chunks; raises ValueError where they differ from `shapes`."""
    left = [(name, math.prod(shape)) for name, (shape, _) in shapes.items()]
    for name, values in chunks:
        while left and left[0][1] == 0:
            left.pop(0)
        if not left or left[0][0] != name or values.size > left[0][1]:
            raise ValueError(f"{name} does not follow, or is too large")
        left[0] = name, left[0][1] - values.size
        yield name, values
    if any(count for _, count in left):
        raise ValueError(f"{next(name for name, count in left if count)} is not whole")
