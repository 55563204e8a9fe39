"""The ensemble that ships: small enough, complete, and true to what the README says of it."""

from pathlib import Path

import numpy as np
import pytest

from paris_jax import Ensemble
from paris_jax.artifacts import ensemble_manifest, make_bundled, manifest
from paris_jax.artifacts.schemas import EnsembleManifest, NetworkManifest
from paris_jax.config import files
from paris_jax.data.sources import shapes
from paris_jax.errors import UserError
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier

FOLDER = Path(ensemble_manifest.BUNDLED_FOLDER / "shapes")


@pytest.fixture(scope="module")
def ensemble():
    return Ensemble.load("bundled:shapes")


def test_it_ships_within_its_size_with_how_it_was_made():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 8e6 and max(sizes) < 2e6
    made = manifest.read(FOLDER, EnsembleManifest).provenance
    assert made["command"].startswith("paris-jax quickstart --config=configs/shapes.py:bundled ")
    assert set(made["seeds"]) == {"data", "clustering", "training", "router_training", "evaluation"}
    assert len(made["revision"]) == 40 and made["config"]["name"] == "shapes-bundled"


def test_both_arms_are_there_and_cost_the_same(ensemble):
    assert ensemble.clusters == [0, 1, 2]

    def work(part):
        training = manifest.read(FOLDER / part, NetworkManifest, verify=True).training
        return training.steps * training.global_batch_size * training.flops_per_sample

    assert sum(work(f"experts/{k}") for k in range(3)) == work("monolith")


def test_it_shows_the_right_thing_in_the_right_colour_moving_the_right_way_for_most_prompts(ensemble):
    rng = np.random.default_rng(11)
    asked = [shapes.draw_attributes(rng) for _ in range(64)]
    samples = ensemble.sample([shapes.caption(a) for a in asked], num_inference_steps=20, seed=1)
    _, seen = AttributeClassifier.load().look(samples.videos)
    right = {
        name: np.mean([s[name] == a[name] for s, a in zip(seen, asked, strict=True)]) for name in shapes.ATTRIBUTES
    }
    assert min(right[name] for name in ("world", "colour", "ground", "size", "speed")) > 0.9, right
    assert right["direction"] > 0.75 and right["object"] > 0.55, right
    everything = np.mean([all(s[name] == a[name] for name in a) for s, a in zip(seen, asked, strict=True)])
    assert everything > 0.45  # 0.63 of 256 held-out prompts


def test_each_prompt_is_answered_by_the_expert_of_its_world(ensemble):
    """Which expert knows which world is left open; each world must have one of its own."""
    rng = np.random.default_rng(12)
    asked = [shapes.draw_attributes(rng) for _ in range(18)]
    samples = ensemble.sample([shapes.caption(a) for a in asked], num_inference_steps=6)
    chosen = samples.routing.mean(0).argmax(-1)
    experts = {
        world: {int(k) for k, a in zip(chosen, asked, strict=True) if a["world"] == world} for world in shapes.WORLDS
    }
    assert all(len(k) == 1 for k in experts.values()) and len(set.union(*experts.values())) == 3, experts


def test_what_is_shipped_says_how_it_was_made():
    config = files.load(files.embedded() + ":bundled")
    given = dict(config)
    made = make_bundled.provenance(given, given["sampling"], "a" * 40)
    assert made["command"] == "paris-jax quickstart --config=configs/shapes.py:bundled --workdir=runs/bundled"
    assert made["config"] == given
    other = make_bundled.provenance(given, given["sampling"] | {"num_inference_steps": 7}, "a" * 40)
    assert other["command"] == made["command"] + " --config.sampling.num_inference_steps=7"
    assert other["config"] == given | {"sampling": given["sampling"] | {"num_inference_steps": 7}}
    assert made["seeds"] == dict.fromkeys(("data", "clustering", "training", "router_training", "evaluation"), 0)
    with pytest.raises(UserError, match=r"config.name='mine': only runs of configs/shapes.py"):
        make_bundled.provenance(given | {"name": "mine"}, given["sampling"], "a" * 40)
