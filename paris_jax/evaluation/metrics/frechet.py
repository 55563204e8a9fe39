"""Frechet distance of two feature sets, in float64 and without a matrix square root, and its limit for many clips."""

import numpy as np

from paris_jax.evaluation.estimates import Estimate, jackknife


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the Gaussians fitted to two equally large feature sets.

        d = |mu1 - mu2|^2 + |X|^2 + |Y|^2 - 2 sum(singular values of X Y^T)

    with X, Y the centred features / sqrt(n - 1), since tr sqrt(C1 C2) is the nuclear norm of X Y^T when C = X^T X. This
    needs no sqrtm (which is ill-conditioned below n = F + 1 clips, and whose result changed between scipy versions).

    Args:
      first, second: (N, F) float features, N >= 2. The distance is biased upward by about 1/N, so two distances are
        comparable only at equal N, and each must be read against the floor of real against real clips at that N.
    Raises:
      ValueError: the shapes differ or are not (N, F), or a feature is not finite.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise ValueError(f"features have shapes {first.shape} and {second.shape}: must both be (N, F) with N >= 2")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("features are not finite")
    mean1, mean2 = first.mean(0), second.mean(0)
    scale = np.sqrt(len(first) - 1)
    x, y = (first - mean1) / scale, (second - mean2) / scale
    # The singular values of X Y^T are those of a (min(N, F), same) matrix: with N > F, reduce by QR first.
    if len(x) > x.shape[1]:
        cross = np.linalg.qr(x).R @ np.linalg.qr(y).R.T
    else:
        cross = x @ y.T
    coupling = np.linalg.svd(cross, compute_uv=False).sum()
    distance = ((mean1 - mean2) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * coupling
    return max(float(distance), 0.0)


def frechet_estimate(first: np.ndarray, second: np.ndarray, groups: int = 16) -> Estimate:
    """Frechet distance of (N, F) features with its jackknife standard error (clip i left out of both sets together)."""
    return jackknife(lambda kept: frechet_distance(first[kept], second[kept]), len(first), groups)


def frechet_difference(first: np.ndarray, second: np.ndarray, real: np.ndarray, groups: int = 16) -> Estimate:
    """d(first, real) - d(second, real) with its jackknife standard error, paired by prompt; all (N, F)."""
    return jackknife(
        lambda kept: frechet_distance(first[kept], real[kept]) - frechet_distance(second[kept], real[kept]),
        len(real),
        groups,
    )


def limit_parts(clips: int, width: int) -> int:
    """Parts that `frechet_limit` splits clips into: up to 4 of at least `width` clips; below 2, there is no limit."""
    return min(4, clips // width)


def frechet_limit(first: np.ndarray, second: np.ndarray, parts: int | None = None) -> float:
    """Frechet distance extrapolated to infinitely many clips, which removes the bias in 1/N.

    Fits d(n) = d_inf + b / n by least squares to the mean distance of 1, 2, ..., `parts` disjoint parts of both sets.
    It may be below zero for equal distributions. With fewer clips than features in the smallest part the bias has more
    terms: 64 features of 128 clips in 4 parts gave 7.1 where 2.6 is true.

    Args:
      first, second: (N, F) float features in an order that is random with respect to the clips.
      parts: by default as many as `limit_parts` says.

    Raises:
      ValueError: N is below 2 F.

    Source: Chong and Forsyth 2020, "Effectively unbiased FID and Inception score" (arXiv 1911.07023), with disjoint
    parts instead of random subsets, so that the same clips always give the same number.
    """
    N, F = first.shape
    parts = limit_parts(N, F) if parts is None else parts
    if parts < 2:
        raise ValueError(f"{N} clips of {F} features: the limit of many clips needs at least {2 * F} clips")
    inverse, distance = [], []
    for p in range(1, parts + 1):
        size = N // p
        pieces = [slice(i * size, (i + 1) * size) for i in range(p)]
        inverse.append(1 / size)
        distance.append(np.mean([frechet_distance(first[piece], second[piece]) for piece in pieces]))
    return float(np.polyfit(inverse, distance, 1)[1])
