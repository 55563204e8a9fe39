"""Experts of different prediction types in one ensemble: merged as velocities, distinguished by their manifests."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax import Ensemble, cli
from paris_jax.artifacts import ensemble_manifest, exported, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import NetworkManifest
from paris_jax.commands.assemble import assemble
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.diffusion import path
from paris_jax.diffusion.predictions import PREDICTIONS
from paris_jax.ensemble import sparse_velocity
from paris_jax.ensemble.routing import Routing
from paris_jax.ensemble.sparse_velocity import EnsembleParams, SamplerConfig
from paris_jax.errors import UserError
from tests.artifacts.test_exported import edit_manifest
from tests.ensemble.test_mixture import (
    MIXTURE,
    GaussianPosterior,
    GaussianVelocity,
    condition_of,
    inputs,
    marginal_velocity,
    mixture_arrays,
)


@dataclasses.dataclass(frozen=True)
class GaussianNoise:
    """E[e | x_s] on the cosine path for N(mean, std^2), as an expert."""

    prediction_type: str = "noise"
    cond_frames: bool = False

    def apply(self, params, x, s, tokens, length, pooled):
        angle = s.reshape(-1, 1, 1, 1, 1) * jnp.pi / 2
        data, noise = jnp.cos(angle), jnp.sin(angle)
        return noise * (x - data * params["mean"]) / (data**2 * params["std"] ** 2 + noise**2)


@dataclasses.dataclass(frozen=True)
class GaussianData(GaussianVelocity):
    """E[x_0 | x_t] for N(mean, std^2), as an expert."""

    prediction_type: str = "x0"

    def apply(self, params, x, t, *text):
        return path.data_from_velocity(x, super().apply(params, x, t, *text), t)


def mixed_arrays(kinds):
    """The exact mixture's experts, stacked by kind."""
    pick = lambda which: {k: MIXTURE[k][jnp.array(which)] for k in ("mean", "std")}  # noqa: E731
    stacks = tuple(pick([e for e, kind in enumerate(kinds) if kind == k]) for k in sorted(set(kinds)))
    return EnsembleParams(stacks, MIXTURE, jnp.arange(3, dtype=jnp.int32))


@pytest.mark.parametrize("kinds", [(0, 1, 0), (1, 1, 0), (0, 2, 1), (0, 0, 0)])
@pytest.mark.parametrize("routing", [Routing("full"), Routing("top_k", 2)])
def test_exact_experts_of_every_kind_give_the_same_flow_as_of_one(kinds, routing):
    x, t, text = inputs()
    networks = (GaussianVelocity(), GaussianNoise(), GaussianData())[: max(kinds) + 1]
    places = tuple((kind, kinds[:e].count(kind)) for e, kind in enumerate(kinds))
    mixed = SamplerConfig(networks, places, GaussianPosterior(), routing)
    v, _ = sparse_velocity.ensemble_velocity(mixed, mixed_arrays(kinds), x, t, condition_of(text), jnp.int32(0))
    pure = SamplerConfig(networks[:1], ((0, 0), (0, 1), (0, 2)), GaussianPosterior(), routing)
    expected, _ = sparse_velocity.ensemble_velocity(pure, mixture_arrays(), x, t, condition_of(text), jnp.int32(0))
    np.testing.assert_allclose(v, expected, atol=2e-5)
    if routing.rule == "full":
        np.testing.assert_allclose(v, marginal_velocity(x, t), atol=2e-5)


@pytest.fixture(scope="module")
def noisy(micro, clustered, tmp_path_factory):
    """Another team's run on the same clusters: expert 1, wider, trained on DDPM's objective."""
    folder = tmp_path_factory.mktemp("noisy") / "run"
    shutil.copytree(clustered.partition, folder / "partition")  # nothing else is needed
    run = RunFolder(folder)
    values = micro.to_dict()
    values["training"]["prediction_type"] = "noise"
    values["network"].update(hidden=96, heads=6)
    train(Experiment.from_config(values), run, Role("expert", 1))
    return run


