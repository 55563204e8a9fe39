"""The router as a classifier of clusters, by timestep: accuracy, confusion, calibration; and the experts by cluster."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from paris_jax.evaluation.estimates import Estimate, mean, proportion
from paris_jax.evaluation.metrics.flow_loss import Points, Velocity

CONFIDENCE_BINS = 10


@dataclasses.dataclass(frozen=True)
class ExpertMeasurements:
    """Router and experts at every held-out point.

    Attributes:
      probability: (N, bins, K) the router's p(cluster); 0 for clusters without an expert.
      losses: (E, N, bins) flow loss of each expert on its own.
      disagreement: (N, bins) standard deviation of the experts' predictions of x0, weighted by the router; a root mean
        square over the latent, in units of the data's standard deviation.
    """

    probability: np.ndarray
    losses: np.ndarray
    disagreement: np.ndarray


def measure(
    route: Velocity,
    experts: Mapping[int, Velocity],
    points: Points,
    num_clusters: int,
    batch: int = 32,
    advance: Callable[[], None] | None = None,
) -> ExpertMeasurements:
    """Evaluates the router, and each expert on its own, at every point.

    Args:
      route: (x, t, clip indices) -> (B, K) probabilities.
      experts: velocity of the expert of each cluster.
      advance: called after each batch.
    """
    shape, clusters = points.times.shape, list(experts)
    probability = np.zeros((*shape, num_clusters), np.float32)
    losses, disagreement = np.zeros((len(experts), *shape)), np.zeros(shape)
    for b, index, x, t, target in points.batches(batch):
        weight = np.asarray(route(x, t, index), np.float64)
        v = np.stack([np.asarray(velocity(x, t, index), np.float64) for velocity in experts.values()])
        losses[:, index, b] = ((v - target) ** 2).mean((2, 3, 4, 5))
        # x0 = x - t v, so the experts' x0 differ as t times their velocities do.
        share = weight[:, clusters].T[..., None, None, None, None]
        spread = (share * (v - (share * v).sum(0)) ** 2).sum(0).mean((1, 2, 3, 4))
        disagreement[index, b] = t * np.sqrt(spread)
        probability[index, b] = weight
        if advance:
            advance()
    return ExpertMeasurements(probability, losses, disagreement)


def accuracy(probability: np.ndarray, clusters: np.ndarray) -> list[Estimate]:
    """Share of clips whose most likely cluster is their own, in each timestep bin of (N, bins, K)."""
    hits = probability.argmax(-1) == np.asarray(clusters)[:, None]
    return [proportion(hits[:, b]) for b in range(hits.shape[1])]


def confusion(probability: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Counts (bins, K, K) of clips by own cluster (rows) and most likely cluster (columns), in each timestep bin."""
    _, bins, K = probability.shape
    counts = np.zeros((bins, K, K), int)
    for b in range(bins):
        np.add.at(counts[b], (clusters, probability[:, b].argmax(-1)), 1)
    return counts


def calibration(probability: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """How well the largest probability says how often it is right.

    Args:
      probability: (N, K) of one timestep bin, or (N, bins, K) of several, which are pooled.
    Returns:
      "error": expected calibration error (Guo et al. 2017, arXiv 1706.04599), the mean over clips of
      |accuracy - confidence| in ten equal bins of confidence; "log_loss": mean of -log p(own cluster), in nats; and by
      confidence bin, where it holds clips: "confidence", "accuracy", "count".
    """
    K = probability.shape[-1]
    own = np.repeat(np.asarray(clusters), probability[..., 0].size // len(clusters))
    flat = probability.reshape(-1, K).astype(np.float64)
    confidence, hit = flat.max(-1), flat.argmax(-1) == own
    bin_of = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    filled = [bin_of == b for b in range(CONFIDENCE_BINS) if (bin_of == b).any()]
    by_bin = [(float(confidence[m].mean()), float(hit[m].mean()), int(m.sum())) for m in filled]
    error = sum(count * abs(share - sure) for sure, share, count in by_bin) / len(flat)
    log_loss = -np.log(np.maximum(flat[np.arange(len(flat)), own], 1e-12)).mean()
    names = ("confidence", "accuracy", "count")
    columns = {name: [row[i] for row in by_bin] for i, name in enumerate(names)}
    return {"error": float(error), "log_loss": float(log_loss), **columns}


def experts_by_cluster(losses_ENB: np.ndarray, clusters: np.ndarray, num_clusters: int) -> list[list[Estimate | None]]:
    """Held-out loss of each expert (rows) on the clips of each cluster (columns); None for a cluster without clips.

    Args:
      losses_ENB: (experts, N, bins) losses of each expert on its own, at the same points.
    """
    per_clip, clusters = losses_ENB.mean(-1), np.asarray(clusters)
    return [
        [mean(row[clusters == k]) if (clusters == k).any() else None for k in range(num_clusters)] for row in per_clip
    ]


def oracle_losses(losses_ENB: np.ndarray, experts: list[int], clusters: np.ndarray) -> np.ndarray:
    """Losses (N, bins) if every clip were routed to the expert of its own cluster.

    Raises:
      ValueError: the expert of a cluster that has clips is missing.
    """
    missing = sorted(set(np.asarray(clusters).tolist()) - set(experts))
    if missing:
        raise ValueError(f"clusters {missing} have clips and no expert")
    rows = np.array([experts.index(int(k)) for k in clusters])
    return losses_ENB[rows, np.arange(len(clusters))]


def use_entropy(routing_SNE: np.ndarray) -> float:
    """Entropy of the mean routing weights over steps and videos, as a share of that of equal use: 1 if all are used."""
    use = np.asarray(routing_SNE, np.float64).mean((0, 1))
    if len(use) == 1:
        return 1.0
    used = use[use > 0]
    return float(-(used * np.log(used)).sum() / np.log(len(use)))
