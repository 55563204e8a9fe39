"""Arrays of pickles, PyTorch archives and flax's msgpack files, read without executing anything in them.

A pickle is a program that calls the functions it names. This unpickler knows the few names that build arrays and maps
each to a plain class of this module; any other name raises an error before it is looked up.
"""

import contextlib
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from paris_jax.artifacts import safe_files
from paris_jax.artifacts.tensors import ENDING, Tensors
from paris_jax.errors import UserError, first_line

MAX_BYTES = 4 << 30  # of a file
MAX_DEPTH = 32  # of nested dictionaries and modules
_NUMPY_DTYPES = frozenset(f"{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)) - {"f1"} | {"b1"}
_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_DAMAGES = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError),
    *(ImportError, MemoryError, RecursionError, struct.error, zipfile.BadZipFile, NotImplementedError),
)


def read_arrays(path: epath.PathLike) -> dict[str, np.ndarray]:
    """All arrays of a file of weights by name; names of nested levels are joined by "/", in PyTorch's files by ".".

    Args:
      path: a safetensors file, a pickle of NumPy arrays, a PyTorch archive (state dictionary or TorchScript), or a
        msgpack file of flax.

    Raises:
      UserError: another kind of file, one that is damaged, or one that names anything but arrays.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; name the file with the downloaded weights")
    if path.name.endswith(ENDING):
        tensors = Tensors(path)
        return {name: tensors.read(name) for name in tensors.shapes}
    data = safe_files.read_bytes(path, MAX_BYTES, follow_links=True)
    with _damages_told(path):
        if data.startswith(b"PK\x03\x04"):
            return _of_torch(data, path)
        if data.startswith(b"\x80") and data[1:2] <= b"\x05":
            return dict(_flatten(_of_numpy(data, path), "/"))
        return dict(_flatten(_of_msgpack(data), "/"))


@contextlib.contextmanager
def _damages_told(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGES as error:
        raise UserError(
            f"{path} is not a whole file of weights ({first_line(error)[:120]}); download it again"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Builds the classes of this module and raises UserError for every other name."""

    def __init__(self, data: bytes, names: Mapping[tuple[str, str], Any], path: epath.Path, storages: Any = None):
        super().__init__(io.BytesIO(data))
        self._names, self._path, self._storages = names, path, storages

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__" and self._storages is not None:
            return _Module
        if (module, name) not in self._names:
            raise UserError(
                f"{self._path} cannot be loaded: besides arrays, it names {f'{module}.{name}'[:100]!r}, "
                "which reading it would run; get the weights as safetensors"
            )
        return self._names[module, name]

    def persistent_load(self, pid: Any) -> "_Storage":
        if self._storages is None:
            raise pickle.UnpicklingError("it refers to data outside itself")
        return self._storages(pid)


# NumPy


