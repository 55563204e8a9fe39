"""Mean and covariance of features, accumulated batch by batch on the devices, in float64.

A Frechet distance needs these alone, so features of any number of videos need not be kept. The batch may be split over
devices: the sums over its rows are then sums over devices, too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.evaluation.estimates import Estimate


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of features, float64 on the devices.

    Attributes:
      count: () number of rows.
      mean: (F,).
      scatter: (F, F) sum over rows of (x - mean) (x - mean)^T.
    """

    count: jax.Array
    mean: jax.Array
    scatter: jax.Array

    @classmethod
    def empty(cls, width: int) -> "Moments":
        with jax.enable_x64(True):
            zero = jnp.zeros((), jnp.float64)
            return cls(zero, jnp.zeros(width, jnp.float64), jnp.zeros((width, width), jnp.float64))

    def update(self, features: Any, is_kept: Any = None) -> "Moments":
        """These moments with more rows.

        Args:
          features: (B, F) of any float dtype, on one device or split over several by rows.
          is_kept: (B,) bool, false for rows that only fill a batch up; by default all count.
        """
        with jax.enable_x64(True):
            kept = jnp.ones(len(features), bool) if is_kept is None else jnp.asarray(is_kept)
            return _update(self, jnp.asarray(features), kept)

    def merge(self, other: "Moments") -> "Moments":
        """The moments of both sets together, such as those of two hosts."""
        with jax.enable_x64(True):
            return _merge(self, other)

    @property
    def covariance(self) -> np.ndarray:
        """(F, F) float64, divided by count - 1."""
        return np.asarray(self.scatter) / (float(self.count) - 1)


jax.tree_util.register_dataclass(Moments, ["count", "mean", "scatter"], [])


@jax.jit
def _update(moments: Moments, features: jax.Array, is_kept: jax.Array) -> Moments:
    weight, x = is_kept.astype(jnp.float64), features.astype(jnp.float64)
    count = weight.sum()
    mean = weight @ x / jnp.maximum(count, 1)
    centred = (x - mean) * weight[:, None]
    return _merge(moments, Moments(count, mean, centred.T @ centred))


@jax.jit
def _merge(first: Moments, second: Moments) -> Moments:
    """Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1: stable for any mean."""
    count = first.count + second.count
    share = second.count / jnp.maximum(count, 1)
    apart = second.mean - first.mean
    scatter = first.scatter + second.scatter + jnp.outer(apart, apart) * first.count * share
    return Moments(count, first.mean + apart * share, scatter)


def estimate_of(moments: Moments) -> Estimate:
    """Mean and standard error of a score that each clip has on its own, accumulated as moments of width 1."""
    if moments.mean.shape != (1,) or float(moments.count) < 2:
        raise ValueError(
            f"moments have width {moments.mean.shape} and count {float(moments.count):g}: need 1, and >= 2"
        )
    n = int(moments.count)
    return Estimate(value=float(moments.mean[0]), stderr=float(np.sqrt(moments.covariance[0, 0] / n)), n=n)


def frechet_of_moments(first: Moments, second: Moments) -> float:
    """Squared Frechet distance of the Gaussians with these moments.

    Below count = F + 1 the covariances are singular; their square root then costs some digits (an error of 1e-16 in
    an eigenvalue of zero is 1e-8 in its root), which `frechet_distance` of the features themselves keeps.

    Raises:
      ValueError: the counts differ, or are below 2, or a moment is not finite.
    """
    n, m = float(first.count), float(second.count)
    if n != m or n < 2:
        raise ValueError(
            f"counts are {n:g} and {m:g}: must be equal and at least 2, since the distance has a bias in 1/N"
        )
    covariances = first.covariance, second.covariance
    if not all(np.isfinite(c).all() for c in covariances):
        raise ValueError("the moments are not finite")
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariances[1] @ root)
    coupling = np.sqrt(np.clip(product, 0, None)).sum()
    apart = np.asarray(first.mean) - np.asarray(second.mean)
    distance = apart @ apart + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * coupling
    return max(float(distance), 0.0)
