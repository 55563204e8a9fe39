"""Training from initial weights: they are the first parameters on every mesh, or are refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from paris_jax.artifacts import exported, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import NetworkManifest
from paris_jax.artifacts.tensors import Tensors
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.config.network import NetworkSettings
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.training.job import make_job, read_cluster
from paris_jax.training.state import check_initial_weights, initial_weights_hashes
from paris_jax.training.step import ShardedStep
from paris_jax.weights import convert

EXPERT = Role("expert", 0)
# The network of configs/shapes.py:bundled.
SHIPPED = functional.network_config(NetworkSettings(), channels=24, text_width=64, pooled_width=64)


@pytest.fixture
def start(trained, tmp_path):
    """Another run's expert."""
    shutil.copytree(trained.export(EXPERT), tmp_path / "start")
    return tmp_path / "start"


def changed(micro, **training):
    values = micro.to_dict()
    values["training"].update(training)
    return Experiment.from_config(values)


def job_of(experiment, run):
    return make_job(experiment, run, EXPERT, read_cluster(run.cluster(0), experiment, run))


def test_parameters_and_their_average_start_as_the_initial_weights(micro, run, start):
    state = ShardedStep(job_of(changed(micro, init_from=str(start)), run)).first_state()
    expected = functional.to_names(exported.read(start).params)
    for tree in (state.params, state.ema):
        for name, leaf in functional.to_names(tree).items():
            np.testing.assert_array_equal(leaf, expected[name])
    assert int(state.step) == 0
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.opt_state[1]) if leaf.ndim)


def test_training_starts_from_initial_weights_and_records_their_hashes(micro, run, start):
    experiment = changed(micro, init_from=str(start), steps=4, warmup_steps=1)
    shutil.copytree(run.partition, start.parent / "other" / "partition")
    run = RunFolder(start.parent / "other")
    train(experiment, run, EXPERT)
    recorded = manifest.read(run.export(EXPERT), NetworkManifest).training.init_from
    assert recorded == {"model.safetensors": manifest.hash_file(start / "model.safetensors")}
    # A started job no longer needs them, and their folder is not part of the config hash.
    shutil.rmtree(start)
    job = job_of(experiment, run)
    assert initial_weights_hashes(run, EXPERT, job) == recorded
    assert changed(micro, init_from="elsewhere", steps=4, warmup_steps=1).hash == experiment.hash


def test_an_input_for_frames_that_an_imported_network_lacks_is_zero_initialised(micro, run, start):
    """FLUX.1-dev initialises a video expert so: every shared array is read, the others are zero."""
    config = dataclasses.replace(exported.read(start).config, cond_frames=False)
    source = start.parent / "flux.safetensors"
    convert.export_network(Tensors(start / "model.safetensors"), config, "bfl", source, lambda: None)
    tensors, folder = Tensors(source), start.parent / "imported"
    convert.import_network(
        tensors, config, convert.check(tensors, config, "bfl"), folder, "x", "bfloat16", lambda: None
    )
    state = ShardedStep(job_of(changed(micro, init_from=str(folder)), run)).first_state()
    assert not np.any(state.params["cond_in"]["kernel"])
    exact = exported.read(start).params["single_blocks"]["qkv_mlp"]["kernel"]
    np.testing.assert_allclose(state.params["single_blocks"]["qkv_mlp"]["kernel"], exact, rtol=1e-2)


def test_another_network_is_refused_by_its_fields(micro, run, start):
    values = micro.to_dict()
    values["training"]["init_from"] = str(start)
    values["network"].update(hidden=96, heads=6)
    with pytest.raises(UserError, match="holds another network: hidden 64 instead of 96, heads 4 instead of 6; choose"):
        check_initial_weights(start, job_of(Experiment.from_config(values), run).config)
    with pytest.raises(UserError, match="does not exist"):
        check_initial_weights(start / "nothing", job_of(micro, run).config)
    with pytest.raises(UserError, match="There is no 'bundled:nothing' in this package; it ships bundled:"):
        check_initial_weights("bundled:nothing", job_of(micro, run).config)
    without = dataclasses.replace(job_of(micro, run).config, cond_frames=False)
    with pytest.raises(UserError, match=r"has an input for conditioning frames; set config\.masks"):
        check_initial_weights(start, without)


def test_training_can_start_from_a_network_that_ships_with_the_package():
    folder = "bundled:shapes/monolith"
    config = exported.network(check_initial_weights(folder, SHIPPED), folder)
    assert config == dataclasses.replace(SHIPPED, dtype=config.dtype)


def test_a_router_with_initial_weights_is_refused(micro):
    values = micro.to_dict()
    values["router_training"]["init_from"] = "weights"
    with pytest.raises(
        UserError, match=r"config\.router_training\.init_from='weights': a router starts from fresh parameters"
    ):
        Experiment.from_config(values)
