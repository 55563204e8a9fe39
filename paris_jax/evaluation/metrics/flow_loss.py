"""Held-out flow loss and velocity error of any velocity function.

The noise and timesteps of a clip depend on (seed, clip id) only, so all models and runs share the same points.
Timesteps are uniform in equal bins of [0, 1], one per bin and clip.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from paris_jax.evaluation.estimates import Estimate, mean

# velocity(x (B, T, H, W, C) float32, t (B,) float32, clip indices (B,)) -> (B, T, H, W, C)
Velocity = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Points:
    """Held-out clips with their timesteps and the seed of their noise.

    Attributes:
      latents: (N, T, H, W, C) float32, normalised as for the networks.
      ids: N clip ids, which key the noise.
      times: (N, bins) float32 timesteps, times[:, b] in [b / bins, (b + 1) / bins).
      seed: seed of noise and timesteps.
    """

    latents: np.ndarray
    ids: tuple[str, ...]
    times: np.ndarray
    seed: int

    @classmethod
    def draw(cls, latents: np.ndarray, ids: Sequence[str], bins: int, seed: int) -> "Points":
        """Draws one timestep per clip and bin; raises ValueError for latents of another shape or number."""
        if latents.ndim != 5 or len(latents) != len(ids):
            raise ValueError(
                f"latents has shape {latents.shape} with {len(ids)} ids: must be (N, T, H, W, C) with N ids"
            )
        uniform = np.stack([_generator(seed, i, "times").random(bins) for i in ids])
        times = (np.arange(bins) + uniform) / bins
        return cls(np.asarray(latents, np.float32), tuple(ids), times.astype(np.float32), seed)

    def batches(self, size: int) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Yields (bin, clip indices (B,), x_t, t (B,), target velocity e - x_0); the last batch repeats its last clip.

        Batches have one fixed size, so that velocity functions compile for one shape.
        """
        n, bins = self.times.shape
        for b in range(bins):
            for start in range(0, n, size):
                index = np.minimum(np.arange(start, start + size), n - 1)
                x0 = self.latents[index]
                noise = np.stack([self.noise(i, b) for i in index])
                t = self.times[index, b]
                s = t.reshape(-1, 1, 1, 1, 1)
                yield b, index, (1 - s) * x0 + s * noise, t, noise - x0

    def noise(self, clip: int, time_bin: int) -> np.ndarray:
        """Draws standard normal noise (T, H, W, C) float32 that depends on (seed, clip id, bin) only."""
        generator = _generator(self.seed, self.ids[clip], f"noise {time_bin}")
        return generator.standard_normal(self.latents.shape[1:], np.float32)


def _generator(seed: int, clip_id: str, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}\n{clip_id}\n{purpose}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


@dataclasses.dataclass(frozen=True)
class Losses:
    """Losses of one model at every point.

    Attributes:
      loss: (N, bins) mean over elements of (v - (e - x_0))^2, the held-out flow loss.
      error: (N, bins) |v - (e - x_0)| / |e - x_0|, the relative velocity error (1 for v = 0).
    """

    loss: np.ndarray
    error: np.ndarray


def heldout_losses(
    velocity: Velocity, points: Points, batch: int = 32, advance: Callable[[], None] | None = None
) -> Losses:
    """Computes flow loss and velocity error of `velocity` at every point; calls `advance` after each batch."""
    loss, error = np.zeros(points.times.shape), np.zeros(points.times.shape)
    for b, index, x, t, target in points.batches(batch):
        residual = np.asarray(velocity(x, t, index), np.float64) - target
        squared = (residual**2).mean((1, 2, 3, 4))
        loss[index, b] = squared
        error[index, b] = np.sqrt(squared / (target.astype(np.float64) ** 2).mean((1, 2, 3, 4)))
        if advance:
            advance()
    if not np.isfinite(loss).all():
        raise ValueError("the velocity is not finite at some held-out point")
    return Losses(loss, error)


def by_time(values: np.ndarray) -> list[Estimate]:
    """Mean and standard error over clips in each time bin of (N, bins)."""
    return [mean(values[:, b]) for b in range(values.shape[1])]


def by_cluster(values: np.ndarray, clusters: np.ndarray, num_clusters: int) -> list[Estimate | None]:
    """Mean and standard error over the clips of each cluster, after averaging over timesteps; None without clips."""
    per_clip, clusters = values.mean(1), np.asarray(clusters)
    return [mean(per_clip[clusters == k]) if (clusters == k).any() else None for k in range(num_clusters)]


def num_batches(points: Points, batch: int = 32) -> int:
    """Returns the number of batches, which is the number of calls of `advance`."""
    n, bins = points.times.shape
    return bins * -(-n // batch)


def expert_use(routing: np.ndarray) -> np.ndarray:
    """Mean weight of each expert at each solver step: (S, N, K) -> (S, K)."""
    return np.asarray(routing, np.float64).mean(1)
