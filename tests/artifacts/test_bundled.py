"""The bundled ensemble is small, complete and as good as the README says."""

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


def test_bundled_ensemble_is_small_and_states_its_provenance():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 8e6 and max(sizes) < 2e6
    provenance = manifest.read(FOLDER, EnsembleManifest).provenance
    assert provenance["command"].startswith("paris-jax quickstart --config=configs/shapes.py:bundled ")
    assert set(provenance["seeds"]) == {"data", "clustering", "training", "router_training", "evaluation"}
    assert len(provenance["revision"]) == 40 and provenance["config"]["name"] == "shapes-bundled"


def test_experts_and_monolith_cost_the_same_compute(ensemble):
    assert ensemble.clusters == [0, 1, 2]

    def work(part):
        training = manifest.read(FOLDER / part, NetworkManifest, verify=True).training
        return training.steps * training.global_batch_size * training.flops_per_sample

    assert sum(work(f"experts/{k}") for k in range(3)) == work("monolith")


def test_most_samples_show_the_attributes_of_their_prompts(ensemble, exhaustive):
    rng = np.random.default_rng(11)
    requested = [shapes.draw_attributes(rng) for _ in range(64 if exhaustive else 32)]
    samples = ensemble.sample([shapes.caption(r) for r in requested], num_inference_steps=20, seed=1)
    _, predicted = AttributeClassifier.load().predict(samples.videos)
    accuracy = {
        name: np.mean([p[name] == r[name] for p, r in zip(predicted, requested, strict=True)])
        for name in shapes.ATTRIBUTES
    }
    assert min(accuracy[name] for name in ("world", "colour", "ground", "size", "speed")) > 0.9, accuracy
    assert accuracy["direction"] > 0.75 and accuracy["object"] > 0.55, accuracy
    all_correct = np.mean([all(p[name] == r[name] for name in r) for p, r in zip(predicted, requested, strict=True)])
    assert all_correct > 0.45  # 0.63 of 256 held-out prompts


def test_each_world_is_routed_to_an_expert_of_its_own(ensemble):
    """Any expert may serve any world, but no expert serves two."""
    rng = np.random.default_rng(12)
    requested = [shapes.draw_attributes(rng) for _ in range(18)]
    samples = ensemble.sample([shapes.caption(attributes) for attributes in requested], num_inference_steps=6)
    chosen = samples.routing.mean(0).argmax(-1)
    experts = {
        world: {int(k) for k, attributes in zip(chosen, requested, strict=True) if attributes["world"] == world}
        for world in shapes.WORLDS
    }
    assert all(len(k) == 1 for k in experts.values()) and len(set.union(*experts.values())) == 3, experts


def test_provenance_states_the_exact_command_and_config():
    config = files.load(files.embedded() + ":bundled")
    values = dict(config)
    provenance = make_bundled.provenance(values, values["sampling"], "a" * 40)
    assert provenance["command"] == "paris-jax quickstart --config=configs/shapes.py:bundled --workdir=runs/bundled"
    assert provenance["config"] == values
    other = make_bundled.provenance(values, values["sampling"] | {"num_inference_steps": 7}, "a" * 40)
    assert other["command"] == provenance["command"] + " --config.sampling.num_inference_steps=7"
    assert other["config"] == values | {"sampling": values["sampling"] | {"num_inference_steps": 7}}
    assert provenance["seeds"] == dict.fromkeys(("data", "clustering", "training", "router_training", "evaluation"), 0)
    with pytest.raises(UserError, match=r"config.name='mine': only runs of configs/shapes.py"):
        make_bundled.provenance(values | {"name": "mine"}, values["sampling"], "a" * 40)
