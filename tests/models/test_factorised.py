"""Attention within a frame, then along time: what it computes, what it may see, and what it costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from paris_jax.models import attention, flops, functional, positions
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig

CONFIG = DiTConfig(
    channels=6,
    text_width=10,
    pooled_width=9,
    hidden=32,
    heads=2,
    double_blocks=1,
    single_blocks=2,
    rope_axes=(4, 6, 6),
    attention="factorised",
)
JOINT = dataclasses.replace(CONFIG, attention="joint")
ROUTER = RouterConfig(
    channels=6, pooled_width=9, clusters=3, hidden=32, heads=2, blocks=2, rope_axes=(4, 6, 6), attention="factorised"
)


run = jax.jit(functional.apply, static_argnums=0)


def random_params(config):
    leaves, structure = jax.tree.flatten(functional.abstract(config))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(structure, [0.15 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves)])


def inputs(frames=3, height=4, width=6):
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (2, frames, height, width, 6))
    tokens, pooled = jax.random.normal(keys[1], (2, 5, 10)), jax.random.normal(keys[2], (2, 9))
    return x, jnp.array([0.3, 0.8]), tokens, jnp.array([5, 3], jnp.int32), pooled


def qkv(frames, places, text, heads=2, width=8):
    return jax.random.normal(jax.random.key(3), (3, 2, frames * places + text, heads, width))


def one_by_one(q, k, v, length, frames, places):
    """The definition, query by query, in NumPy and float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    N, out = frames * places, np.zeros(q.shape)

    def softmax(logits):
        e = np.exp(logits - logits.max())
        return e / e.sum()

    for b in range(q.shape[0]):
        texts = range(N, int(length[b]))
        for h in range(q.shape[2]):
            Q, K, V = q[b, :, h] / np.sqrt(q.shape[-1]), k[b, :, h], v[b, :, h]
            found = np.zeros_like(V)
            for n in range(N):
                seen = [*range(n // places * places, (n // places + 1) * places), *texts]
                found[n] = softmax(K[seen] @ Q[n]) @ V[seen]
            for n in range(N):
                same = [t * places + n % places for t in range(frames)]
                out[b, n, h] = softmax(K[same] @ Q[n]) @ found[same]
            for n in texts:
                seen = [*range(N), *texts]
                out[b, n, h] = softmax(K[seen] @ Q[n]) @ V[seen]
    return out


@pytest.mark.parametrize("frames, places, text", [(3, 4, 5), (5, 1, 2), (1, 6, 3), (2, 9, 1)])
def test_it_is_its_definition_query_by_query(frames, places, text):
    q, k, v = qkv(frames, places, text)
    N = frames * places
    length = jnp.array([N + text, N + 1], jnp.int32)
    made = attention.factorised(q, k, v, length, frames=frames, positions=places)
    expected = one_by_one(q, k, v, length, frames, places)
    for b, n in enumerate(length):
        np.testing.assert_allclose(made[b, :n], expected[b, :n], atol=2e-6)


def test_every_frame_finds_every_place_of_every_other_frame_and_the_text():
    """The gradient of one place of one frame reaches all that counts, and nothing of the padding."""
    q, k, v = qkv(3, 4, 3)

    def one(v):
        return attention.factorised(q, k, v, jnp.array([14, 15], jnp.int32), frames=3, positions=4)[0, 5].sum()

    reached = np.abs(jax.grad(one)(v)[0]).max((-1, -2)) > 0
    assert reached.tolist() == [True] * 14 + [False]


def test_attention_over_equal_keys_is_the_mean_of_the_values():
    """Each step is then a plain mean, over the places of a frame and over the frames."""
    q, k, v = qkv(3, 4, 0)
    made = attention.factorised(q, jnp.zeros_like(k), v, None, frames=3, positions=4)
    np.testing.assert_allclose(made, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, ROUTER], ids=["network", "router"])
def test_a_single_frame_is_joint_attention_and_the_weights_are_the_same(config):
    """So published image weights start a factorised video expert as they start a joint one."""
    joint, params = dataclasses.replace(config, attention="joint"), random_params(config)
    assert jax.tree.map(jnp.shape, functional.abstract(joint)) == jax.tree.map(jnp.shape, functional.abstract(config))
    for frames, same in ((1, True), (3, False)):
        given = inputs(frames) if config is CONFIG else (*inputs(frames)[:2], inputs(frames)[-1])
        of_both = [run(c, params, *given) for c in (config, joint)]
        assert np.allclose(*of_both, rtol=1e-5, atol=1e-5) == same


@pytest.mark.parametrize("frames, height, width", [(1, 2, 2), (7, 2, 6), (4, 10, 2)])
def test_odd_sizes_work_and_padding_is_not_seen(frames, height, width):
    params, (x, t, tokens, length, pooled) = random_params(CONFIG), inputs(frames, height, width)
    made = run(CONFIG, params, x, t, tokens, length, pooled)
    assert made.shape == x.shape and np.isfinite(made).all()
    other = tokens.at[1, 3:].set(7.0)
    np.testing.assert_array_equal(run(CONFIG, params, x, t, other, length, pooled), made)


def test_both_steps_turn_queries_and_keys_by_place_and_time():
    """A video whose frames stand in another order, or whose rows are turned over, is another video."""
    params, (x, *rest) = random_params(CONFIG), inputs()
    base = run(CONFIG, params, x, *rest)
    for axis in (1, 2, 3):
        turned = jnp.flip(run(CONFIG, params, jnp.flip(x, axis), *rest), axis)
        assert float(jnp.abs(turned - base).max()) > 1e-3


def test_recomputing_activations_changes_no_gradient():
    params, given = random_params(CONFIG), inputs()

    def gradient(config):
        return jax.jit(jax.grad(lambda p: jnp.square(run(config, p, *given)).mean()))(params)

    for remat in ("named", "full"):
        again = gradient(dataclasses.replace(CONFIG, remat=remat))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), gradient(CONFIG), again)


