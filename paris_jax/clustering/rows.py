"""Features of clips as rows for k-means: standardised, in canonical order, in memory or in a file on disk."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from etils import epath

from paris_jax.clustering import kmeans

# A feature that varies less than this over the clips carries no information; standardising it would amplify noise.
SMALLEST_SPREAD = 1e-6


class FeatureFile:
    """Features (N, F) float32 in a local file; rows are read where they are asked for, and nothing stays mapped."""

    def __init__(self, path: epath.PathLike, shape: tuple[int, int]):
        self.path, self.shape = str(path), shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        # Mapped anew each time: pages of an open map would count as memory of this process.
        return np.asarray(np.memmap(self.path, np.float32, "r", shape=self.shape)[rows])


@dataclasses.dataclass(frozen=True)
class Rows:
    """Standardised rows in a given order; a slice is (n, F) float32.

    Attributes:
      features: (M, F) float32, all clips, in memory or a `FeatureFile`.
      order: (N,) the clips that count, in the order of the rows.
      mean, spread: (F,) float32 of these clips.
    """

    features: np.ndarray | FeatureFile
    order: np.ndarray
    mean: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray | FeatureFile, order: np.ndarray) -> "Rows":
        """Measures mean and spread of the clips of `order` in one pass, relative to the first one."""
        first = np.asarray(features[order[:1]], np.float64)[0]
        total, square = np.zeros(len(first)), np.zeros(len(first))
        for begin in range(0, len(order), kmeans.BLOCK_ROWS):
            rows = features[order[begin : begin + kmeans.BLOCK_ROWS]].astype(np.float64) - first
            total, square = total + rows.sum(axis=0), square + (rows**2).sum(axis=0)
        mean = total / len(order)
        spread = np.sqrt(np.maximum(square / len(order) - mean**2, 0.0)).astype(np.float32)
        spread[spread < SMALLEST_SPREAD] = 1.0
        return cls(features, order, (first + mean).astype(np.float32), spread)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, part: slice) -> np.ndarray:
        return ((self.features[self.order[part]] - self.mean) / self.spread).astype(np.float32)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows, block by block, with their positions in the order."""
        for begin in range(0, len(self), kmeans.BLOCK_ROWS):
            part = slice(begin, min(begin + kmeans.BLOCK_ROWS, len(self)))
            yield part, self[part]
