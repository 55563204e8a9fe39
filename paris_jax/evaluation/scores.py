"""From arrays to results.json: every score of both models, with errors, paired differences and references."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paris_jax.evaluation import estimates, results
from paris_jax.evaluation.heldout import Heldout
from paris_jax.evaluation.metrics import attribute_accuracy as accuracies
from paris_jax.evaluation.metrics import flow_loss
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.evaluation.metrics.flow_loss import Losses
from paris_jax.evaluation.metrics.frechet import frechet_difference, frechet_estimate
from paris_jax.evaluation.metrics.motion import mean_motion
from paris_jax.evaluation.results import MODELS, Comparison

MIN_CLIPS = 16  # clips below which a Frechet distance says nothing


class ClassifiedVideos:
    """One set of videos through the classifier: features (N, 64) and N dicts of predicted attributes."""

    def __init__(self, classifier: AttributeClassifier, videos: np.ndarray):
        self.features, self.read = classifier.look(videos)


def attribute_accuracy(
    asked: list[dict[str, str]], classified: dict[str, ClassifiedVideos]
) -> tuple[Comparison, dict[str, Any]]:
    """The comparison on all attributes at once, and the accuracy of each; `classified` by model and "real"."""
    hits = {who: accuracies.hits(asked, seen.read) for who, seen in classified.items()}
    shares = {who: accuracies.accuracy(found) for who, found in hits.items()}
    by_attribute = {
        name: {**{model: shares[model][name] for model in MODELS}, "reference": shares["real"][name]}
        for name in shares["real"]
    }
    everything = accuracies.ALL
    row = results.compare(
        "attribute_accuracy",
        "Attribute accuracy",
        "higher",
        {model: shares[model][everything] for model in MODELS},
        estimates.difference(hits["ensemble"][everything], hits["monolith"][everything]),
        unit="share",
        reference=shares["real"][everything],
        reference_label="ceiling: held-out clips",
        note="every attribute read back as asked",
    )
    return row, by_attribute


def frechet(classified: dict[str, ClassifiedVideos], others: ClassifiedVideos, note: str) -> Comparison:
    """Distance of each model, and of the prompts' own real clips, to as many `others` real clips.

    Small sets with a little less spread come out a little closer, even below the floor: measured, noise that nobody
    would call better gains half a standard error of the floor. So a difference within that error wins nothing.
    """
    features = {who: seen.features for who, seen in classified.items()}
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


def motion(videos: dict[str, np.ndarray]) -> Comparison:
    """Mean optical flow of each model and of the real clips."""
    found = {who: mean_motion(v) for who, v in videos.items()}
    return results.compare(
        "motion",
        "Motion",
        None,
        {model: estimates.mean(found[model]) for model in MODELS},
        estimates.difference(found["ensemble"], found["monolith"]),
        unit="px/frame",
        reference=estimates.mean(found["real"]),
        reference_label="held-out clips",
        note="closest to real is best",
    )


def cond_frames(kind: str, errors: dict[str, np.ndarray]) -> Comparison:
    """Error of sampled frames against their conditioning frames, (N,) by model; "not given": sampled without them."""
    return results.compare(
        f"kept_{kind}",
        f"Error of conditioning frames ({kind})",
        "lower",
        {model: estimates.mean(errors[model]) for model in MODELS},
        estimates.difference(errors["ensemble"], errors["monolith"]),
        reference=estimates.mean(errors["not given"]),
        reference_label="ensemble without them",
        note="root mean square of videos in [-1, 1]",
    )


def flow(made: dict[str, Losses]) -> list[Comparison]:
    """Held-out flow loss and velocity error over all times."""
    rows = []
    for field, label in (("loss", "Held-out flow loss"), ("error", "Held-out velocity error")):
        per_clip = {model: getattr(made[model], field).mean(1) for model in MODELS}
        means = {model: estimates.mean(values) for model, values in per_clip.items()}
        difference = estimates.difference(per_clip["ensemble"], per_clip["monolith"])
        rows.append(results.compare(field, label, "lower", means, difference))
    return rows


def flow_curves(made: dict[str, Losses], clusters: np.ndarray, num_clusters: int) -> dict[str, Any]:
    """The entries loss_by_time, error_by_time and loss_by_cluster."""
    bins = made["ensemble"].loss.shape[1]
    edges = [b / bins for b in range(bins + 1)]
    entries: dict[str, Any] = {}
    for field in ("loss", "error"):
        values = {model: getattr(made[model], field) for model in MODELS}
        values["difference"] = values["ensemble"] - values["monolith"]
        entries[f"{field}_by_time"] = {"edges": edges, **{who: flow_loss.by_time(v) for who, v in values.items()}}
    loss = {model: made[model].loss for model in MODELS}
    loss["difference"] = loss["ensemble"] - loss["monolith"]
    by_cluster = {who: flow_loss.by_cluster(v, clusters, num_clusters) for who, v in loss.items()}
    return entries | {"loss_by_cluster": {"clusters": list(range(num_clusters)), **by_cluster}}


def router(hits: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Accuracy by time bin of hits (N, bins)."""
    bins = hits.shape[1]
    return {
        "edges": [b / bins for b in range(bins + 1)],
        "accuracy": [estimates.proportion(hits[:, b]) for b in range(bins)],
        "chance": float(np.unique(clusters, return_counts=True)[1].max() / len(clusters)),
    }


def expert_use(routing: np.ndarray, experts: Sequence[int], clusters: np.ndarray) -> dict[str, Any]:
    """Mean weights of routing (S, N, E) by step, and by the cluster (N,) of the prompt."""
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
    """Captions, attributes and expert usage of the first `count` videos, for the report."""
    clips = []
    for i in range(min(count, len(prompts))):
        read = {who: seen.read[i] for who, seen in classified.items()} if prompts.described else {}
        clips.append(
            {
                "id": prompts.ids[i],
                "caption": prompts.captions[i],
                "cluster": int(prompts.clusters[i]),
                "asked": prompts.attributes[i] if prompts.described else {},
                "read": read,
                "use": routing[:, i].mean(0, dtype=np.float64).tolist(),
            }
        )
    return clips
