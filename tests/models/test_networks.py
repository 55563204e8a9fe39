"""The spatiotemporal DiT and the router: sizes, symmetries, masks, and what depth costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from paris_jax.config import network
from paris_jax.config.network import NetworkSettings
from paris_jax.models import attention, functional, positions
from paris_jax.models.blocks import REMAT
from paris_jax.models.dit import DiTConfig, pack, unpack
from paris_jax.models.router import RouterConfig

PUBLISHED = {"channels": 16, "text_width": 4096, "pooled_width": 768}
SMALL = DiTConfig(
    channels=6, text_width=5, pooled_width=7, hidden=32, heads=2, double_blocks=2, single_blocks=3, rope_axes=(4, 6, 6)
)
ROUTER = RouterConfig(channels=6, pooled_width=7, clusters=3, hidden=32, heads=2, blocks=2, rope_axes=(4, 6, 6))


run = jax.jit(functional.apply, static_argnums=0)


def random_params(config, seed=0):
    """Parameters that are nowhere zero, so that no path is hidden by a zero-initialised layer."""
    shapes = functional.abstract(config)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def inputs(batch=3, frames=2, height=4, width=6, text=5, seed=1):
    keys = jax.random.split(jax.random.key(seed), 4)
    return (
        jax.random.normal(keys[0], (batch, frames, height, width, 6)),
        jnp.linspace(0.1, 0.9, batch),
        jax.random.normal(keys[1], (batch, text, 5)),
        jnp.arange(batch, dtype=jnp.int32) % text + 1,
        jax.random.normal(keys[2], (batch, 7)),
    )


# One row a preset, at the published latent and text widths: a change of these numbers is a change of architecture.
@pytest.mark.parametrize(
    "name, parameters",
    [
        ("tiny", 1_371_968),
        ("small", 41_618_496),
        ("base", 240_208_960),
        ("large", 878_893_120),
        ("xl", 3_350_720_576),
        ("11b", 11_891_178_560),
    ],
)
def test_parameter_counts_of_the_networks(name, parameters):
    assert functional.count(functional.network_config(NetworkSettings(preset=name), **PUBLISHED)) == parameters


@pytest.mark.parametrize("name, parameters", [("tiny", 236_355), ("small", 7_645_187), ("b", 130_745_091)])
def test_parameter_counts_of_the_routers(name, parameters):
    config = functional.router_config(network.RouterSettings(preset=name), channels=16, pooled_width=768, clusters=3)
    assert functional.count(config) == parameters


def test_a_fresh_network_predicts_zeros_and_a_fresh_router_is_uniform():
    x, t, tokens, length, pooled = inputs()
    np.testing.assert_array_equal(
        run(SMALL, functional.init(SMALL, jax.random.key(0)), x, t, tokens, length, pooled), 0
    )
    logits = run(ROUTER, functional.init(ROUTER, jax.random.key(0)), x, t, pooled)
    np.testing.assert_array_equal(logits, np.zeros((3, 3)))


def test_packing_is_exact_and_groups_two_by_two():
    x = jnp.arange(2 * 3 * 4 * 6 * 5.0).reshape(2, 3, 4, 6, 5)
    tokens = pack(x)
    assert tokens.shape == (2, 3 * 2 * 3, 20)
    np.testing.assert_array_equal(unpack(tokens, x.shape), x)
    # Token (t, h, w) = (1, 1, 2), channels in the published order (c, row, column).
    expected = x[0, 1, 2:4, 4:6].transpose(2, 0, 1).reshape(-1)
    np.testing.assert_array_equal(tokens[0, 1 * 6 + 1 * 3 + 2], expected)


def test_padding_tokens_are_never_attended_to():
    params, (x, t, tokens, length, pooled) = random_params(SMALL), inputs()
    base = run(SMALL, params, x, t, tokens, length, pooled)
    padding = jnp.arange(5)[None] >= length[:, None]
    spoiled = jnp.where(padding[..., None], 1e3, tokens)
    np.testing.assert_allclose(run(SMALL, params, x, t, spoiled, length, pooled), base, rtol=1e-4, atol=1e-4)
    longer = jnp.pad(tokens, ((0, 0), (0, 4), (0, 0)), constant_values=9.0)
    np.testing.assert_allclose(run(SMALL, params, x, t, longer, length, pooled), base, rtol=1e-4, atol=1e-4)
    changed = run(SMALL, params, x, t, tokens.at[:, 0].add(1.0), length, pooled)
    assert float(jnp.abs(changed - base).max()) > 1e-3


@pytest.mark.parametrize("which", range(5), ids=["latent", "time", "tokens", "length", "pooled"])
def test_every_input_matters(which):
    params, given = random_params(SMALL), list(inputs())
    base = run(SMALL, params, *given)
    given[which] = given[which][::-1]
    assert float(jnp.abs(run(SMALL, params, *given) - base)[0].max()) > 1e-4


@pytest.mark.parametrize("which", range(3), ids=["latent", "time", "pooled text"])
def test_every_input_of_the_router_matters(which):
    x, t, _, _, pooled = inputs()
    params, given = random_params(ROUTER), [x, t, pooled]
    base = run(ROUTER, params, *given)
    given[which] = given[which][::-1]
    assert float(jnp.abs(run(ROUTER, params, *given) - base)[0].max()) > 1e-4


def test_queries_and_keys_have_one_length_whatever_their_scale():
    """QK-RMSNorm: scaling what makes queries and keys changes nothing."""
    params = random_params(SMALL)
    base = run(SMALL, params, *inputs())
    qkv = params["double_blocks"]["video"]["qkv"]
    of_a_head = np.repeat([7.0, 7.0, 1.0], SMALL.hidden // SMALL.heads)  # values are not normalised
    factors = np.tile(of_a_head, SMALL.heads)
    qkv["kernel"] = qkv["kernel"] * factors
    qkv["bias"] = qkv["bias"] * factors
    np.testing.assert_allclose(run(SMALL, params, *inputs()), base, rtol=1e-3, atol=1e-3)


def test_a_sample_does_not_see_its_batch_mates():
    params, given = random_params(SMALL), inputs()
    together = run(SMALL, params, *given)
    alone = run(SMALL, params, *(a[1:2] for a in given))
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-4, atol=1e-4)


def test_text_order_is_invisible_to_the_network_and_place_is_not():
    """Text stands at position zero (FLUX.1), so only its encoder knows the order; video tokens know where they are."""
    params, (x, t, tokens, _, pooled) = random_params(SMALL), inputs()
    full = jnp.full(3, 5, jnp.int32)
    base = run(SMALL, params, x, t, tokens, full, pooled)
    np.testing.assert_allclose(run(SMALL, params, x, t, tokens[:, ::-1], full, pooled), base, rtol=1e-4, atol=1e-4)
    turned = run(SMALL, params, x[:, ::-1], t, tokens, full, pooled)[:, ::-1]
    assert float(jnp.abs(turned - base).max()) > 1e-3


def test_rotary_attention_depends_on_relative_place_only():
    q, k = jax.random.normal(jax.random.key(4), (2, 1, 1, 1, 16))

    def score(a, b):
        tables = [positions.rotary_table(np.array([p], np.float32), (4, 6, 6), 1e4) for p in (a, b)]
        return float((positions.rotate(q, *tables[0]) * positions.rotate(k, *tables[1])).sum())

    assert score((1, 2, 3), (2, 5, 1)) == pytest.approx(score((4, 3, 7), (5, 6, 5)), abs=1e-5)
    assert score((1, 2, 3), (2, 5, 1)) != pytest.approx(score((1, 2, 3), (2, 5, 2)), abs=1e-3)
    assert score((0, 0, 0), (0, 0, 0)) == pytest.approx(float((q * k).sum()), abs=1e-5)


def test_attention_over_lengths_is_softmax_attention_over_the_first_keys():
    q, k, v = jax.random.normal(jax.random.key(5), (3, 2, 4, 2, 8))
    length = jnp.array([3, 1], jnp.int32)
    given = attention.attend(q, k, v, length)
    for b, n in enumerate((3, 1)):
        scores = jnp.einsum("qhd,khd->hqk", q[b], k[b, :n]) / np.sqrt(8)
        expected = jnp.einsum("hqk,khd->qhd", jax.nn.softmax(scores), v[b, :n])
        np.testing.assert_allclose(given[b], expected, atol=1e-5)


@pytest.mark.parametrize("length", [None, [40, 7]], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype, error", [("float32", 2e-6), ("bfloat16", 0.03)])
def test_the_backward_pass_of_attention_is_that_of_jax(length, dtype, error):
    """Against the derivative of JAX's own attention in float32."""
    keys = jax.random.split(jax.random.key(7), 4)
    q, k, v, weight = (jax.random.normal(key, (2, 40, 3, 32)) for key in keys)
    length = None if length is None else jnp.array(length, jnp.int32)

    def gradients(attention, dtype):
        def value(*inputs):
            return (attention(*inputs).astype(jnp.float32) * weight).sum()

        return jax.grad(value, argnums=(0, 1, 2))(*(x.astype(dtype) for x in (q, k, v)))

    def theirs(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length, implementation="xla")

    made = gradients(lambda *inputs: attention.attend(*inputs, length), dtype)
    for a, b in zip(made, gradients(theirs, "float32"), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=error * float(jnp.abs(b).max()))


