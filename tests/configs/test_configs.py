"""Every config file: each variant is accepted and documented, and Paris 2.0's recipe holds together at full size."""

import functools
import importlib.util
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import prepare
from paris_jax.diffusion import timesteps
from paris_jax.encoders import codecs, text
from paris_jax.errors import UserError
from paris_jax.evaluation import compute
from paris_jax.models import flops, functional
from paris_jax.models.dit import PATCH
from paris_jax.training import state
from paris_jax.training.losses import TimestepSampler, expert_losses, router_losses
from paris_jax.training.step import make_step

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(path.name for path in FOLDER.glob("*.py"))


@functools.cache
def load(name):
    spec = importlib.util.spec_from_file_location(f"config_{Path(name).stem}", FOLDER / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VARIANTS = [(name, variant) for name in FILES for variant in load(name).VARIANTS]


@pytest.mark.parametrize("name, variant", VARIANTS)
def test_every_variant_is_accepted(name, variant):
    experiment = Experiment.from_config(load(name).get_config(variant))
    assert variant in experiment.name
    T, H, W, _ = codecs.latent_shape(experiment)
    assert T >= 1 and H % PATCH == 0 and W % PATCH == 0


@pytest.mark.parametrize("name", FILES)
def test_every_config_documents_its_cost_and_command(name):
    module = load(name)
    assert len(module.__doc__.splitlines()) > 3
    assert "paris-jax" in module.__doc__ or "launch/" in module.__doc__
    assert module.get_config.__doc__
    assert module.get_config().name in [module.get_config(variant).name for variant in module.VARIANTS]


@pytest.mark.parametrize("name", FILES)
def test_variants_of_a_file_do_not_touch_each_other(name):
    module = load(name)
    for variant in module.VARIANTS:
        before = module.get_config(variant).to_dict()
        for other in module.VARIANTS:
            module.get_config(other)
        assert module.get_config(variant).to_dict() == before


# Paris 2.0. Everything below is abstract: no array of these sizes is made.


@pytest.fixture(scope="module")
def paris2():
    return Experiment.from_config(load("paris2.py").get_config())


@pytest.fixture(scope="module")
def network(paris2):
    tokens, pooled = text.widths_of(paris2)
    return functional.network_config(
        paris2.network,
        channels=codecs.latent_shape(paris2)[-1],
        text_width=tokens,
        pooled_width=pooled,
        dtype="bfloat16",
        remat=paris2.network.remat,
    )


@pytest.fixture(scope="module")
def router(paris2):
    return functional.router_config(
        paris2.router,
        channels=codecs.latent_shape(paris2)[-1],
        pooled_width=text.widths_of(paris2)[1],
        clusters=paris2.clustering.num_clusters,
        dtype="bfloat16",
    )


def test_paris2_has_the_published_sizes(paris2, network, router):
    assert paris2.clustering.num_clusters == 3
    assert codecs.latent_shape(paris2) == (9, 32, 32, 16)
    assert text.widths_of(paris2) == (4096, 768)
    assert functional.count(network) == 11_891_178_560
    assert functional.count(router) == 130_745_091
    T, H, W, C = codecs.latent_shape(paris2)
    video_in = functional.abstract(network)["video_in"]["kernel"].shape
    assert video_in == (C * PATCH * PATCH, network.hidden) == (64, 3072)
    assert T * (H // PATCH) * (W // PATCH) == 2304


def test_paris2_times_follow_open_sora(paris2):
    """256 tokens a frame: the line stands at 1; nine latent frames: times 3. More frames and pixels: further on."""
    assert paris2.diffusion.timestep_shift == 0.0  # by rule, in training and in an ensemble's manifest
    assert timesteps.resolve_shift(0.0, 9 * 256, 9) == pytest.approx(3.0)
    assert timesteps.resolve_shift(0.0, 33 * 256, 33) == pytest.approx(5.745, abs=1e-3)
    assert timesteps.resolve_shift(0.0, 33 * 48 * 48, 33) == pytest.approx(11.87, abs=1e-2)
    assert timesteps.resolve_shift(8.0, 33 * 48 * 48, 33) == 8.0


def test_paris2_arms_cost_the_same(paris2, network):
    cost = flops.training_flops(network, codecs.latent_shape(paris2), paris2.text.max_tokens)
    experts = [
        compute.TrainingCost(f"expert {k}", paris2.steps("expert"), paris2.training.global_batch_size, cost)
        for k in range(3)
    ]
    monolith = compute.TrainingCost("monolith", paris2.steps("monolith"), paris2.training.global_batch_size, cost)
    found = compute.identity(experts, monolith, None)
    assert found["equal"]
    # The docstring's figures.
    assert cost == pytest.approx(0.126e15, rel=0.005)
    assert found["experts_total"] == pytest.approx(28.4e21, rel=0.005)


@pytest.mark.parametrize("role", ["expert", "monolith", "router"])
def test_the_paris2_step_keeps_every_shape_and_dtype(paris2, network, router, role):
    config, settings = (router, paris2.router_training) if role == "router" else (network, paris2.training)
    steps = paris2.steps(role)
    losses = router_losses if role == "router" else expert_losses
    law = TimestepSampler(settings.timestep_sampler, paris2.diffusion.timestep_mean, paris2.diffusion.timestep_std, 3.0)
    key = jax.eval_shape(jax.random.key, 0)
    before = jax.eval_shape(functools.partial(state.create, config, settings, steps), key)
    B, L = settings.global_batch_size, paris2.text.max_tokens
    tokens, pooled = text.widths_of(paris2)
    batch = {
        "latent": jax.ShapeDtypeStruct((B, *codecs.latent_shape(paris2)), jnp.float32),
        "tokens": jax.ShapeDtypeStruct((B, L, tokens), jnp.float32),
        "length": jax.ShapeDtypeStruct((B,), jnp.int32),
        "pooled": jax.ShapeDtypeStruct((B, pooled), jnp.float32),
        "cluster": jax.ShapeDtypeStruct((B,), jnp.int32),
        "index": jax.ShapeDtypeStruct((B,), jnp.int32),
    }
    after, metrics = jax.eval_shape(make_step(losses, config, settings, steps, law, paris2.masks), before, batch)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), before, after)
    assert all(jax.tree.leaves(same))
    assert metrics["loss"].shape == ()
    # Parameters, their average and two moments, all float32: what a job must hold.
    held = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(after))
    assert held == pytest.approx(16 * functional.count(config), rel=1e-6)


