"""Scores of several ensembles, or of one with several sampling settings, on the same held-out prompts and noise.

`paris-jax evaluate --ensemble=A --ensemble=B` and `--vary=top_k=1,2,3`.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from paris_jax.artifacts import ensemble_manifest, locks, manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import EvaluationManifest, HeldoutManifest, NetworkManifest
from paris_jax.config import hashing
from paris_jax.config.experiment import Experiment
from paris_jax.config.sampling import SamplingSettings
from paris_jax.data.records import read_records
from paris_jax.encoders import codecs
from paris_jax.encoders.published import EncoderStore
from paris_jax.ensemble import sampling_params
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.errors import UserError, nearest
from paris_jax.evaluation import distances, estimates, features, folders, heldout, results
from paris_jax.evaluation.cache import ResultCache
from paris_jax.evaluation.features import TextScores, WeightFiles
from paris_jax.evaluation.heldout import Heldout
from paris_jax.evaluation.metrics import attribute_accuracy, routing
from paris_jax.evaluation.metrics.aesthetic import aesthetic_scores
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.evaluation.metrics.clip_score import clip_scores
from paris_jax.evaluation.metrics.identity import identity_kept
from paris_jax.evaluation.metrics.motion import motion_and_flicker

logger = logging.getLogger(__name__)
SCHEMA, RESULTS, PARTIAL = "paris_jax/systems/2", "results.json", ".partial"
FIELDS = {field.name: field for field in dataclasses.fields(SamplingSettings)}
EXPERTS = ("fixed_expert", "drop_experts")  # varied by cluster: 0, 0+1 or none
BY_CLUSTER = ("correct", "clip")  # scores that are also given for the prompts of each cluster
# Scores with a value for each video.
OF_VIDEOS = {
    "correct": estimates.proportion,
    "identity": estimates.proportion,
    "motion": estimates.mean,
    "flicker": estimates.mean,
    "clip": estimates.mean,
    "aesthetic": estimates.mean,
}


@dataclasses.dataclass(frozen=True)
class System:
    """An ensemble with sampling settings.

    Attributes:
      path: RUN/ensemble or bundled:shapes; overrides: sampling settings other than the ensemble's own, and "0" or "0+1"
        for `EXPERTS`.
    """

    path: str
    overrides: tuple[tuple[str, Any], ...] = ()

    @property
    def changes(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.overrides)

    def options(self, num_inference_steps: int) -> dict[str, Any]:
        """Arguments of `Ensemble.sample`. Several fixed experts take equal parts of the steps, in their order."""
        options = dict(self.overrides)
        if text := options.pop("drop_experts", None):
            options["drop_experts"] = [int(k) for k in text.split("+")]
        if text := options.pop("fixed_expert", None):
            clusters, S = [int(k) for k in text.split("+")], options.get("num_inference_steps", num_inference_steps)
            options["fixed_expert"] = [clusters[step * len(clusters) // S] for step in range(S)]
        return options


def systems(ensembles: Sequence[str], vary: Sequence[str]) -> list[System]:
    """Every ensemble with every combination of the varied sampling settings.

    Args:
      vary: "top_k=1,2,3": a sampling setting and its values; "fixed_expert=none,0,1,0+1": the router, either expert,
        and expert 0 in the first half of the steps and expert 1 in the second; "drop_experts=none,0,1": experts lost.

    Raises:
      UserError: an unknown setting, or a value of another type.
    """
    axes = []
    for text in vary:
        name, equals, values = text.partition("=")
        if name not in (*FIELDS, *EXPERTS) or not equals or not values:
            raise UserError(
                f"--vary={text}: must be SETTING=VALUE,VALUE,... with a sampling setting"
                f"{nearest(name, [*FIELDS, *EXPERTS])}, such as top_k=1,2,3 or num_inference_steps=10,20,50"
            )
        axes.append([(name, _value(name, value)) for value in values.split(",")])
    combinations = [
        tuple((name, value) for name, value in combination if value is not None)
        for combination in itertools.product(*axes)
    ]
    return [System(path, combination) for path in ensembles for combination in combinations]


def _value(name: str, text: str) -> Any:
    if name in EXPERTS:
        if text != "none" and not all(k.isascii() and k.isdigit() for k in text.split("+")):
            raise UserError(f"--vary={name}={text}: must be none, a cluster such as 0, or several such as 0+1")
        return None if text == "none" else text
    kind = type(FIELDS[name].default)
    if kind not in (int, float, str, bool):
        raise UserError(f"--vary={name}: only settings with a single number or name can be varied")
    try:
        return text == "true" if kind is bool else kind(text)
    except ValueError:
        raise UserError(f"--vary={name}={text}: must be {'a whole number' if kind is int else 'a number'}") from None


def evaluate_systems(
    experiment: Experiment, run: RunFolder, compared: Sequence[System], files: WeightFiles, out: epath.PathLike
) -> dict[str, Any]:
    """Scores systems on the run's held-out prompts and writes OUT/results.json.

    Varied settings are scored on the validation split, because the best of them is chosen; whole systems are scored on
    the test split.

    Videos are scored as 8-bit pixels, as files of videos are. Each system's scores are cached, so an interrupted
    evaluation resumes.

    Raises:
      UserError: fewer than two systems, too few held-out clips or frames, videos of other sizes than the real ones.
    """
    if not compared:
        raise UserError("There is nothing to evaluate; give --ensemble or --vary")
    evaluation = _SystemsRun(experiment, run, compared, files)
    out = epath.Path(out)
    with locks.only_writer(out):
        path = out / RESULTS
        if manifest.exists(out) and manifest.read(out, EvaluationManifest).evaluation_hash == evaluation.key:
            logger.info("the evaluation is done already, with the same models, clips, settings and versions: %s", path)
            return manifest.read_json(path)
        cache = ResultCache(out / PARTIAL, evaluation.key)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            found = evaluation.results(cache, progress)
        manifest.write_json(path, found)
        manifest.write(out, EvaluationManifest, [RESULTS], experiment.hash, evaluation_hash=evaluation.key)
        cache.clear()
    logger.info("%s", table(found))
    logger.info("the evaluation is done: %s", path)
    return found


class _SystemsRun:
    """One evaluation of several systems."""

    def __init__(self, experiment: Experiment, run: RunFolder, compared: Sequence[System], files: WeightFiles):
        settings = experiment.evaluation
        self.experiment, self.compared, self.seed = experiment, compared, settings.seed
        self.networks = [features.shapes_classifier(), *features.networks(files)]
        self.texts = TextScores.load(files)
        folder = run.validation if any(system.overrides for system in compared) else run.test
        if not manifest.exists(folder):
            raise UserError(
                f"There are no {folder.name} clips at {folder}; run 'paris-jax cluster --workdir={run}' first, or "
                "raise config.data.heldout_fraction and config.data.validation_share, with a new --workdir"
            )
        clips = manifest.read(folder, HeldoutManifest)
        self.split = clips.split
        self.codec = codecs.from_description(clips.codec, experiment.encoders.get("vae", ""), EncoderStore())
        ordered = Heldout.order(read_records(folder), settings.seed)
        count = min(settings.num_clips, len(ordered) // 2)
        if count < 2:
            raise UserError(
                f"{folder} holds {len(ordered)} clips and an evaluation needs at least 4; raise "
                "config.data.heldout_fraction or add videos, with a new --workdir"
            )
        self.prompts, self.others = ordered[:count], ordered[count : 2 * count]
        self.loaded: dict[str, Ensemble] = {}
        self.is_shapes = self.prompts.has_shapes_attributes
        for network in self.networks:
            network.check_frames(experiment.data.num_frames)
        inputs = {
            "systems": [[s.changes, _identity(s.path)] for s in compared],
            "heldout": manifest.hash_file(folder / manifest.FILE_NAME),
            "evaluation": dataclasses.asdict(settings),
            "networks": {n.name: n.sha256 for n in self.networks},
            "texts": self.texts.describe() if self.texts else {},
            "versions": {name: manifest.versions()[name] for name in ("paris-jax", "jax", "flax")},
            "schema": SCHEMA,
        }
        self.key = hashing.hash_text(hashing.canonical_json(inputs))

    def model(self, path: str) -> Ensemble:
        """An ensemble, or a single network such as the monolith's; one at a time is in memory."""
        if path not in self.loaded:
            folder, encoders = ensemble_manifest.resolve(path), self.experiment.encoders
            if manifest.read_kind(folder) == manifest.kind(NetworkManifest):
                sampling = dataclasses.asdict(self.experiment.sampling)
                self.loaded = {path: Ensemble.single(folder, encoders, **sampling)}
            else:
                self.loaded = {path: Ensemble.load(path, encoders=encoders)}
        return self.loaded[path]

    def results(self, cache: ResultCache, progress: Progress) -> dict[str, Any]:
        real = cache.get("real", lambda: self._measure(self._decoded(self.prompts)))
        others = cache.get("others", lambda: self._measure(self._decoded(self.others)))
        measured = []
        for number, system in enumerate(self.compared):
            count = len(self.prompts)
            task = progress.add_task(f"{system.path} {system.changes}", total=count)
            measured.append(cache.get(f"system-{number}", lambda s=system, t=task: self._sample(s, progress, t)))
            progress.update(task, completed=count)
        rows = [self._row(s, m, others, measured[0]) for s, m in zip(self.compared, measured, strict=True)]
        floor, left_out = self._scores(real, others)
        return {
            "schema": SCHEMA,
            "evaluation_hash": self.key,
            "config_hash": self.experiment.hash,
            "protocol": self._protocol(),
            "left_out": left_out,
            "systems": rows,
            "real": floor,
            "labels": self._labels(),
        }

    def _decoded(self, clips: Heldout) -> np.ndarray:
        return codecs.to_uint8(np.clip(self.codec.decode(clips.latents), -1, 1))

    def _sample(self, system: System, progress: Progress, task: Any) -> dict[str, np.ndarray]:
        model, count = self.model(system.path), len(self.prompts)
        options = system.options(model.params.num_inference_steps)
        sampling_params.resolve(model.params, None, options)
        noise = np.asarray(model.noise(count, self.seed))
        ends: list[float] = [time.monotonic()]

        def advance(videos: int) -> None:
            ends.append(time.monotonic())
            progress.advance(task, videos)

        videos, weights = heldout.sample(model, self.prompts.captions, noise, options, advance)
        folders.check_values(videos, f"{system.path} {system.changes}".strip())
        pixels = codecs.to_uint8(videos)
        found = self._measure(pixels)
        steady = np.diff(ends)[1:] if len(ends) > 2 else np.diff(ends)  # the first batch compiles
        return found | {
            "weights": weights,
            "seconds": np.array([float(np.median(steady)) / min(heldout.BATCH, count)]),
            "pixels_shape": np.array(pixels.shape[1:4]),
        }

    def _measure(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Everything that is kept of videos (N, T, H, W, 3) uint8."""
        video = pixels.astype(np.float32) / 127.5 - 1
        found = {f"features {network.name}": network(pixels) for network in self.networks}
        found |= dict(zip(("motion", "flicker"), motion_and_flicker(video), strict=True))
        if self.is_shapes:
            classifier = AttributeClassifier.load()
            _, predicted = classifier.predict(video)
            found["correct"] = attribute_accuracy.hits(self.prompts.attributes, predicted)[attribute_accuracy.ALL]
            found["identity"] = identity_kept(classifier, video) if video.shape[1] > 1 else np.ones(len(video), bool)
        if self.texts:
            frames = self.texts.encoder.embed_frames(pixels)
            found["clip"] = clip_scores(frames, self.texts.encoder.embed_texts(self.prompts.captions)[0])
            if self.texts.head:
                found["aesthetic"] = aesthetic_scores(self.texts.head, frames)
        return found

    def _scores(self, found: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> tuple[dict[str, Any], list[str]]:
        """Scores by id, and sentences on those that are left out."""
        scores, left_out = {}, []
        for network in self.networks:
            each, missing = distances.distances(found[f"features {network.name}"], others[f"features {network.name}"])
            scores |= {f"{network.name}_{kind}": estimate for kind, estimate in each.items()}
            left_out += [f"{network.label}: {sentence}" for sentence in missing]
        scores |= {name: estimate(found[name]) for name, estimate in OF_VIDEOS.items() if name in found}
        return scores, left_out

    def _by_cluster(self, found: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
        """Scores of the prompts of each cluster."""
        clusters = self.prompts.clusters
        return {
            str(k): {name: OF_VIDEOS[name](found[name][clusters == k]) for name in BY_CLUSTER if name in found}
            for k in np.unique(clusters)
        }

    def _row(
        self, system: System, found: dict[str, np.ndarray], others: dict[str, np.ndarray], first: dict[str, np.ndarray]
    ) -> dict[str, Any]:
        """A system's scores, cost and paired differences to the first system."""
        shapes = [tuple(m["pixels_shape"].tolist()) for m in (found, first)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{system.path} makes videos of {shapes[0]} (frames, height, width), the first system of {shapes[1]}; "
                "evaluate them on their own"
            )
        weights = found["weights"]
        differences = {}
        if found is not first:
            for network in self.networks:
                name = f"features {network.name}"
                for kind in distances.available(found[name])[0]:
                    paired = distances.difference(kind, found[name], first[name], others[name])
                    differences[f"{network.name}_{kind}"] = paired
            for name in ("correct", "identity", "clip", "aesthetic"):
                if name in found:
                    differences[name] = estimates.difference(found[name], first[name])
        return {
            "ensemble": system.path,
            "overrides": dict(system.overrides),
            "scores": self._scores(found, others)[0],
            "by_cluster": self._by_cluster(found),
            "differences": differences,
            "seconds_per_video": float(found["seconds"][0]),
            "experts_per_step": float((weights > 0).sum(-1).mean()),
            "use_entropy": routing.use_entropy(weights),
        }

    def _labels(self) -> dict[str, str]:
        named = {f"{n.name}_{kind}": label for n in self.networks for kind, label in distances.labels(n).items()}
        own = {"correct": "Attribute accuracy", "identity": "Object kept", "motion": "Motion, px/frame"}
        more = {"flicker": "Flicker", "clip": "CLIP score", "aesthetic": "Aesthetic score"}
        return named | own | more

    def _protocol(self) -> dict[str, Any]:
        own = {path: _settings(self.model(path)) for path in dict.fromkeys(s.path for s in self.compared)}
        return {
            "prompts": len(self.prompts),
            "prompts from": f"captions of {self.split} clips (held-out videos), clusters in natural proportion",
            "reference": f"{len(self.others)} other {self.split} clips",
            "noise": f"seed {self.seed}; prompt i starts from the same noise in all systems of one latent shape",
            "pixels": "8 bits",
            **features.describe(self.networks),
            **(self.texts.describe() if self.texts else {}),
            "sampling": own,
            "seconds per video": f"median over batches of {min(heldout.BATCH, len(self.prompts))}, without the first",
            "intervals": "standard errors; of distances, jackknife over 16 groups of clips (8 for limits)",
            "device": jax.devices()[0].device_kind,
            "versions": manifest.versions(),
        }


def _identity(path: str) -> str:
    """Hash of the manifest of an ensemble, which has the hashes of its networks' manifests, or of a single network."""
    return manifest.hash_file(ensemble_manifest.resolve(path) / manifest.FILE_NAME)


def _settings(model: Ensemble) -> Mapping[str, Any]:
    own = {name: getattr(model.params, name) for name in FIELDS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}


def table(found: dict[str, Any]) -> str:
    """The scores as aligned columns, a line for each system."""
    names = [name for name in found["labels"] if any(name in row["scores"] for row in found["systems"])]
    names = [name for name in names if not name.endswith("_limit")]
    lines = [["", *(found["labels"][name] for name in names), "s/video", "experts/step"]]
    several = len({row["ensemble"] for row in found["systems"]}) > 1
    for row in found["systems"]:
        changes = ", ".join(f"{k}={v}" for k, v in row["overrides"].items())
        label = " ".join(filter(None, [row["ensemble"] if several or not changes else "", changes]))
        cells = [results.format_estimate(row["scores"].get(name), _unit(name)) for name in names]
        lines.append([label, *cells, f"{row['seconds_per_video']:.3g}", f"{row['experts_per_step']:.2f}"])
    real = [results.format_estimate(found["real"].get(name), _unit(name)) for name in names]
    lines.append(["real clips", *real, "", ""])
    text = _aligned(lines)
    clusters = found["systems"][0]["by_cluster"]
    for name in BY_CLUSTER:
        if all(name in scores for scores in clusters.values()):
            head = [f"{found['labels'][name]}, prompts of", *(f"cluster {k}" for k in clusters)]
            rows = [
                [line[0], *(results.format_estimate(row["by_cluster"][k][name], _unit(name)) for k in clusters)]
                for line, row in zip(lines[1:], found["systems"], strict=False)
            ]
            text += "\n\n" + _aligned([head, *rows])
    return "\n".join([text, *found["left_out"]])


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _unit(name: str) -> str:
    return "share" if name in ("correct", "identity") else ""
