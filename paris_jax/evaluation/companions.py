"""Scores beside the main comparison: distances without bias, other networks' features, steadiness, text and taste."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from paris_jax.encoders import codecs
from paris_jax.evaluation import distances, estimates, features, results
from paris_jax.evaluation.cache import ResultCache
from paris_jax.evaluation.features import FeatureNetwork, TextScores, WeightFiles
from paris_jax.evaluation.metrics import identity
from paris_jax.evaluation.metrics.aesthetic import aesthetic_scores
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.evaluation.metrics.clip_score import clip_scores
from paris_jax.evaluation.results import MODELS, Comparison

OTHERS = "others"  # the other held-out clips, which distances are to
Videos = Mapping[str, np.ndarray]  # by model, and "real" and OTHERS: (N, T, H, W, 3) float32 in [-1, 1]


@dataclasses.dataclass(frozen=True)
class Instruments:
    """The metrics of the user's files of weights."""

    networks: tuple[FeatureNetwork, ...]
    texts: TextScores | None

    @classmethod
    def load(cls, files: WeightFiles, frames: int) -> "Instruments":
        """Raises UserError if a file cannot be read, or a network needs more frames than the videos have."""
        networks = tuple(features.networks(files))
        for network in networks:
            network.check_frames(frames)
        return cls(networks, TextScores.load(files))

    def describe(self) -> dict[str, str]:
        return features.describe(self.networks) | (self.texts.describe() if self.texts else {})


def rows(
    videos: Videos,
    captions: Sequence[str],
    shapes_features: Mapping[str, np.ndarray],
    flicker: Mapping[str, np.ndarray],
    instruments: Instruments,
    cache: ResultCache,
    is_shapes: bool,
) -> tuple[list[Comparison], list[str]]:
    """All companions, and a sentence for each distance that is left out.

    Args:
      captions: N prompts.
      shapes_features: the shapes classifier's, by the same names as `videos`.
      flicker: `motion.temporal_flicker` of each video (N,), by model and "real".
      is_shapes: whether the videos are the embedded shapes, whose attributes can be read back.
    """
    found, left_out = _distances(features.shapes_classifier(), shapes_features, ("kernel", "limit"))
    for network in instruments.networks:
        of_network = {name: _features(network, name, v, cache) for name, v in videos.items()}
        more, missing = _distances(network, of_network, tuple(distances.GROUPS))
        found, left_out = found + more, left_out + missing
    if videos["real"].shape[1] > 1:
        found.append(_flicker(flicker))
        found += [_identity(videos)] if is_shapes else []
    if instruments.texts:
        found += _texts(videos, captions, instruments.texts)
    return found, left_out


def _features(network: FeatureNetwork, name: str, videos: np.ndarray, cache: ResultCache) -> np.ndarray:
    return cache.get(f"{network.name}-{name}", lambda: {"features": network(codecs.to_uint8(videos))})["features"]


def _distances(
    network: FeatureNetwork, sets: Mapping[str, np.ndarray], kinds: Sequence[str]
) -> tuple[list[Comparison], list[str]]:
    """Rows of one network's distances, each paired by prompt."""
    possible, missing = distances.available(sets["real"])
    found = []
    for kind in (kind for kind in kinds if kind in possible):
        floor = distances.estimate(kind, sets["real"], sets[OTHERS])
        found.append(
            results.compare(
                f"{network.name}_{kind}",
                distances.labels(network)[kind],
                "lower",
                {model: distances.estimate(kind, sets[model], sets[OTHERS]) for model in MODELS},
                distances.difference(kind, sets["ensemble"], sets["monolith"], sets[OTHERS]),
                reference=floor,
                reference_label="floor: real against real",
                note="" if kind == "frechet" else "no bias in the number of clips",
                smallest=floor["stderr"] if kind == "frechet" else 0.0,
            )
        )
    return found, [f"{network.label}: {sentence}" for sentence in missing]


def _per_clip(
    name: str,
    label: str,
    better: results.Direction,
    each: Mapping[str, np.ndarray],
    note: str,
    unit: str = "",
) -> Comparison:
    """A row of a score that each clip has on its own, (N,) by model and "real"."""
    summary = estimates.proportion if unit == "share" else estimates.mean
    return results.compare(
        name,
        label,
        better,
        {model: summary(each[model]) for model in MODELS},
        estimates.difference(each["ensemble"], each["monolith"]),
        unit=unit,
        reference=summary(each["real"]),
        reference_label="held-out clips",
        note=note,
    )


def _flicker(each: Mapping[str, np.ndarray]) -> Comparison:
    return _per_clip("flicker", "Temporal flicker", None, each, "gray levels of 255, where nothing moves")


def _identity(videos: Videos) -> Comparison:
    classifier = AttributeClassifier.load()
    note = f"first and last half show the same {', '.join(identity.LASTING)}"
    each = {model: identity.identity_kept(classifier, videos[model]) for model in (*MODELS, "real")}
    return _per_clip("identity", "Object kept", "higher", each, note, "share")


def _texts(videos: Videos, captions: Sequence[str], texts: TextScores) -> list[Comparison]:
    sets = {name: texts.encoder.embed_frames(codecs.to_uint8(v)) for name, v in videos.items() if name != OTHERS}
    embedded, cut = texts.encoder.embed_texts(captions)
    note = f"{texts.encoder.name}, raw cosine" + (f"; {cut} captions are cut" if cut else "")
    scores = {name: clip_scores(frames, embedded) for name, frames in sets.items()}
    found = [_per_clip("clip", "CLIP score", "higher", scores, note)]
    if head := texts.head:
        tastes = {name: aesthetic_scores(head, frames) for name, frames in sets.items()}
        found.append(_per_clip("aesthetic", "Aesthetic score", "higher", tastes, f"LAION {head.version}"))
    return found
