"""Kernel distance of two feature sets: the squared maximum mean discrepancy, unbiased at every number of clips.

With Inception's features of images it is the Kernel Inception Distance (Binkowski et al. 2018, arXiv 1801.01401), with
I3D's of videos the kernel video distance (Unterthiner et al. 2018, arXiv 1812.01717).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.evaluation.estimates import Estimate


def kernel_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with the kernel k(x, y) = (x . y / F + 1)^3.

        d = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    Its mean is the distance of the distributions whatever the number of clips, so it may be below zero for equal ones.

    Args:
      first, second: (N, F) and (M, F) float features, N and M >= 2.
    Raises:
      ValueError: other shapes, or a feature that is not finite.
    """
    return Kernels(first, second)(np.arange(len(first)), np.arange(len(second)))


@dataclasses.dataclass(frozen=True)
class KernelBlocks:
    """The kernel distance of sets too large to keep, accumulated block by block on the devices, in float64.

    The mean of the blocks' unbiased distances is unbiased, too; it is the estimator of the Kernel Inception Distance,
    and has a larger error than `kernel_distance` of all clips at once.

    Attributes:
      count: blocks so far.
      total, squares: sums of their distances, and of the squares.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def update(self, first: Any, second: Any) -> "KernelBlocks":
        """These sums with one more block: features (B, F) of each set, B >= 2, on one device or split over several."""
        with jax.enable_x64(True):
            distance = float(_block_distance(jnp.asarray(first), jnp.asarray(second)))
        return KernelBlocks(self.count + 1, self.total + distance, self.squares + distance**2)

    def estimate(self) -> Estimate:
        """Mean over blocks and its standard error, at least two blocks; n counts blocks."""
        if self.count < 2:
            raise ValueError(f"there are {self.count} blocks: an error needs at least 2")
        value = self.total / self.count
        variance = max(self.squares / self.count - value**2, 0.0) / (self.count - 1)
        return Estimate(value=value, stderr=float(np.sqrt(variance)), n=self.count)


@jax.jit
def _block_distance(first: jax.Array, second: jax.Array) -> jax.Array:
    x, y = first.astype(jnp.float64), second.astype(jnp.float64)

    def kernel(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def of_pairs(gram: jax.Array) -> jax.Array:
        n = len(gram)
        return (gram.sum() - jnp.trace(gram)) / (n * (n - 1))

    return of_pairs(kernel(x, x)) + of_pairs(kernel(y, y)) - 2 * kernel(x, y).mean()


class Kernels:
    """The kernels of all pairs, from which the distance of any subsets is a sum."""

    def __init__(self, first: np.ndarray, second: np.ndarray):
        first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
        if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
            raise ValueError(
                f"features have shapes {first.shape} and {second.shape}: must be (N, F) and (M, F) with N, M >= 2"
            )
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError("features are not finite")
        self.within_first, self.within_second = _kernel(first, first), _kernel(second, second)
        self.between = _kernel(first, second)

    def __call__(self, rows: np.ndarray, columns: np.ndarray) -> float:
        within = _mean_of_pairs(self.within_first, rows) + _mean_of_pairs(self.within_second, columns)
        return float(within - 2 * self.between[np.ix_(rows, columns)].mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_of_pairs(kernel: np.ndarray, kept: np.ndarray) -> float:
    """Mean over i != j of the kernels of these clips."""
    part = kernel[np.ix_(kept, kept)]
    return float((part.sum() - np.trace(part)) / (len(kept) * (len(kept) - 1)))
