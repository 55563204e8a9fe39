"""Computes the entries of results.json: scores of both models with errors, paired differences and references."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paris_jax.evaluation import estimates, results
from paris_jax.evaluation.heldout import Heldout
from paris_jax.evaluation.metrics import attribute_accuracy as accuracies
from paris_jax.evaluation.metrics import flow_loss, routing
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.evaluation.metrics.flow_loss import Losses
from paris_jax.evaluation.metrics.frechet import frechet_difference, frechet_estimate
from paris_jax.evaluation.results import MODELS, Comparison

MIN_CLIPS = 16  # clips needed for a meaningful Frechet distance


class ClassifiedVideos:
    """Classifier outputs for one set of videos: features (N, 64) and N dicts of predicted attributes."""

    def __init__(self, classifier: AttributeClassifier, videos: np.ndarray):
        self.features, self.read = classifier.predict(videos)


def attribute_accuracy(
    expected: list[dict[str, str]], classified: dict[str, ClassifiedVideos]
) -> tuple[Comparison, dict[str, Any]]:
    """Returns the comparison on all attributes at once, and the accuracy of each attribute.

    Args:
      expected: attributes of the N prompts.
      classified: classifier outputs of each model and of the prompts' own clips, "real".
    """
    hits = {model: accuracies.hits(expected, videos.read) for model, videos in classified.items()}
    shares = {model: accuracies.accuracy(correct) for model, correct in hits.items()}
    by_attribute = {
        name: {**{model: shares[model][name] for model in MODELS}, "reference": shares["real"][name]}
        for name in shares["real"]
    }
    row = results.compare(
        "attribute_accuracy",
        "Attribute accuracy",
        "higher",
        {model: shares[model][accuracies.ALL] for model in MODELS},
        estimates.difference(hits["ensemble"][accuracies.ALL], hits["monolith"][accuracies.ALL]),
        unit="share",
        reference=shares["real"][accuracies.ALL],
        reference_label="ceiling: held-out clips",
        note="all predicted attributes as in the prompt",
    )
    return row, by_attribute


def frechet(classified: dict[str, ClassifiedVideos], others: ClassifiedVideos, note: str) -> Comparison:
    """Compares the Frechet distances of each model, and of the prompts' own clips, to as many other real clips.

    Small sets with slightly less spread have a slightly lower distance, even below the floor: in a measurement, noise
    that is no improvement gained half a standard error of the floor. A difference within that error has no winner.
    """
    features = {model: videos.features for model, videos in classified.items()}
    floor = frechet_estimate(features["real"], others.features)
    return results.compare(
        "frechet",
        "Frechet distance (shapes classifier)",
        "lower",
        {model: frechet_estimate(features[model], others.features) for model in MODELS},
        frechet_difference(features["ensemble"], features["monolith"], others.features),
        reference=floor,
        reference_label="floor: real against real",
        note=note,
        smallest=floor["stderr"],
    )


def motion(flows: dict[str, np.ndarray]) -> Comparison:
    """Compares the mean optical flow (N,) of each model's videos and of the real clips."""
    return results.compare(
        "motion",
        "Motion",
        None,
        {model: estimates.mean(flows[model]) for model in MODELS},
        estimates.difference(flows["ensemble"], flows["monolith"]),
        unit="px/frame",
        reference=estimates.mean(flows["real"]),
        reference_label="held-out clips",
        note="closest to real is best",
    )


def cond_frames(kind: str, errors: dict[str, np.ndarray]) -> Comparison:
    """Compares errors (N,) of sampled frames to their conditioning frames; "unconditioned" is sampled without them."""
    return results.compare(
        f"kept_{kind}",
        f"Error of conditioning frames ({kind})",
        "lower",
        {model: estimates.mean(errors[model]) for model in MODELS},
        estimates.difference(errors["ensemble"], errors["monolith"]),
        reference=estimates.mean(errors["unconditioned"]),
        reference_label="ensemble without them",
        note="root mean square error of videos in [-1, 1]",
    )


