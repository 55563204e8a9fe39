"""Scores with standard errors, paired differences of two models, and the winner.

Every score of results.json is a dict {"value": float, "stderr": float, "n": int}, where n is the number of clips, the
sampling unit. Both models use the same clips, noise and prompts, so their difference is taken clip by clip, which
cancels the difficulty of a clip.
"""

from collections.abc import Callable
from typing import Literal, TypedDict

import numpy as np

Z95 = 1.959964  # half width of a two-sided 95 % interval, in standard errors
FEWEST = 8  # clips needed for a winner: with fewer, the standard error is itself too uncertain


class Estimate(TypedDict):
    value: float
    stderr: float
    n: int


def mean(values: np.ndarray) -> Estimate:
    """Mean of values (N,) and its standard error, the sample standard deviation / sqrt(N); needs N >= 1."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values has shape {values.shape}: must be (N,) with N >= 1")
    stderr = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return Estimate(value=float(values.mean()), stderr=float(stderr), n=len(values))


def proportion(hits: np.ndarray) -> Estimate:
    """Share of true hits (N,); the standard error is Wilson's, so that it is not 0 for 0 of 20 or 20 of 20."""
    hits = np.asarray(hits, bool)
    n, p = len(hits), float(hits.mean())
    half = np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2)) / (1 + Z95**2 / n)
    return Estimate(value=p, stderr=float(half), n=n)


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Mean of first - second, paired clip by clip; both (N,)."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values have shapes {first.shape} and {second.shape}: must be equal")
    return mean(first - second)


def jackknife(statistic: Callable[[np.ndarray], float], n: int, groups: int = 16) -> Estimate:
    """Value and delete-a-group jackknife standard error of a statistic of n clips other than a mean.

    Args:
      statistic: function of the indices of the retained clips.
      n: number of clips; clip i belongs to group i % groups.
      groups: number of groups.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, ch. 11. (A bootstrap would repeat clips, which by
    itself raises a Frechet distance.)
    """
    groups = min(groups, n)
    index = np.arange(n)
    left_out = np.array([statistic(index[index % groups != g]) for g in range(groups)])
    stderr = np.sqrt((groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum())
    return Estimate(value=float(statistic(index)), stderr=float(stderr), n=n)


def winner(delta: Estimate, better: Literal["lower", "higher"]) -> Literal["first", "second", "none"]:
    """Winner by the 95 % interval of delta = first - second; "none" if it contains 0 or n is below FEWEST."""
    if delta["n"] < FEWEST or not abs(delta["value"]) > Z95 * delta["stderr"]:
        return "none"
    return "first" if (delta["value"] > 0) == (better == "higher") else "second"