@pytest.mark.parametrize("width", [64, 128])
def test_the_kernel_of_tpus_is_the_same_attention_forward_and_backward(width):
    """JAX's kernel, interpreted: 200 tokens are padded to 256, and keys beyond each length are not seen."""
    keys = jax.random.split(jax.random.key(6), 4)
    q, k, v, weight = (jax.random.normal(key, (2, 200, 1, width)) for key in keys)
    length = jnp.array([200, 150], jnp.int32)
    counted = (jnp.arange(200) < length[:, None])[..., None, None]

    def both(attention):
        def value(q, k, v):
            out = jnp.where(counted, attention(q, k, v, length), 0.0)
            return (out * weight).sum(), out

        return jax.grad(value, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    with pltpu.force_tpu_interpret_mode():
        made = both(attention._pallas)
    expected = both(attention.attend)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_the_slow_kernel_is_chosen_with_a_reason(caplog):
    attention.implementation.cache_clear()
    with caplog.at_level("INFO"):
        assert attention.implementation("gpu", "", "bfloat16", 128, 999) == "cudnn"
        assert attention.implementation("gpu", "", "float32", 128, 999) == "xla"
        assert attention.implementation("gpu", "", "bfloat16", 72, 999) == "cudnn"
        assert attention.implementation("gpu", "", "bfloat16", 256, 999) == "xla"
        assert attention.implementation("cpu", "", "float32", 64, 999) == "xla"
        assert attention.implementation("tpu", "", "bfloat16", 128, 999) == "pallas"
        assert attention.implementation("tpu", "", "bfloat16", 64, 100) == "xla"
    assert "float32" in caplog.text and "256" in caplog.text and "at least 128 keys, not 100" in caplog.text


@pytest.mark.parametrize("blocks", [(2, 0), (0, 2)])
def test_a_network_may_have_one_kind_of_block(blocks):
    config = dataclasses.replace(SMALL, double_blocks=blocks[0], single_blocks=blocks[1])
    params = random_params(config)
    assert run(config, params, *inputs()).shape == (3, 2, 4, 6, 6)
    assert all(leaf.size for leaf in jax.tree.leaves(params))  # arrays without elements cannot be saved


@pytest.mark.parametrize(
    "remat",
    ["full", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in REMAT if name not in ("none", "full"))],
)
def test_recomputing_activations_changes_no_gradient(remat):
    params, given = random_params(SMALL), inputs()

    def gradient(config):
        return jax.grad(lambda p: jnp.square(run(config, p, *given)).mean())(params)

    plain, recomputed = gradient(SMALL), gradient(dataclasses.replace(SMALL, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), plain, recomputed)


def test_the_compiled_program_does_not_grow_with_depth():
    def size(depth):
        config = dataclasses.replace(SMALL, double_blocks=depth, single_blocks=depth)
        lowered = jax.jit(lambda p, *a: run(config, p, *a)).lower(functional.abstract(config), *inputs())
        return len(lowered.as_text().splitlines())

    assert size(24) == size(3)  # one or two blocks are written out


def test_blocks_start_different_from_one_another():
    params = functional.init(SMALL, jax.random.key(0))
    kernel = params["single_blocks"]["qkv_mlp"]["kernel"]
    assert kernel.shape[0] == 3 and float(jnp.abs(kernel[0] - kernel[1]).max()) > 0.01


def test_names_and_trees_are_two_views_of_the_same_parameters():
    params = functional.init(ROUTER, jax.random.key(0))
    back = functional.from_names(functional.to_names(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)


def test_half_precision_computes_close_to_single():
    params, given = random_params(SMALL), inputs()
    full = run(SMALL, params, *given)
    half = run(dataclasses.replace(SMALL, dtype="bfloat16"), params, *given)
    assert half.dtype == jnp.float32
    assert float(jnp.sqrt(jnp.mean((half - full) ** 2) / jnp.mean(full**2))) < 0.05
