"""`paris-jax evaluate`: compares ensemble and monolith on the same held-out prompts, noise and timesteps."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from paris_jax.artifacts import ensemble_manifest, locks, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import EvaluationManifest, NetworkManifest
from paris_jax.config import hashing
from paris_jax.config.experiment import Experiment
from paris_jax.data.records import read_records
from paris_jax.data.sources.clip import video_of
from paris_jax.diffusion import cond_masks, timesteps
from paris_jax.encoders import codecs
from paris_jax.encoders.published import EncoderStore
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.errors import UserError
from paris_jax.evaluation import companions, compute, folders, headline_figure, heldout, report, results, scores
from paris_jax.evaluation.cache import ResultCache
from paris_jax.evaluation.companions import Instruments
from paris_jax.evaluation.features import WeightFiles
from paris_jax.evaluation.heldout import Heldout
from paris_jax.evaluation.metrics import flow_loss, routing
from paris_jax.evaluation.metrics.attribute_classifier import WEIGHTS, AttributeClassifier, read_card
from paris_jax.evaluation.metrics.flow_loss import Losses, Points
from paris_jax.evaluation.metrics.motion import motion_and_flicker
from paris_jax.models.dit import video_tokens

logger = logging.getLogger(__name__)
RESULTS, REPORT, PARTIAL = "results.json", "report.html", ".partial"
SWEEP = "sweeps/sampling"  # below a run folder
MONOLITH, ROUTER = Role("monolith"), Role("router")
NO_FILES = WeightFiles()


def evaluate(experiment: Experiment, run: RunFolder, files: WeightFiles = NO_FILES) -> None:
    """Compares both models and writes RUN/evaluation/{results.json,report.html}.

    Args:
      files: weights of published networks to score with, too: FVD, CLIP score and so on.

    Each model's videos and losses are cached, so an interrupted evaluation resumes. A finished one is repeated only if
    sampling or evaluation settings or a network changed.

    Raises:
      UserError: an earlier command is missing, or there are too few held-out clips.
    """
    with locks.only_writer(run.evaluation):
        _evaluate(experiment, run, files)


def _evaluate(experiment: Experiment, run: RunFolder, files: WeightFiles) -> None:
    run.claim(experiment.to_dict(), experiment.hash)
    if not experiment.data.heldout_fraction:
        raise UserError(
            "config.data.heldout_fraction=0 holds out no clips for the evaluation; raise it, with a new --workdir"
        )
    check_ready(run)
    instruments = Instruments.load(files, experiment.data.num_frames)
    key = evaluation_hash(experiment, run, instruments)
    if manifest.exists(run.evaluation) and manifest.read(run.evaluation, EvaluationManifest).evaluation_hash == key:
        logger.info(
            "the evaluation is done already, with the same models, clips, settings and versions: %s",
            run.evaluation / REPORT,
        )
        return
    (run.evaluation / manifest.FILE_NAME).unlink(missing_ok=True)  # the old result is no longer valid
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    cache = ResultCache(run.evaluation / PARTIAL, key)
    with Progress(*columns) as progress:
        comparison = EvaluationRun(experiment, run, instruments, cache, progress)
        found, videos = comparison.results(key)
    manifest.write_json(run.evaluation / RESULTS, found)
    report.write_report(found, videos, run.evaluation / REPORT, comparison.ensemble.fps)
    figures = headline_figure.render(found)
    for name, data in figures.items():
        manifest.write_atomically(run.evaluation / name, data)
    names = [RESULTS, REPORT, *figures]
    manifest.write(run.evaluation, EvaluationManifest, names, experiment.hash, evaluation_hash=key)
    cache.clear()
    logger.info("%s", compute.describe(found["compute"]))
    logger.info("%s", results.headline(found["comparisons"]))
    logger.info("the evaluation is done: %s", run.evaluation / REPORT)


def check_ready(run: RunFolder) -> None:
    """Raises UserError if the held-out clips, ensemble or monolith are missing; names the command to run first."""
    for folder, name, command in (
        (run.test, "test split", "cluster"),
        (run.ensemble, "ensemble", "assemble"),
        (run.export(MONOLITH), "trained monolith", f"train {MONOLITH.arguments}"),
    ):
        if not manifest.exists(folder):
            stage, _, flags = command.partition(" ")
            command = " ".join(filter(None, [f"paris-jax {stage} --workdir={run}", flags]))
            raise UserError(f"There is no {name} at {folder}; run '{command}' first")


def evaluation_hash(experiment: Experiment, run: RunFolder, instruments: Instruments) -> str:
    """Returns the hash of everything that decides the scores: settings, both models, held-out clips and classifier."""
    folders = (run.ensemble, run.export(MONOLITH), run.test)
    inputs = {
        "sampling": dataclasses.asdict(experiment.sampling),
        "evaluation": dataclasses.asdict(experiment.evaluation),
        "folders": [manifest.hash_file(folder / manifest.FILE_NAME) for folder in folders],
        "classifier": read_card(),
        "classifier_weights": manifest.hash_file(WEIGHTS),
        "versions": {name: manifest.versions()[name] for name in ("paris-jax", "jax", "flax")},
        "instruments": instruments.describe(),
        "sweep": finished_sweep(run),
        "schema": results.SCHEMA,
    }
    return hashing.hash_text(hashing.canonical_json(inputs))


def finished_sweep(run: RunFolder) -> dict[str, Any] | None:
    """The scores of `evaluate --vary`, which the report shows, too; None where there is no sweep."""
    if not manifest.exists(run.path / SWEEP):
        return None
    manifest.read(run.path / SWEEP, EvaluationManifest)
    return manifest.read_json(run.path / SWEEP / RESULTS)


class EvaluationRun:
    """One evaluation: both models, the held-out clips, and the measurements."""

    def __init__(
        self,
        experiment: Experiment,
        run: RunFolder,
        instruments: Instruments,
        cache: ResultCache,
        progress: Progress,
    ):
        self.experiment, self.run, self.cache, self.progress = experiment, run, cache, progress
        self.instruments = instruments
        settings = experiment.evaluation
        sampling = dataclasses.asdict(experiment.sampling)
        store = EncoderStore()
        self.ensemble = Ensemble.load(run.ensemble, encoders=experiment.encoders, store=store)
        self.monolith = Ensemble.single(run.export(MONOLITH), experiment.encoders, store=store, **sampling)
        self.heldout = Heldout.order(read_records(run.test), settings.seed)
        # The Frechet distance compares with other real clips, as many as there are prompts.
        self.count = min(settings.num_clips, len(self.heldout) // 2)
        if self.count < 2:
            raise UserError(
                f"{run.test} holds {len(self.heldout)} clips and an evaluation needs at least 4; raise "
                "config.data.heldout_fraction or add clips, with a new --workdir"
            )
        self.prompts, self.others = self.heldout[: self.count], self.heldout[self.count : 2 * self.count]
        self.scored = self.heldout[: settings.num_loss_clips]
        self.routing: dict[str, Any] = {"routing": experiment.sampling.routing}
        if experiment.sampling.routing == "top_k":
            self.routing["top_k"] = min(experiment.sampling.top_k, len(self.ensemble.clusters))
        elif experiment.sampling.routing == "threshold":
            self.routing["threshold"] = experiment.sampling.threshold
        rules = ("routing", "top_k", "threshold")
        self.options = {name: value for name, value in sampling.items() if name not in rules}

    def results(self, key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns the contents of results.json (see evaluation/results.py) and the shown videos by model, uint8."""
        videos, routing = self._videos()
        losses = self._losses()
        classifier = AttributeClassifier.load()
        classified = {model: scores.ClassifiedVideos(classifier, v) for model, v in videos.items()}
        others = heldout.decode(self.ensemble, self.others.latents)
        of_others = scores.ClassifiedVideos(classifier, others)
        rows, by_attribute, left_out = self._scores(classified, of_others)
        both = {model: losses[model] for model in results.MODELS}
        moving = {model: motion_and_flicker(v) for model, v in videos.items()}
        rows += [*scores.flow(both), scores.motion({model: motion for model, (motion, _) in moving.items()})]
        rows += [scores.cond_frames(kind, self._cond_errors(kind, videos)) for kind in self.experiment.masks.kinds]
        more, missing = companions.rows(
            videos | {companions.OTHERS: others},
            self.prompts.captions,
            {model: c.features for model, c in classified.items()} | {companions.OTHERS: of_others.features},
            {model: flicker for model, (_, flicker) in moving.items()},
            self.instruments,
            self.cache,
            self.prompts.has_shapes_attributes,
        )
        num_clusters = self.experiment.clustering.num_clusters
        clusters, measured = self.scored.clusters, losses["experts"]
        shown = self.experiment.evaluation.num_shown
        found = {
            "schema": results.SCHEMA,
            "experiment": self.experiment.name,
            "config_hash": self.experiment.hash,
            "evaluation_hash": key,
            "complete": not left_out,
            "left_out": left_out,
            "protocol": self._protocol(),
            "notes": [*missing, *folders.degenerate(videos)],
            "sweep": finished_sweep(self.run),
            "comparisons": rows,
            "companions": more,
            **scores.flow_curves(both, self.scored.clusters, num_clusters),
            "attribute_accuracy": by_attribute,
            "router": scores.router(measured.probability, clusters),
            "experts": scores.experts(measured, self.ensemble.clusters, losses["ensemble"], clusters, num_clusters),
            "expert_use": scores.expert_use(routing, self.ensemble.clusters, self.prompts.clusters),
            "compute": self._compute(),
            "shown": scores.shown_clips(self.prompts, classified, routing, shown),
        }
        return found, {model: codecs.to_uint8(v[:shown]) for model, v in videos.items()}

    def _videos(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Samples both models; returns videos by model, "real" for the prompts' clips, and the routing (S, N, E)."""
        noise = np.asarray(self.ensemble.noise(self.count, self.experiment.evaluation.seed))
        videos = {"real": heldout.decode(self.ensemble, self.prompts.latents)}
        routing = np.zeros(0)
        for name, model, options in self._models():
            task = self.progress.add_task(f"sampling: {name}", total=self.count)

            def draw(model=model, options=options, task=task) -> dict[str, np.ndarray]:
                samples = heldout.sample(
                    model, self.prompts.captions, noise, options, lambda n: self.progress.advance(task, n)
                )
                return dict(zip(("videos", "routing"), samples, strict=True))

            samples = self.cache.get(f"samples-{name}", draw)
            self.progress.update(task, completed=self.count)
            folders.check_values(samples["videos"], name)
            videos[name] = samples["videos"]
            if name == "ensemble":
                routing = samples["routing"]
        return videos, routing

    def _models(self) -> tuple[tuple[str, Ensemble, dict[str, Any]], ...]:
        """Returns name, model and sampling options of ensemble and monolith."""
        return ("ensemble", self.ensemble, self.options | self.routing), ("monolith", self.monolith, self.options)

    def _cond_errors(self, kind: str, videos: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns each model's root-mean-square error (N,) on conditioning frames from the prompts' clips.

        "unconditioned" is the error of the ensemble's samples without conditioning frames.
        """
        count = min(self.count, heldout.BATCH)
        x_0 = jnp.asarray(self.ensemble.scale.normalise(self.prompts.latents[:count]))
        T = x_0.shape[1]
        mask = jnp.broadcast_to(cond_masks.of_kind(kind, T, prefix=T // 2), (count, T))
        clean = x_0
        if kind != "prefix" and self.prompts.cond_images is not None:
            images = self.ensemble.scale.normalise(self.prompts.cond_images[:count])
            clean = cond_masks.with_images(x_0, jnp.asarray(images))
        cond, frames = np.asarray(cond_masks.cond_input(clean, mask)), self.ensemble.codec.frames_of(np.asarray(mask))
        noise = np.asarray(self.ensemble.noise(self.count, self.experiment.evaluation.seed))[:count]

        def error(sampled: np.ndarray) -> np.ndarray:
            square = np.square(sampled[:count] - videos["real"][:count]).mean((2, 3, 4))
            return np.sqrt((square * frames).sum(1) / frames.sum(1))

        errors = {"unconditioned": error(videos["ensemble"])}
        for name, model, options in self._models():
            task = self.progress.add_task(f"conditioning frames ({kind}): {name}", total=count)

            def draw(model=model, options=options, task=task) -> dict[str, np.ndarray]:
                captions = self.prompts.captions[:count]
                sampled, _ = heldout.sample(
                    model, captions, noise, options, lambda n: self.progress.advance(task, n), cond
                )
                return {"errors": error(sampled)}

            errors[name] = self.cache.get(f"given-{kind}-{name}", draw)["errors"]
            self.progress.update(task, completed=count)
        return errors

    def _losses(self) -> dict[str, Any]:
        """Returns the losses of both models, and router and experts on their own, all at the same points."""
        settings = self.experiment.evaluation
        latents = self.ensemble.scale.normalise(self.scored.latents)
        points = Points.draw(latents, self.scored.ids, settings.loss_timesteps, settings.seed)
        captions, batches = self.scored.captions, flow_loss.num_batches(points)
        losses: dict[str, Any] = {}
        for name, model, options in (("ensemble", self.ensemble, self.routing), ("monolith", self.monolith, {})):
            advance = self._bar(f"held-out loss: {name}", batches)

            def measure(model=model, options=options, advance=advance) -> dict[str, np.ndarray]:
                velocity = heldout.velocity(model, captions, options)
                return dataclasses.asdict(flow_loss.heldout_losses(velocity, points, advance=advance))

            losses[name] = Losses(**self.cache.get(f"losses-{name}", measure))
        advance = self._bar("router and experts", batches)
        num_clusters = self.experiment.clustering.num_clusters

        def measure_experts() -> dict[str, np.ndarray]:
            route = heldout.route(self.ensemble, captions, num_clusters)
            each = {k: heldout.velocity(self.ensemble, captions, {"fixed_expert": k}) for k in self.ensemble.clusters}
            return dataclasses.asdict(routing.measure(route, each, points, num_clusters, advance=advance))

        losses["experts"] = routing.ExpertMeasurements(**self.cache.get("experts", measure_experts))
        return losses

    def _bar(self, name: str, total: int) -> Callable[[], None]:
        task = self.progress.add_task(name, total=total)
        return lambda: self.progress.advance(task)

    def _scores(
        self, classified: dict[str, scores.ClassifiedVideos], others: scores.ClassifiedVideos
    ) -> tuple[list, dict | None, list[str]]:
        """Returns the comparisons of attribute accuracy and Frechet distance, and the reasons for those left out."""
        rows, by_attribute, left_out = [], None, []
        note = ""
        if self.prompts.has_shapes_attributes:
            row, by_attribute = scores.attribute_accuracy(self.prompts.attributes, classified)
            rows.append(row)
        else:
            left_out.append("Attribute accuracy is left out: these clips do not have the attributes of the shapes.")
            note = "the classifier was trained on shapes only, so the distance means little for these clips"
        if self.count >= scores.MIN_CLIPS:
            rows.append(scores.frechet(classified, others, note))
        else:
            left_out.append(
                f"The Frechet distance (shapes classifier) is left out: it needs {scores.MIN_CLIPS} prompts and as "
                f"many other held-out clips; there are {len(self.heldout)} held-out clips and {self.count} prompts."
            )
        return rows, by_attribute, left_out

    def _compute(self) -> dict[str, Any]:
        def job(name: str, network: NetworkManifest) -> compute.TrainingCost:
            training = network.training
            if training is None:
                raise UserError(f"{name} has imported weights, whose training cost is not known; train it here")
            return compute.TrainingCost(name, training.steps, training.global_batch_size, training.flops_per_sample)

        experts = [
            job(f"expert {k}", network) for k, network in ensemble_manifest.expert_manifests(self.run.ensemble).items()
        ]
        monolith, router = (job(r.name, manifest.read(self.run.export(r), NetworkManifest)) for r in (MONOLITH, ROUTER))
        return compute.identity(experts, monolith, router)

    def _protocol(self) -> dict[str, Any]:
        sampling, settings, data = self.experiment.sampling, self.experiment.evaluation, self.experiment.data
        card = read_card()
        detail = "".join(f", {name} = {value}" for name, value in self.routing.items() if name != "routing")
        shape = " x ".join(map(str, heldout.decode(self.ensemble, self.prompts.latents[:1]).shape[1:4]))
        bins, latent = settings.loss_timesteps, self.ensemble.latent_shape
        shift = timesteps.resolve_shift(self.ensemble.timestep_shift, video_tokens(latent), latent[0])
        return {
            "prompts": self.count,
            "prompts from": "captions of the test split: clips of videos held out before clustering, clusters in "
            "natural proportion",
            "videos": f"{shape} (frames x height x width) at {self.ensemble.fps:g} fps, decoded once at the end",
            "split": f"test: {len(self.heldout)} clips of {len({video_of(clip) for clip in self.heldout.ids})} videos; "
            f"{data.heldout_fraction:.1%} of the videos held out before clustering, {data.validation_share:.0%} of "
            f"them for validation, seed {data.seed}",
            "weights": f"moving averages of the parameters, decay {self.experiment.training.ema_decay:g}",
            "noise": f"seed {settings.seed}; prompt i starts from the same noise in both models",
            "solver": f"{sampling.solver}, {sampling.num_inference_steps} steps, timestep shift {shift:g}",
            "guidance": f"{sampling.guidance_scale:g}, inside the merge, with the same weights for both branches",
            "routing": f"{sampling.routing}{detail}",
            "flow loss": f"{len(self.scored)} held-out clips x {bins} timesteps, one in each of {bins} equal bins; "
            f"noise and timesteps from (seed {settings.seed}, clip id)",
            "Frechet distance": f"{self.count} videos per model, {self.count} other held-out clips; "
            f"{card['features']} features of the shapes classifier; not FVD",
            "classifier": f"trained on {card['training_clips']:,} shapes; predicts all attributes of "
            f"{card['accuracy']['all']:.1%} of fresh clips correctly ({card['command']})",
            "intervals": "95 %, normal; jackknife over 16 groups of clips for the Frechet distance",
            **self.instruments.describe(),
            "device": jax.devices()[0].device_kind,
            "versions": manifest.versions(),
        }
