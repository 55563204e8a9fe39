"""Experts kept as 8-bit integers or in the host's memory: what changes, by how much, and what does not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax import Ensemble
from paris_jax.ensemble.device_placement import PlacementOptions
from paris_jax.errors import UserError
from paris_jax.models import functional, stacks
from tests.ensemble.test_mixture import NETWORK, inputs, random_params

PROMPTS = ["a large red circle moving right fast on a white ground", "a small blue digit nine on a black ground"]
MATRICES = ("kernel", "values", "layers")


@pytest.fixture(scope="module")
def plain():
    return Ensemble.load("bundled:shapes")


def of_blocks(ensemble):
    """The leaves of the blocks, by name."""
    (stack,) = ensemble._placed.params.experts
    found = jax.tree_util.tree_leaves_with_path({name: stack[name] for name in functional.BLOCKS})
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in found}


def test_experts_in_the_hosts_memory_draw_the_same_videos(plain):
    away = Ensemble.load("bundled:shapes", offload=True)
    for how in ({"top_k": 1}, {"routing": "full", "guidance_scale": 2.0}):
        videos = [e.sample(PROMPTS, num_inference_steps=3, seed=1, **how).videos for e in (plain, away)]
        np.testing.assert_allclose(*videos, atol=1e-5)
    for name, leaf in of_blocks(away).items():
        there = name.rpartition(".")[2] in MATRICES
        assert leaf.sharding.memory_kind == ("pinned_host" if there else "device"), name
    assert all(leaf.sharding.memory_kind == "device" for leaf in of_blocks(plain).values())


@pytest.mark.parametrize("offload", [False, True])
def test_8_bit_integers_are_a_quarter_of_the_size_and_change_the_velocity_by_a_percent(plain, offload):
    small = Ensemble.load("bundled:shapes", weights_dtype="int8", offload=offload)
    sizes = [
        sum(leaf.nbytes for name, leaf in of_blocks(e).items() if name.rpartition(".")[2] in (*MATRICES, "scale"))
        for e in (plain, small)
    ]
    assert sizes[1] < 0.27 * sizes[0]
    text, x, t = plain.encode(PROMPTS), plain.noise(2), jnp.array([0.3, 0.8])
    v = [np.asarray(e.velocity(0.7 * x, t, text, top_k=1)) for e in (plain, small)]
    relative = np.linalg.norm(v[1] - v[0]) / np.linalg.norm(v[0])
    assert 1e-4 < relative < 0.02


def test_a_matrix_is_rounded_to_half_a_step_of_its_outputs():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(2, 3, 40, 8)) * np.geomspace(1e-3, 10, 8)).astype(np.float32)
    matrix[0, 0, :, 3] = 0
    found = stacks.Int8.of(matrix)
    step = np.abs(matrix).max(-2, keepdims=True) / 127
    assert found.values.dtype == np.int8 and found.scale.shape == (2, 3, 1, 8)
    assert (np.abs(np.asarray(found.matrix()) - matrix) <= 0.5001 * step + 1e-12).all()


@pytest.mark.parametrize("inputs", [4, 12, 136, 384])
def test_words_of_four_hold_the_integers(inputs):
    values = np.random.default_rng(inputs).integers(-128, 128, (2, 3, inputs, 5), np.int8)
    words = stacks.words(values)
    assert words.dtype == np.int32 and words.shape == (2, 3, inputs // 4, 5)
    for member, layer in np.ndindex(2, 3):
        found = stacks.Int8(jnp.asarray(words[member, layer]), jnp.ones((1, 5))).matrix()
        np.testing.assert_array_equal(found, values[member, layer])
    if inputs == 384:  # a third of the words has a third of the rows, so that shards stay apart
        np.testing.assert_array_equal(words[..., 32:64, :], stacks.words(values[..., 128:256, :]))


def test_8_bit_integers_in_the_hosts_memory_are_those_on_the_device(plain):
    text, x, t = plain.encode(PROMPTS), plain.noise(2), jnp.array([0.3, 0.8])
    here, away = (Ensemble.load("bundled:shapes", weights_dtype="int8", offload=there) for there in (False, True))
    v = [e.velocity(0.7 * x, t, text, top_k=1) for e in (here, away)]
    np.testing.assert_allclose(*v, atol=1e-5)


def test_matrices_are_kept_as_they_are_computed_with():
    """In bfloat16 that halves them, and changes nothing: they are rounded to it before every product anyway."""
    config = dataclasses.replace(NETWORK, dtype="bfloat16")
    params = jax.tree.map(np.asarray, random_params(config, 0))
    stack = PlacementOptions().place(config, [params, params])
    assert stack["single_blocks"]["out"]["kernel"].dtype == jnp.bfloat16
    assert stack["single_blocks"]["out"]["bias"].dtype == jnp.float32
    x, t, text = inputs()
    words = text.tokens, text.length, text.pooled
    wide = functional.apply(config, params, x, t, *words)
    np.testing.assert_array_equal(functional.apply_member(config, stack, jnp.int32(1), x, t, *words), wide)


def test_unknown_weight_dtypes_and_offloads_are_refused():
    with pytest.raises(UserError, match=r"weights_dtype='int4': must be one of auto, int8 \(did you mean 'int8'\?\)"):
        Ensemble.load("bundled:shapes", weights_dtype="int4")
    config = dataclasses.replace(NETWORK, hidden=6 * NETWORK.heads, rope_axes=(2, 2, 2))
    odd = jax.tree.map(np.asarray, random_params(config, 0))
    with pytest.raises(UserError, match=r"weights_dtype='int8' with offload: \S+ has 6 inputs over 1 devices"):
        PlacementOptions(weights_dtype="int8", offload=True).place(config, [odd, odd])


@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.1), ("float16", 0.02)])
def test_the_dtype_of_the_computation_is_chosen_when_an_ensemble_is_loaded(dtype, error):
    """Kernels are stored in it, and so reach the flash attention of accelerators; videos stay near."""
    given = {"num_inference_steps": 2, "seed": 3}
    wide, narrow = Ensemble.load("bundled:shapes"), Ensemble.load("bundled:shapes", compute_dtype=dtype)
    (network,), (stack,) = narrow._placed.networks, narrow._placed.params.experts
    assert network.dtype == narrow._placed.router.dtype == dtype
    assert stack["single_blocks"]["qkv_mlp"]["kernel"].dtype == dtype
    videos = [ensemble.sample("a red ball", **given).videos for ensemble in (wide, narrow)]
    assert 0 < np.sqrt(np.mean(np.square(videos[0] - videos[1]))) < error
    with pytest.raises(UserError, match="compute_dtype='int8': must be one of"):
        Ensemble.load("bundled:shapes", compute_dtype="int8")
