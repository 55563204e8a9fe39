"""From arrays to results.json: every score of both arms, with errors, paired differences and references."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from paris_jax.evaluation import estimates, results
from paris_jax.evaluation.heldout import Heldout
from paris_jax.evaluation.metrics import attribute_accuracy as agreements
from paris_jax.evaluation.metrics import flow_loss
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.evaluation.metrics.flow_loss import Losses
from paris_jax.evaluation.metrics.frechet import frechet_difference, frechet_estimate
from paris_jax.evaluation.metrics.motion import mean_motion
from paris_jax.evaluation.results import MODELS, Comparison

MIN_CLIPS = 16  # clips below which a Frechet distance says nothing


class ClassifiedVideos:
    """What the judge saw in one set of videos: features (N, 64) and N dicts of read attributes."""

    def __init__(self, judge: AttributeClassifier, videos: np.ndarray):
        self.features, self.read = judge.look(videos)


def attribute_accuracy(
    asked: list[dict[str, str]], looked: dict[str, ClassifiedVideos]
) -> tuple[Comparison, dict[str, Any]]:
    """The comparison on all attributes at once, and every attribute's agreement; `looked` by arm and "real"."""
    hits = {who: agreements.hits(asked, seen.read) for who, seen in looked.items()}
    shares = {who: agreements.accuracy(found) for who, found in hits.items()}
    by_attribute = {
        name: {**{arm: shares[arm][name] for arm in MODELS}, "reference": shares["real"][name]}
        for name in shares["real"]
    }
    everything = agreements.ALL
    row = results.compare(
        "agreement",
        "Agreement with the prompt",
        "higher",
        {arm: shares[arm][everything] for arm in MODELS},
        estimates.difference(hits["ensemble"][everything], hits["monolith"][everything]),
        unit="share",
        reference=shares["real"][everything],
        reference_label="ceiling: held-out clips",
        note="every attribute read back as asked",
    )
    return row, by_attribute


def frechet(looked: dict[str, ClassifiedVideos], others: ClassifiedVideos, note: str) -> Comparison:
    """Distance of each arm, and of the prompts' own real clips, to as many `others` real clips.

    Small sets with a little less spread come out a little closer, even below the floor: measured, noise that nobody
    would call better gains half a standard error of the floor. So a difference within that error wins nothing.
    """
    features = {who: seen.features for who, seen in looked.items()}
    floor = frechet_estimate(features["real"], others.features)
    return results.compare(
        "frechet",
        "Frechet distance (shapes judge)",
        "lower",
        {arm: frechet_estimate(features[arm], others.features) for arm in MODELS},
        frechet_difference(features["ensemble"], features["monolith"], others.features),
        reference=floor,
        reference_label="floor: real against real",
        note=note,
        smallest=floor["stderr"],
    )


def motion(videos: dict[str, np.ndarray]) -> Comparison:
    """Mean optical flow of each arm and of the real clips."""
    found = {who: mean_motion(v) for who, v in videos.items()}
    return results.compare(
        "motion",
        "Motion",
        None,
        {arm: estimates.mean(found[arm]) for arm in MODELS},
        estimates.difference(found["ensemble"], found["monolith"]),
        unit="px/frame",
        reference=estimates.mean(found["real"]),
        reference_label="held-out clips",
        note="closest to real is best",
    )


def cond_frames(kind: str, errors: dict[str, np.ndarray]) -> Comparison:
    """How far frames that were given are from what was made of them, (N,) by arm; "not given": without being told."""
    return results.compare(
        f"kept_{kind}",
        f"Error of kept frames ({kind})",
        "lower",
        {arm: estimates.mean(errors[arm]) for arm in MODELS},
        estimates.difference(errors["ensemble"], errors["monolith"]),
        reference=estimates.mean(errors["not given"]),
        reference_label="ensemble that is not given them",
        note="root mean square of videos in [-1, 1]",
    )


def flow(made: dict[str, Losses]) -> list[Comparison]:
    """Held-out flow loss and velocity error over all times."""
    rows = []
    for field, label in (("loss", "Held-out flow loss"), ("error", "Held-out velocity error")):
        per_clip = {arm: getattr(made[arm], field).mean(1) for arm in MODELS}
        means = {arm: estimates.mean(values) for arm, values in per_clip.items()}
        difference = estimates.difference(per_clip["ensemble"], per_clip["monolith"])
        rows.append(results.compare(field, label, "lower", means, difference))
    return rows


def flow_curves(made: dict[str, Losses], clusters: np.ndarray, num_clusters: int) -> dict[str, Any]:
    """The entries loss_by_time, error_by_time and loss_by_cluster."""
    bins = made["ensemble"].loss.shape[1]
    edges = [b / bins for b in range(bins + 1)]
    entries: dict[str, Any] = {}
    for field in ("loss", "error"):
        values = {arm: getattr(made[arm], field) for arm in MODELS}
        values["difference"] = values["ensemble"] - values["monolith"]
        entries[f"{field}_by_time"] = {"edges": edges, **{who: flow_loss.by_time(v) for who, v in values.items()}}
    loss = {arm: made[arm].loss for arm in MODELS}
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
    prompts: Heldout, looked: dict[str, ClassifiedVideos], routing: np.ndarray, count: int
) -> list[dict[str, Any]]:
    """What stands beside each of the first `count` videos."""
    clips = []
    for i in range(min(count, len(prompts))):
        read = {who: seen.read[i] for who, seen in looked.items()} if prompts.described else {}
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
