"""Intermediate results of an evaluation on disk, from which an interrupted one resumes."""

from collections.abc import Callable

import numpy as np
import safetensors.numpy
from etils import epath

from paris_jax.artifacts import manifest


class ResultCache:
    """Cache of arrays on disk, from which an interrupted evaluation of the same hash resumes."""

    def __init__(self, folder: epath.Path, key: str):
        self._folder, self._key = folder, key

    def get(self, name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        path = self._folder / f"{name}-{self._key[:16]}.safetensors"
        if not path.exists():
            # A file under its final name is complete, because it is written under another name and renamed.
            manifest.write_atomically(path, safetensors.numpy.save(make()))
        return safetensors.numpy.load(path.read_bytes())

    def clear(self) -> None:
        """Deletes all of it, that of other hashes too."""
        if self._folder.exists():
            self._folder.rmtree()
