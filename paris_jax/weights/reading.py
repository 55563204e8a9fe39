"""Reading an encoder's tensors by name: what is missing, extra or of another shape is told all at once."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from paris_jax import manifest
from paris_jax.errors import Refused
from paris_jax.weights.files import Tensors


class Reader:
    """Takes tensors from files, notes what it took, and says at the end what does not fit."""

    def __init__(self, tensors: Tensors):
        self._tensors, self._taken, self._problems = tensors, set(), []

    def has(self, name: str) -> bool:
        return name in self._tensors.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape; () where it is missing, which `done` tells."""
        return self._tensors.shapes[name][0] if self.has(name) else ()

    def count(self, prefix: str) -> int:
        """How many numbered modules there are behind a prefix: 12 for "encoder.layer." and its layers 0 to 11."""
        names = [name.removeprefix(prefix) for name in self._tensors.shapes if name.startswith(prefix)]
        return len({name.split(".")[0] for name in names})

    def take(self, name: str, shape: Sequence[int] | None = None) -> np.ndarray:
        """One tensor as float32."""
        self._taken.add(name)
        if not self.has(name):
            self._problems.append(f"{name} is missing")
            return np.zeros(shape or (1,), np.float32)
        if shape is not None and self.shape(name) != tuple(shape):
            self._problems.append(f"{name} has shape {self.shape(name)} instead of {tuple(shape)}")
            return np.zeros(shape, np.float32)
        values = self._tensors.read(name).astype(np.float32)
        if not np.isfinite(values).all():
            self._problems.append(f"{name} holds values that are not finite")
        return values

    def layer(self, name: str, outputs: int, *inputs: int, bias: bool = True) -> dict[str, np.ndarray]:
        """Weight (outputs, *inputs), and bias (outputs,) where it has one."""
        found = {"weight": self.take(f"{name}.weight", (outputs, *inputs))}
        return found | ({"bias": self.take(f"{name}.bias", (outputs,))} if bias else {})

    def done(self, unused: Sequence[str] = ()) -> None:
        """Refuses what does not fit; tensors whose names begin as in `unused` may be there and are left."""
        left = sorted(self._tensors.shapes.keys() - self._taken)
        self._problems += [f"{name} is extra" for name in left if not name.startswith(tuple(unused))]
        if self._problems:
            where, count = self._tensors.files[0].parent, len(self._problems)
            raise Refused(f"{where} is refused, {count} of its tensors do not fit: {'; '.join(self._problems)}")


def stacked(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Layers of nested weights as one, every array with a leading layer axis."""
    first = layers[0]
    return {
        name: stacked([layer[name] for layer in layers])
        if isinstance(first[name], dict)
        else np.stack([layer[name] for layer in layers])
        for name in first
    }


def described(folder: epath.PathLike, *fields: str) -> dict[str, Any]:
    """Fields of a published folder's config.json; refuses a folder without it, or one that lacks a field."""
    path = epath.Path(folder) / "config.json"
    if not path.exists():
        raise Refused(
            f"{path} does not exist; name the folder that the weights were downloaded to, config.json included"
        )
    found = manifest.read_json(path, "download it again")
    absent = [name for name in fields if not isinstance(found, dict) or name not in found]
    if absent or not isinstance(found, dict):
        raise Refused(f"{path} lacks {', '.join(absent) or 'fields'}; download it again")
    return found