class _Dtype:
    """Stands for `numpy.dtype(code, align, copy)`."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, align: Any = None, copy: Any = None):
        if code not in _NUMPY_DTYPES:
            raise ValueError(f"an array has dtype {code!r}")
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]
        if self.order not in ("<", ">", "|", "="):
            raise ValueError(f"an array has byte order {self.order!r}")


class _Array:
    """Stands for `numpy._core.multiarray._reconstruct(numpy.ndarray, (0,), b"b")`."""

    __slots__ = ("values",)

    def __init__(self, kind: Any, shape: Any, code: Any):
        self.values: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        values = np.frombuffer(data, np.dtype(dtype.order + dtype.code))
        self.values = values.reshape(tuple(shape), order="F" if is_fortran else "C")


_NUMPY = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): "numpy.ndarray",  # an argument of the above, and nothing that could be called
    ("numpy", "dtype"): _Dtype,
}


def _of_numpy(data: bytes, path: epath.Path) -> Any:
    found = _Unpickler(data, _NUMPY, path).load()
    if isinstance(found, int):
        raise UserError(f"{path} is a PyTorch file from before version 1.6; save its tensors again, as safetensors")
    return found


# PyTorch


class _Storage:
    """The bytes of one storage of an archive, as a flat array."""

    __slots__ = ("values",)

    def __init__(self, values: np.ndarray):
        self.values = values


class _Tensor:
    """Stands for `torch._utils._rebuild_tensor_v2`: a view of a storage, all of it inside that storage."""

    __slots__ = ("values",)

    def __init__(self, storage: _Storage, offset: int, size: Any, stride: Any, *rest: Any):
        flat, size, stride = storage.values, tuple(map(int, size)), tuple(map(int, stride))
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        is_empty = math.prod(size) == 0
        if not is_empty and (min((offset, *size, *stride)) < 0 or last >= flat.size or math.prod(size) > flat.size):
            raise ValueError("a tensor reaches beyond its storage")
        if is_empty:
            self.values = np.empty(size, flat.dtype)
        else:
            strides = tuple(s * flat.itemsize for s in stride)
            self.values = np.lib.stride_tricks.as_strided(flat[offset:], size, strides, writeable=False)


class _Parameter:
    """Stands for `torch._utils._rebuild_parameter`."""

    __slots__ = ("values",)

    def __init__(self, data: _Tensor, *rest: Any):
        self.values = data.values


class _Module:
    """Stands for a module of TorchScript: its attributes."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Ordered(dict):
    """Stands for `collections.OrderedDict`; the attributes that a state dictionary has beside its items are left."""

    def __setstate__(self, state: Any) -> None:
        del state


class _Other:
    """Stands for values that are no tensors, such as typed lists and devices."""

    __slots__ = ()

    def __init__(self, *values: Any):
        del values


_TORCH: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _Parameter,
    ("collections", "OrderedDict"): _Ordered,
    ("torch", "device"): _Other,
    **{("torch", name): name for name in _STORAGES},
    **{("torch.jit._pickle", f"build_{kind}list"): _Other for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _Other,
}


def _of_torch(data: bytes, path: epath.Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        root = next((name.removesuffix("/data.pkl") for name in entries if name.endswith("/data.pkl")), None)
        if root is None:
            raise ValueError("it is an archive without data.pkl, which PyTorch's files have")

        def content(name: str) -> bytes:
            entry = entries[f"{root}/{name}"]
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
                raise ValueError("it has compressed entries, which PyTorch's files do not have")
            return archive.read(entry)

        if f"{root}/byteorder" in entries and content("byteorder") != b"little":
            raise ValueError("its numbers are not little-endian")
        storages: dict[str, _Storage] = {}

        def storage(pid: Any) -> _Storage:
            kind, name, key, _, count = pid
            if kind != "storage" or name not in _STORAGES or not str(key).isalnum():
                raise ValueError("it refers to something else than a storage")
            if key not in storages:
                values = np.frombuffer(content(f"data/{key}"), _STORAGES[name])
                storages[key] = _Storage(values[: int(count)])
            return storages[key]

        found = _Unpickler(content("data.pkl"), _TORCH, path, storage).load()
    return dict(_flatten(found, "."))


# flax


def _of_msgpack(data: bytes) -> Any:
    import flax.serialization  # msgpack's extension types of it are bytes of arrays, and call nothing

    found = flax.serialization.msgpack_restore(data)
    if not isinstance(found, dict):
        raise ValueError("it is no pickle of NumPy arrays, PyTorch archive, or msgpack file of flax")
    return found


def _flatten(tree: Any, separator: str, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of nested dictionaries and modules, with their names; values that are no arrays are left out."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    if isinstance(tree, _Module):
        tree = tree.attributes
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flatten(value, separator, f"{prefix}{separator}{name}" if prefix else str(name), depth + 1)
    elif isinstance(tree, _Array | _Tensor | _Parameter) and tree.values is not None:
        yield prefix, tree.values
    elif isinstance(tree, np.ndarray):
        yield prefix, tree