def test_the_kernel_of_tpus_takes_other_keys_than_queries():
    """A frame of 130 places with 70 tokens of text, of which 20 count: 256 queries, 256 keys; interpreted."""
    keys = jax.random.split(jax.random.key(6), 4)
    q, weight = (jax.random.normal(key, (2, 130, 1, 64)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 300, 1, 64)) for key in keys[2:])
    length = jnp.array([300, 150], jnp.int32)

    def both(attend):
        return jax.value_and_grad(lambda *qkv: (attend(*qkv, length) * weight).sum(), argnums=(0, 1, 2))(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        made = both(attention._pallas)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(both(attention.attend)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-5)


def cost(config, frames):
    """FLOPs as XLA counts them, of a network without loops, and as we do."""
    x, t, tokens, length, pooled = inputs(frames, 8, 8)
    params = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), functional.abstract(config))
    run = jax.jit(lambda *given: functional.apply(config, *given))
    counted = run.lower(params, x[:1], t[:1], tokens[:1], length[:1], pooled[:1]).compile().cost_analysis()["flops"]
    return flops.forward_flops(config, x.shape[1:], tokens.shape[1]), counted


@pytest.mark.parametrize("config", [CONFIG, JOINT], ids=["factorised", "joint"])
def test_the_flops_formula_equals_xlas_count(config):
    ours, counted = cost(config, 12)
    assert 0.85 < ours / counted <= 1.0


def test_the_work_of_its_products_grows_with_the_frames_and_not_with_their_square():
    """At 64 and 128 frames: twice as much, but for the products of 1 x T, where joint attention has four times."""

    def pairs(config, frames):
        with_none = dataclasses.replace(config, double_blocks=0, single_blocks=0)
        whole = flops.forward_flops(config, (frames, 32, 32, 6), 5) - flops.forward_flops(
            with_none, (frames, 32, 32, 6), 5
        )
        S, D = frames * 256 + 5, config.hidden
        return whole - 3 * 2 * S * D * D * 12 - (2 * 12 + 2 * 2 * 3) * D * D

    assert pairs(JOINT, 128) / pairs(JOINT, 64) == pytest.approx(4, rel=0.01)
    assert 2 < pairs(CONFIG, 128) / pairs(CONFIG, 64) < 2.5
    assert pairs(JOINT, 128) / pairs(CONFIG, 128) > 80


def test_few_keys_need_no_flash_attention(caplog):
    attention.implementation.cache_clear()
    with caplog.at_level("INFO"):
        assert attention.implementation("gpu", "", "bfloat16", 128, 33) == "xla"
        assert attention.implementation("gpu", "", "bfloat16", 128, 768) == "cudnn"
    assert "33 keys" in caplog.text
    assert positions.video_positions(3, 1, 2)[::2, 0].tolist() == [0, 1, 2]  # frames come first, as assumed
