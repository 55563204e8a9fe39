"""Reads an encoder's tensors by name and reports all missing, extra and misshapen tensors at once.

Values are read later, one array at a time (`Later`), so that no whole encoder occupies the host's memory.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest, safe_files
from paris_jax.artifacts.tensors import Tensors
from paris_jax.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Later:
    """A lazily read array of known shape: `read(dtype)` returns its values."""

    shape: tuple[int, ...]
    read: Callable[[Any], np.ndarray]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def then(self, change: Callable[[np.ndarray], np.ndarray]) -> "Later":
        """This array with `change` applied when it is read."""
        return Later(change(np.broadcast_to(0, self.shape)).shape, lambda dtype: change(self.read(dtype)))

    def __getitem__(self, index: Any) -> "Later":
        return self.then(lambda values: values[index])

    def transpose(self, *axes: int) -> "Later":
        return self.then(lambda values: values.transpose(axes))


class Reader:
    """Takes tensors from files and reports all mismatches at the end (`done`)."""

    def __init__(self, tensors: Tensors):
        self._tensors, self._taken, self._problems = tensors, set(), []
        self._where = tensors.files[0].parent

    def has(self, name: str) -> bool:
        return name in self._tensors.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; () if it is missing, which `done` reports."""
        return self._tensors.shapes[name][0] if self.has(name) else ()

    def count(self, prefix: str) -> int:
        """The number of modules after a prefix: 12 for "encoder.layer." with layers 0 to 11."""
        names = [name.removeprefix(prefix) for name in self._tensors.shapes if name.startswith(prefix)]
        return len({name.split(".")[0] for name in names})

    def take(self, name: str, shape: Sequence[int] | None = None) -> Later:
        """A tensor of the given shape."""
        self._taken.add(name)
        if not self.has(name):
            self._problems.append(f"{name} is missing")
        elif shape is not None and self.shape(name) != tuple(shape):
            self._problems.append(f"{name} has shape {self.shape(name)} instead of {tuple(shape)}")
        else:
            shape = self.shape(name)
        return Later(tuple(shape or (1,)), lambda dtype: self._read(name, dtype))

    def _read(self, name: str, dtype: Any) -> np.ndarray:
        values = self._tensors.read(name)
        if not np.isfinite(values).all():
            raise UserError(
                f"{self._where} cannot be loaded: {name} holds values that are not finite; download it again"
            )
        return values.astype(dtype)

    def layer(self, name: str, outputs: int, *inputs: int, bias: bool = True) -> dict[str, Later]:
        """The weight (outputs, *inputs) of a layer, and its bias (outputs,) if it has one."""
        found = {"weight": self.take(f"{name}.weight", (outputs, *inputs))}
        return found | ({"bias": self.take(f"{name}.bias", (outputs,))} if bias else {})

    def done(self, unused: Sequence[str] = ()) -> None:
        """Raises UserError for all mismatches; tensors with a prefix of `unused` are ignored."""
        left = sorted(self._tensors.shapes.keys() - self._taken)
        self._problems += [f"{name} is extra" for name in left if not name.startswith(tuple(unused))]
        if self._problems:
            count, shown = len(self._problems), "; ".join(self._problems)
            raise UserError(f"{self._where} cannot be loaded, {count} of its tensors do not fit: {shown}")


def stacked(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks the nested weights of layers: every array gets a leading layer axis."""
    return jax.tree.map(lambda *each: _stack(each), *layers)


def _stack(layers: Sequence[Later]) -> Later:
    def read(dtype: Any) -> np.ndarray:
        made = np.empty((len(layers), *layers[0].shape), dtype)
        for row, layer in zip(made, layers, strict=True):
            row[...] = layer.read(dtype)
        return made

    return Later((len(layers), *layers[0].shape), read)


def read_config(folder: epath.PathLike, schema: type[T]) -> T:
    """Reads the config.json of a published folder into a structure of the fields that its encoder needs.

    Raises:
      UserError: no such file, or a field that is missing or of another type or range.
    """
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; name the folder with the downloaded weights and config.json")
    return manifest.decode(safe_files.read_bytes(path, follow_links=True), path, schema, "download it again")