def flow(losses: dict[str, Losses]) -> list[Comparison]:
    """Compares held-out flow loss and velocity error, averaged over all timesteps."""
    rows = []
    for field, label in (("loss", "Held-out flow loss"), ("error", "Held-out velocity error")):
        per_clip = {model: getattr(losses[model], field).mean(1) for model in MODELS}
        means = {model: estimates.mean(values) for model, values in per_clip.items()}
        difference = estimates.difference(per_clip["ensemble"], per_clip["monolith"])
        rows.append(results.compare(field, label, "lower", means, difference))
    return rows


def flow_curves(losses: dict[str, Losses], clusters: np.ndarray, num_clusters: int) -> dict[str, Any]:
    """Returns the entries loss_by_time, error_by_time and loss_by_cluster."""
    bins = losses["ensemble"].loss.shape[1]
    edges = [b / bins for b in range(bins + 1)]
    entries: dict[str, Any] = {}
    for field in ("loss", "error"):
        values = {model: getattr(losses[model], field) for model in MODELS}
        values["difference"] = values["ensemble"] - values["monolith"]
        entries[f"{field}_by_time"] = {"edges": edges, **{name: flow_loss.by_time(v) for name, v in values.items()}}
    loss = {model: losses[model].loss for model in MODELS}
    loss["difference"] = loss["ensemble"] - loss["monolith"]
    by_cluster = {name: flow_loss.by_cluster(v, clusters, num_clusters) for name, v in loss.items()}
    return entries | {"loss_by_cluster": {"clusters": list(range(num_clusters)), **by_cluster}}


def router(probability: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Returns the entry router from the router's probabilities (N, bins, K)."""
    bins = probability.shape[1]
    return {
        "edges": [b / bins for b in range(bins + 1)],
        "accuracy": routing.accuracy(probability, clusters),
        "chance": float(np.unique(clusters, return_counts=True)[1].max() / len(clusters)),
        "confusion": routing.confusion(probability, clusters).tolist(),
        "calibration": [routing.calibration(probability[:, b], clusters) for b in range(bins)],
        "calibration_all": routing.calibration(probability, clusters),
    }


def experts(
    measured: routing.ExpertMeasurements, held: Sequence[int], routed: Losses, clusters: np.ndarray, num_clusters: int
) -> dict[str, Any] | None:
    """Returns the entry experts; None with a single expert, or where the expert of a cluster is missing."""
    if len(held) < 2 or set(clusters.tolist()) - set(held):
        return None
    oracle = routing.oracle_losses(measured.losses, list(held), clusters)
    return {
        "experts": list(held),
        "clusters": list(range(num_clusters)),
        "loss": routing.experts_by_cluster(measured.losses, clusters, num_clusters),
        "oracle": estimates.mean(oracle.mean(1)),
        "routed": estimates.mean(routed.loss.mean(1)),
        "routed_minus_oracle": estimates.difference(routed.loss.mean(1), oracle.mean(1)),
        "disagreement": flow_loss.by_time(measured.disagreement),
    }


def expert_use(routing: np.ndarray, experts: Sequence[int], clusters: np.ndarray) -> dict[str, Any]:
    """Returns the entry expert_use: mean weights of routing (S, N, E) by step and by the prompts' clusters (N,)."""
    return {
        "clusters": list(experts),
        "by_step": flow_loss.expert_use(routing).tolist(),
        "by_cluster": {
            str(k): routing[:, clusters == k].mean((0, 1), dtype=np.float64).tolist() for k in np.unique(clusters)
        },
    }


def shown_clips(
    prompts: Heldout, classified: dict[str, ClassifiedVideos], routing: np.ndarray, count: int
) -> list[dict[str, Any]]:
    """Returns the entry shown: captions, attributes and expert usage of the first `count` videos."""
    clips = []
    for i in range(min(count, len(prompts))):
        predicted = {m: videos.read[i] for m, videos in classified.items()} if prompts.has_attributes else {}
        clips.append(
            {
                "id": prompts.ids[i],
                "caption": prompts.captions[i],
                "cluster": int(prompts.clusters[i]),
                "asked": prompts.attributes[i] if prompts.has_attributes else {},
                "read": predicted,
                "use": routing[:, i].mean(0, dtype=np.float64).tolist(),
            }
        )
    return clips
