"""Tries settings of the paper's claim in one process: experts against a monolith of the same compute.

    python -m tests.benchmarks.claim [--config=configs/shapes.py:tiny] [--split=world]
        [--num_prompts=1000] [--guidance=1.5,3] [--skip=monolith] [--measure_at=0.25,0.5,1] [--config.a.b=value ...]

Every world of the embedded data, or every `--split`, has an expert, and each prompt is sampled by the expert of its
own (oracle routing): there is no clustering, router, checkpoint or report, so that a trial takes minutes. A result that
counts comes from `paris-jax quickstart`. Prints a line of JSON for each model and fraction of its steps: held-out flow
loss, and by guidance scale the Frechet distance (shapes classifier) with the floor of real clips and the share of
prompts whose attributes are right. Fractions below 1 are comparable under `training.lr_schedule=wsd`.

    world       an expert for each world
    size        for each world and size of the object
    object      for two to four objects each
    random      three random sets of clips
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from paris_jax.artifacts.run_folder import Role
from paris_jax.config import files
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import text_encoder
from paris_jax.data.sources.shapes import WORLDS, ShapesSource
from paris_jax.diffusion import path, predictions, timesteps
from paris_jax.encoders import codecs, text
from paris_jax.encoders.codecs import LatentScale
from paris_jax.evaluation.metrics import attribute_accuracy
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.evaluation.metrics.frechet import frechet_distance
from paris_jax.local_jobs.devices import keep_freed_memory
from paris_jax.models import functional
from paris_jax.models.dit import video_tokens
from paris_jax.training import state as states
from paris_jax.training.job import Job, compute_dtype, job_of
from paris_jax.training.step import StepInputs, make_step

SCAN = 50  # steps per call of the compiled loop
BATCH = 32  # prompts per call of the sampler
OBJECTS = {name: number for number, names in enumerate((
    ("circle", "square"), ("triangle", "cross"), ("striped ball", "checked tile", "ringed disc"),
    ("zero", "one", "two"), ("three", "four", "five", "six"), ("seven", "eight", "nine"),
)) for name in names}  # fmt: skip
Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Data:
    """Clips of the embedded shapes, encoded; the last `heldout` of them are not trained on."""

    arrays: Arrays  # fields of a batch, of all clips
    attributes: list[dict[str, str]]
    scale: LatentScale
    heldout: int

    def members(self, split: str) -> np.ndarray:
        """The expert of every clip, (N,)."""
        if split == "random":
            return np.random.default_rng(1).integers(0, 3, len(self.attributes))
        number = {
            "world": lambda a: WORLDS.index(a["world"]),
            "size": lambda a: 2 * WORLDS.index(a["world"]) + (a["size"] == "large"),
            "object": lambda a: OBJECTS[a["object"]],
        }[split]
        return np.array([number(a) for a in self.attributes])


def read(experiment: Experiment, heldout: int) -> Data:
    """Draws and encodes the clips of an experiment, and `heldout` more."""
    settings = experiment.data
    sizes = settings.num_frames, settings.height, settings.width
    source = ShapesSource(settings.seed, settings.num_clips + heldout, *sizes, settings.fps)
    codec = codecs.codec(**dataclasses.asdict(experiment.codec))
    clips = [source[i] for i in range(len(source))]
    latents = np.concatenate([
        codec.encode(np.stack([clip.video for clip in clips[i : i + 500]])).astype(np.float16)
        for i in range(0, len(clips), 500)
    ])  # fmt: skip
    sample = latents[:4000].astype(np.float32)
    words = sorted({word for clip in clips for word in clip.caption.split()})
    encodings = text_encoder(experiment, words).encode([clip.caption for clip in clips])
    length = np.array([len(e.tokens) for e in encodings], np.int32)
    tokens = np.zeros((len(clips), length.max(), encodings[0].tokens.shape[-1]), np.float16)
    for row, encoding in zip(tokens, encodings, strict=True):
        row[: len(encoding.tokens)] = encoding.tokens
    arrays = {"latent": latents, "tokens": tokens, "length": length, "pooled": np.stack([e.pooled for e in encodings])}
    scale = LatentScale((float(sample.mean()),), (float(sample.std()),))
    return Data({k: jnp.asarray(v) for k, v in arrays.items()}, [dict(c.attributes) for c in clips], scale, heldout)


def jitted_loop(job: Job, scale: LatentScale) -> Any:
    """`SCAN` training steps on clips of the given numbers, jitted."""
    settings = job.settings
    step = make_step(job.losses, job.config, settings, job.steps, job.timestep_sampler, job.masks)
    inputs = StepInputs.of(settings, scale)

    def loop(state: Any, clips: jax.Array, arrays: Arrays) -> Any:
        def one(state: Any, numbers: jax.Array) -> Any:
            batch = {name: values[numbers] for name, values in arrays.items()} | {"index": numbers}
            return step(state, batch, inputs)[0], None

        return jax.lax.scan(one, state, clips)[0]

    return jax.jit(loop, donate_argnums=0)


def train(
    job: Job, loop: Any, data: Data, clips: np.ndarray, fractions: Sequence[float]
) -> Iterator[functional.Params]:
    """Trains on these clips, in a new order every epoch; yields the average after fractions of the steps."""
    settings = job.settings
    state = jax.jit(lambda key: states.create(job.config, settings, job.steps, key))(jax.random.key(settings.seed))
    if settings.init_from:
        state = states.load_initial_weights(settings.init_from, state)
    rng, order = np.random.default_rng(settings.seed), np.zeros(0, np.int64)
    pending = [round(fraction * job.steps) for fraction in fractions]
    for first in range(0, job.steps, SCAN):
        count = min(SCAN, job.steps - first) * settings.global_batch_size
        while len(order) < count:
            order = np.concatenate([order, rng.permutation(clips)])
        numbers, order = order[:count], order[count:]
        state = loop(state, jnp.asarray(numbers.reshape(-1, settings.global_batch_size), jnp.int32), data.arrays)
        while pending and pending[0] <= first + SCAN:
            yield jax.tree.map(jnp.copy, state.ema)  # the loop donates its state
            del pending[0]


class Measurement:
    """Held-out loss, samples and their scores of a model whose expert of every clip is known."""

    def __init__(self, experiment: Experiment, job: Job, data: Data, num_prompts: int):
        self.experiment, self.job, self.data = experiment, job, data
        self.codec, self.classifier = codecs.codec(**dataclasses.asdict(experiment.codec)), AttributeClassifier.load()
        first = len(data.attributes) - data.heldout
        self.prompts, others = (
            np.arange(first, first + num_prompts),
            np.arange(first + num_prompts, first + data.heldout),
        )
        decode = lambda clips: np.asarray(self.codec.decode(data.arrays["latent"][clips].astype(jnp.float32)))  # noqa: E731
        self.real, _ = self.classifier.predict(decode(others[:num_prompts]))
        self.floor = frechet_distance(self.classifier.predict(decode(self.prompts))[0], self.real)
        rng = np.random.default_rng(5)
        self.noise = rng.standard_normal((num_prompts, *job.latent_shape), np.float32)
        self.t = np.asarray(job.timestep_sampler.draw(jax.random.split(jax.random.key(9), num_prompts)))
        steps = experiment.sampling.num_inference_steps
        shift = timesteps.resolve_shift(
            experiment.diffusion.timestep_shift, video_tokens(job.latent_shape), job.latent_shape[0]
        )
        schedule = timesteps.timestep_schedule(steps, shift)

        def velocity(params, x, t, tokens, length, pooled):
            network = lambda x, t: functional.apply(job.config, params, x, t, tokens, length, pooled)  # noqa: E731
            return predictions.velocity(job.config.prediction_type, network, x, t)

        def loss(params, noise, t, x_0, *condition):
            x_0 = data.scale.normalise(x_0)
            error = velocity(params, path.interpolate(x_0, noise, t), t, *condition) - path.velocity(x_0, noise)
            return jnp.square(error).mean((1, 2, 3, 4))

        def draw(params, noise, scale, tokens, length, pooled):
            null = jnp.zeros_like(tokens), jnp.ones_like(length), jnp.zeros_like(pooled)

            def step(x, times):
                t, t_next = times
                t_B = jnp.full(len(x), t)
                v, v_null = velocity(params, x, t_B, tokens, length, pooled), velocity(params, x, t_B, *null)
                return x + (t_next - t) * (v_null + scale * (v - v_null)), None

            return data.scale.denormalise(jax.lax.scan(step, noise, (schedule[:-1], schedule[1:]))[0])

        self._loss, self._draw = jax.jit(loss), jax.jit(draw)

    def __call__(self, experts: Mapping[int, functional.Params], members: np.ndarray, scales: Sequence[float]) -> Any:
        """Scores of a model by guidance scale; `members` is the expert of every clip."""
        rows, losses = {}, np.zeros(len(self.prompts))
        samples = {scale: np.zeros_like(self.noise) for scale in scales}
        for k, params in experts.items():
            own = np.flatnonzero(members[self.prompts] == k)
            for start in range(0, len(own), BATCH):
                i = own[np.minimum(np.arange(start, start + BATCH), len(own) - 1)]
                batch = {name: values[self.prompts[i]] for name, values in self.data.arrays.items()}
                x_0, *condition = batch["latent"], batch["tokens"], batch["length"], batch["pooled"]
                losses[i] = self._loss(params, self.noise[i], self.t[i], x_0, *condition)
                for scale in scales:
                    samples[scale][i] = self._draw(params, self.noise[i], scale, *condition)
        expected = [self.data.attributes[i] for i in self.prompts]
        for scale, latents in samples.items():
            videos = np.clip(np.asarray(self.codec.decode(latents)), -1, 1)
            found, predicted = self.classifier.predict(videos)
            distance = frechet_distance(found, self.real)
            right = {k: round(float(v.mean()), 3) for k, v in attribute_accuracy.hits(expected, predicted).items()}
            rows[scale] = {"frechet": round(distance, 2), "floor": round(self.floor, 2), "right": right}
        return {"loss": round(float(losses.mean()), 4), "guidance": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=files.EXAMPLE.partition("=")[2])
    parser.add_argument("--split", choices=("world", "size", "object", "random"), default="world")
    parser.add_argument("--num_prompts", type=int, default=1000)
    parser.add_argument("--guidance", default="1.5,3", help="guidance scales")
    parser.add_argument("--skip", choices=("monolith", "experts"), default="")
    parser.add_argument("--measure_at", default="1", help="fractions of the steps, ascending")
    flags, rest = parser.parse_known_args()
    keep_freed_memory()
    config = files.load(flags.config)
    files.change(config, [argument.removeprefix("--config.") for argument in rest])
    experiment = Experiment.from_config(config)
    data = read(experiment, 2 * flags.num_prompts)
    members, count = data.members(flags.split), len(data.attributes) - data.heldout
    K, widths = int(members.max()) + 1, text.widths_of(experiment)
    shape, length = codecs.latent_shape(experiment), data.arrays["tokens"].shape[1]
    dtype = compute_dtype(experiment.training.compute_dtype, jax.default_backend())
    expert = job_of(experiment, epath.Path("."), Role("expert", 0), shape, widths, length, dtype)
    monolith = dataclasses.replace(expert, steps=K * expert.steps)
    measure = Measurement(experiment, expert, data, flags.num_prompts)
    scales = [float(scale) for scale in flags.guidance.split(",")]
    fractions = [float(fraction) for fraction in flags.measure_at.split(",")]
    print(json.dumps({"experts": K, "parameters": functional.count(expert.config), "changes": rest}), flush=True)
    everything, alone = np.arange(count), np.zeros_like(members)
    for name in ("monolith", "experts"):
        if name == flags.skip:
            continue
        job = monolith if name == "monolith" else expert
        loop, own = jitted_loop(job, data.scale), alone if name == "monolith" else members
        clips = [everything] if name == "monolith" else [everything[members[:count] == k] for k in range(K)]
        trainings = [train(job, loop, data, numbers, fractions) for numbers in clips]
        seconds = 0.0
        for fraction in fractions:  # experts take turns, so that the curve appears as it is measured
            began = time.perf_counter()
            models = {k: jax.block_until_ready(next(training)) for k, training in enumerate(trainings)}
            seconds += time.perf_counter() - began
            row = {"model": name, "fraction": fraction, "seconds": round(seconds), **measure(models, own, scales)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
