"""Trains the shapes classifier: `python -m paris_jax.evaluation.metrics.train_attribute_classifier`.

Takes about a quarter of an hour on one free CPU core; writes shapes_classifier.safetensors and its card beside this
file. Every clip is used once, with mild random blur, noise, contrast and brightness, so that the classifier also works
on imperfect clips.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from paris_jax.artifacts import manifest
from paris_jax.data.sources.clip import Clip
from paris_jax.data.sources.shapes import ATTRIBUTES, ShapesSource
from paris_jax.evaluation.metrics import attribute_classifier

COMMAND = "python -m paris_jax.evaluation.metrics.train_attribute_classifier"
FRESH_SEED = 1_000_003  # seed of the clips that measure accuracy; training uses the flag's


def main() -> None:
    """Trains the classifier, measures its accuracy on fresh clips, and writes the weights and the card."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--seed", type=int, default=20_000, help="seed of the clips and of the initial parameters")
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--fresh_clips", type=int, default=4000, help="number of clips that measure accuracy")
    flags = parser.parse_args()

    began = time.monotonic()
    parameters = train(flags.seed, flags.steps, flags.batch)
    parameters = {name: np.asarray(value, np.float16) for name, value in parameters.items()}
    seconds = time.monotonic() - began
    manifest.write_atomically(attribute_classifier.WEIGHTS, safetensors.numpy.save(parameters))

    card = {
        "what": "shapes classifier: reads back the attributes of the embedded shapes",
        "score": "Frechet distance (shapes classifier), which is not FVD",
        "licence": "Apache-2.0",
        "command": f"{COMMAND} --seed={flags.seed} --steps={flags.steps} --batch={flags.batch}",
        "seed": flags.seed,
        "training_clips": flags.steps * flags.batch,
        "training_seconds": round(seconds),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "parameters": int(sum(value.size for value in parameters.values())),
        "input": [attribute_classifier.FRAMES, attribute_classifier.HEIGHT, attribute_classifier.WIDTH, 3],
        "features": attribute_classifier.FEATURES,
        "generator_hash": attribute_classifier.generator_hash(),
        "attributes": ATTRIBUTES,
    }
    attribute_classifier.CARD.write_text(json.dumps(card, indent=2) + "\n")
    card["fresh_clips"] = {"seed": FRESH_SEED, "clips": flags.fresh_clips}
    card["accuracy"] = accuracy(attribute_classifier.AttributeClassifier.load(), FRESH_SEED, flags.fresh_clips)
    attribute_classifier.CARD.write_text(json.dumps(card, indent=2) + "\n")
    print(f"trained in {seconds:.0f} s; accuracy on {flags.fresh_clips} fresh clips: {card['accuracy']}")


def train(seed: int, steps: int, batch: int) -> attribute_classifier.Parameters:
    """Returns trained float32 parameters, averaged over the last steps."""
    key = jax.random.key(seed)
    parameters = attribute_classifier.initialise(key, ATTRIBUTES)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 50, steps), b2=0.98, weight_decay=1e-3)
    state = optimizer.init(parameters)
    averaged = parameters

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(parameters, state, averaged, key, video, labels):
        loss, gradient = jax.value_and_grad(_loss)(parameters, _degrade(key, video), labels)
        updates, state = optimizer.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        averaged = jax.tree.map(lambda a, p: a + 0.02 * (p - a), averaged, parameters)
        return parameters, state, averaged, loss

    began = time.monotonic()
    averaged = jax.tree.map(jnp.copy, parameters)
    training_batches = batches(seed, batch)
    for i in range(steps):
        video, labels = next(training_batches)
        parameters, state, averaged, loss = step(
            parameters, state, averaged, jax.random.fold_in(key, i + 1), video, labels
        )
        if i % 50 == 49:
            print(f"step {i + 1} of {steps}: loss {float(loss):.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return averaged


def batches(seed: int, batch: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields endless batches of new clips, three in five of them digits, which are by far the hardest to classify."""
    source = ShapesSource(
        seed, 1 << 40, attribute_classifier.FRAMES, attribute_classifier.HEIGHT, attribute_classifier.WIDTH, fps=8.0
    )
    clips = (source[i] for i in itertools.count())
    selected = (clip for i, clip in enumerate(clips) if clip.attributes["world"] == "digits" or i % 3 == 0)
    while True:
        yield stack([next(selected) for _ in range(batch)])


def stack(clips: list[Clip]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Stacks clips: video (B, 8, 20, 20, 3) uint8 and, for each attribute, the index of each clip's value."""
    labels = {
        name: np.array([values.index(clip.attributes[name]) for clip in clips]) for name, values in ATTRIBUTES.items()
    }
    return np.stack([clip.video for clip in clips]), labels


def _degrade(key: jax.Array, video: jax.Array) -> jax.Array:
    """Converts uint8 to [-1, 1] and adds blur, contrast, brightness and noise of random strength per clip."""
    x = video.astype(jnp.float32) / 127.5 - 1
    keys = jax.random.split(key, 5)
    shape = (len(x), 1, 1, 1, 1)
    padded = jnp.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
    rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
    blurred = (rows[:, :, :, :-2] + 2 * rows[:, :, :, 1:-1] + rows[:, :, :, 2:]) / 4
    # Half of the clips stay sharp, because the same network classifies real held-out clips.
    amount = jnp.clip(jax.random.uniform(keys[0], shape, minval=-0.6, maxval=0.6), 0)
    x = x + amount * (blurred - x)
    x = x * jax.random.uniform(keys[1], shape, minval=0.85, maxval=1.1)
    x = x + jax.random.uniform(keys[2], (len(x), 1, 1, 1, 3), minval=-0.06, maxval=0.06)
    strength = jnp.clip(jax.random.uniform(keys[3], shape, minval=-0.12, maxval=0.12), 0)
    return jnp.clip(x + strength * jax.random.normal(keys[4], x.shape), -1, 1)


def _loss(parameters: attribute_classifier.Parameters, x: jax.Array, labels: dict[str, jax.Array]) -> jax.Array:
    """Sum over attributes of the cross-entropy, with labels smoothed by 0.02."""
    _, logits = attribute_classifier.apply(parameters, x)
    losses = []
    for name, value in logits.items():
        smoothed = optax.smooth_labels(jax.nn.one_hot(labels[name], value.shape[-1]), 0.02)
        losses.append(optax.softmax_cross_entropy(value, smoothed).mean())
    return jnp.stack(losses).sum()


def accuracy(trained: attribute_classifier.AttributeClassifier, seed: int, count: int) -> dict[str, float]:
    """Returns the share of clean fresh clips that are classified correctly, by attribute and for "all" at once."""
    source = ShapesSource(
        seed, count, attribute_classifier.FRAMES, attribute_classifier.HEIGHT, attribute_classifier.WIDTH, fps=8.0
    )
    video, labels = stack(list(source))
    _, predicted = trained.predict(video.astype(np.float32) / 127.5 - 1)
    correct = {
        name: np.array([p[name] == ATTRIBUTES[name][label] for p, label in zip(predicted, labels[name], strict=True)])
        for name in ATTRIBUTES
    }
    correct["all"] = np.all(list(correct.values()), axis=0)
    return {name: round(float(hits.mean()), 4) for name, hits in correct.items()}


if __name__ == "__main__":
    main()