def test_paris2_is_refused_before_anything_is_written(paris2, tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"codec\.weights is empty; name the folder with its downloaded weights"):
        prepare(paris2, run)
    assert not run.path.exists()


def test_open_soras_own_network_is_the_published_one_with_texts_as_it_knows_them():
    experiment = Experiment.from_config(load("paris2.py").get_config("opensora2"))
    tokens, pooled = text.widths_of(experiment)
    network = functional.network_config(
        experiment.network,
        channels=16,
        text_width=tokens,
        pooled_width=pooled,
        cond_frames=bool(experiment.masks.kinds),
    )
    assert functional.count(network) == 11_891_178_560 + 68 * 3072 + 3072  # and an input for frames that are given
    assert experiment.text.pad_to_max_tokens and (experiment.text.max_tokens, tokens, pooled) == (512, 4096, 768)
    sampling = experiment.sampling
    assert (sampling.guidance_scale, sampling.image_guidance_scale) == (7.5, 3.0)
    assert (sampling.guidance_oscillation, sampling.image_guidance_ramp) == ("both", True)
    assert codecs.latent_shape(experiment) == (33, 24, 42, 16) and experiment.text.suffix == "24 FPS. 4 motion score."
    assert experiment.masks.weights == (1, 5, 1, 1, 0)  # of "none", first, last, both, prefix
