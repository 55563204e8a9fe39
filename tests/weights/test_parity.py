"""Our network against FLUX.1's and Open-Sora 2.0's, with their weights read by us: invariant 9 of the design."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from paris_jax.artifacts.tensors import Tensors
from paris_jax.models import functional
from paris_jax.weights import convert
from tests.ensemble.test_mixture import random_params
from tests.oracles import flux, opensora


@pytest.fixture(scope="module")
def found():
    tensors = Tensors(flux.FIXTURE)
    return {name: tensors.read(name) for name in tensors.shapes}


@pytest.fixture(scope="module")
def params(found, tmp_path_factory):
    weights = {name.removeprefix("weights/"): v for name, v in found.items() if name.startswith("weights/")}
    return flux.parameters(weights, tmp_path_factory.mktemp("flux"))


@pytest.mark.parametrize("case", flux.CASES)
def test_the_whole_network_is_that_of_diffusers(case, found, params):
    expected = found[f"{case}/float32/out"]
    assert flux.relative(flux.ours(params, case, "float32"), expected) < 1e-4
    assert flux.relative(flux.ours(params, case, "float32", more_text=3), expected) < 1e-4  # padding is not seen


@pytest.mark.parametrize("case", flux.CASES)
def test_in_bfloat16_both_are_about_as_far_from_float32(case, found, params):
    exact = found[f"{case}/float32/out"]
    theirs = flux.relative(found[f"{case}/bfloat16/out"], exact)
    assert flux.relative(flux.ours(params, case, "bfloat16"), exact) < 3 * theirs < 0.1


def test_every_block_is_that_of_diffusers(found, params):
    errors = flux.blocks(params, found)
    assert len(errors) == 2 * 4 and max(errors.values()) < 1e-4, errors


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs torch and diffusers")
def test_the_fixture_equals_the_oracle(found, params, tmp_path):
    made = flux.theirs()
    assert made.keys() == found.keys()
    for name, value in made.items():
        exact = name.startswith("weights/") or "/float32/" in name
        np.testing.assert_allclose(np.float32(found[name]), np.float32(value), rtol=1e-4, atol=1e-4 if exact else 0.1)
    assert flux.converted(tmp_path) == 0


@pytest.mark.parametrize("shape", [(1, 2, 6), (3, 4, 2), (5, 2, 2)])
def test_open_soras_network_with_frames_that_are_given(shape, tmp_path):
    """Exported in its names, and run by an implementation of our own of its rotations of halves."""
    config = dataclasses.replace(flux.CONFIG, cond_frames=True)
    params = random_params(config, 4)
    safetensors.numpy.save_file(
        {n: np.asarray(leaf) for n, leaf in functional.to_names(params).items()}, tmp_path / "ours.safetensors"
    )
    path = tmp_path / "theirs.safetensors"
    convert.export_network(Tensors(tmp_path / "ours.safetensors"), config, "opensora2", path, lambda: None)
    weights = safetensors.numpy.load_file(path)
    assert "double_blocks.1.img_attn.q_proj.weight" in weights and "cond_in.weight" in weights
    keys = jax.random.split(jax.random.key(0), 4)
    x, kept = jax.random.normal(keys[0], (2, *shape, 2)), jax.random.normal(keys[1], (2, *shape, 3))
    text, pooled, t = jax.random.normal(keys[2], (2, 5, 12)), jax.random.normal(keys[3], (2, 10)), jnp.array([0.2, 0.9])
    ours = functional.apply(config, params, x, t, text, jnp.full(2, 5, jnp.int32), pooled, kept)
    for row in range(2):
        given = (np.asarray(a[row], np.float64) for a in (x, t, text, pooled, kept))
        theirs = opensora.velocity(weights, *given, heads=config.heads, axes=config.rope_axes)
        assert flux.relative(ours[row], theirs) < 1e-4