def test_an_expert_of_another_run_size_and_objective_is_admitted_and_sampled(micro, finished, noisy):
    theirs = noisy.export(Role("expert", 1))
    found = manifest.read(theirs, NetworkManifest)
    assert found.network.prediction_type == "noise" and found.network.hidden == 96
    assert found.conventions.prediction == PREDICTIONS["noise"]
    assemble(micro, finished, elsewhere={1: theirs})
    ensemble = Ensemble.load(finished.ensemble)
    assert {network.prediction_type for network in ensemble._placed.networks} == {"velocity", "noise"}
    prompt = ["a large red circle moving right fast on a white ground"]
    samples = ensemble.sample(prompt, num_inference_steps=3, routing="full")
    assert np.isfinite(samples.videos).all()
    # Forced, it is that network through the conversion, and no other.
    x, text = ensemble.noise(1), ensemble.encode(prompt)
    alone = Ensemble.single(theirs)
    v = [e.velocity(x, jnp.array([0.7]), text, fixed_expert=1) for e in (ensemble, alone)]
    np.testing.assert_allclose(*v, atol=1e-5)
    assert [m.network.prediction_type for m in ensemble_manifest.expert_manifests(finished.ensemble).values()] == [
        *("velocity", "noise", "velocity")
    ]


def test_parts_of_another_partition_are_refused(micro, finished, noisy, tmp_path, capsys):
    shutil.copytree(noisy.export(Role("expert", 1)), tmp_path / "part")
    edit_manifest(tmp_path / "part", lambda m: m.update(partition="0" * 64))
    with pytest.raises(UserError, match=r"its partition is '0+' instead of .* trained on one partition"):
        assemble(micro, finished, elsewhere={1: tmp_path / "part"})
    with pytest.raises(UserError, match="is the expert of cluster 1, not of cluster 2"):
        assemble(micro, finished, elsewhere={2: noisy.export(Role("expert", 1))})
    with pytest.raises(UserError, match=r"--expert=7:...: this experiment has clusters 0 to 2"):
        assemble(micro, finished, elsewhere={7: noisy.export(Role("expert", 1))})
    with pytest.raises(UserError, match="does not exist"):
        assemble(micro, finished, elsewhere={1: tmp_path / "nothing"})
    workdir = f"--workdir={finished}"
    for given, said in (
        (["--expert=1:a", "--expert=1:b"], "cluster 1 is given twice"),
        (["--expert=²:a"], "must be a cluster and a folder"),
        (["--expert=1"], "must be a cluster and a folder"),
    ):
        assert cli.run(["assemble", workdir, *given]) == 1
        assert said in capsys.readouterr().err


def test_an_expert_that_cannot_be_given_frames_is_refused_where_the_run_gives_some(micro, finished, noisy, tmp_path):
    shutil.copytree(noisy.export(Role("expert", 1)), tmp_path / "part")
    part = exported.read(tmp_path / "part")
    params = {name: leaf for name, leaf in part.params.items() if name != "cond_in"}
    content = {
        k: getattr(part.manifest, k)
        for k in (*ensemble_manifest.SHARED, "role", "cluster", "training")
        if k != "conventions"
    }
    without = dataclasses.replace(part.config, cond_frames=False)
    exported.write(tmp_path / "deaf", without, params, "", "float32", **content)
    with pytest.raises(UserError, match=r"was trained without config\.masks and cannot be given frames"):
        assemble(micro, finished, elsewhere={1: tmp_path / "deaf"})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["conventions"].update(prediction="score"),
        lambda m: m["network"].update(prediction_type="score"),
        lambda m: m["network"].update(prediction_type="velocity"),
    ],
)
def test_contradictory_or_unknown_prediction_types_are_refused(noisy, tmp_path, change):
    shutil.copytree(noisy.export(Role("expert", 1)), tmp_path / "part")
    edit_manifest(tmp_path / "part", change)
    with pytest.raises(UserError, match="this version knows velocity, noise"):
        exported.read(tmp_path / "part")


def test_a_cluster_of_other_data_is_refused(micro, clustered, tmp_path):
    shutil.copytree(clustered.partition, tmp_path / "partition")
    values = micro.to_dict()
    values["data"]["seed"] = 5
    with pytest.raises(UserError, match="was made with other data, codec, text, features or clustering"):
        train(Experiment.from_config(values), RunFolder(tmp_path), Role("expert", 1))


def test_a_noise_expert_learns(micro, noisy):
    """The converted velocity of a trained expert is better than knowing nothing, at every time."""
    from paris_jax.training.metrics import read

    lines = read(noisy.metrics(Role("expert", 1)))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert jax.tree.all(jax.tree.map(np.isfinite, lines[-1]))
