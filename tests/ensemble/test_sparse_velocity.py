"""Sparse use of the experts: what was chosen is computed, once, and nothing else, however it is cut into blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.diffusion.guidance import Strength
from paris_jax.ensemble import sparse_velocity
from paris_jax.ensemble.conditioning import Condition
from paris_jax.ensemble.routing import Routing
from paris_jax.ensemble.sparse_velocity import EnsembleParams, SamplerConfig
from paris_jax.models import functional
from tests.conftest import no_text
from tests.ensemble.test_mixture import FULL, NETWORK, ROUTER, inputs, random_params, together


def shares(rows: int, experts: int, used: int, seed: int = 0) -> jax.Array:
    """Weights (R, E) of `used` experts a row, another choice for every row."""
    rng = np.random.default_rng(seed)
    weight = np.zeros((rows, experts), np.float32)
    for row in weight:
        row[rng.choice(experts, used, replace=False)] = rng.dirichlet(np.ones(used))
    return jnp.asarray(weight)


@pytest.mark.parametrize("block", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("rows, experts, used", [(1, 3, 1), (8, 8, 2), (5, 16, 1), (7, 2, 2)])
def test_every_chosen_pair_is_worked_on_once_in_as_few_blocks_as_can_be(rows, experts, used, block):
    """Experts are numbers here: row x and expert e give (e + 1) x, and every call is counted."""
    x, weight, calls = jnp.arange(1.0, rows + 1)[:, None] * jnp.ones(4), shares(rows, experts, used), []

    def run(expert, inputs):
        jax.debug.callback(lambda e: calls.append(int(e)), expert)
        return (expert + 1) * inputs[0]

    found, broken = jax.jit(lambda w: sparse_velocity.weighted_sum(run, w, (x,), used, block))(weight)
    jax.effects_barrier()
    np.testing.assert_allclose(found, (weight @ jnp.arange(1.0, experts + 1))[:, None] * x, rtol=1e-5)
    assert not broken.any()
    of_expert = np.asarray((weight > 0).sum(0))
    assert sorted(calls) == [e for e in range(experts) for _ in range(-(-of_expert[e] // block))]


def test_unselected_experts_cost_nothing_and_non_finite_ones_do_no_harm():
    """A block may hold rows of another expert, whose answers would not be finite; they are left out."""
    x, calls = jnp.array([[1.0], [2.0], [jnp.inf], [4.0]]), []
    weight = jnp.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.5, 0.5]])

    def run(expert, inputs):
        jax.debug.callback(lambda e: calls.append(int(e)), expert)
        return inputs[0] + expert

    found, _ = sparse_velocity.weighted_sum(run, weight, (x,), 2, 4)
    np.testing.assert_array_equal(found, [[1.0], [0.0], [np.inf], [4.5]])
    none, _ = sparse_velocity.weighted_sum(run, 0 * weight, (x,), 2, 4)
    jax.effects_barrier()
    np.testing.assert_array_equal(none, 0 * weight[:, :1])
    assert calls == [0, 1]


def test_who_broke_is_counted_and_who_was_given_nonsense_is_not_blamed():
    x = jnp.array([[1.0], [jnp.nan], [3.0]])
    run = lambda expert, inputs: jnp.where(expert == 1, jnp.inf, inputs[0])  # noqa: E731
    for block in (1, 3):
        _, broken = sparse_velocity.weighted_sum(
            run, jnp.array([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]), (x,), 2, block
        )
        np.testing.assert_array_equal(broken, [0, 1, 0])


@pytest.mark.parametrize(
    "tokens, rows, pairs_each, together, platform, expected",
    [
        (100, 8, 1.0, 1, "cpu", 1),  # eight samples, eight experts
        (100, 32, 4.0, 1, "cpu", 2),  # half of what an expert gets on average
        (100, 32, 10.7, 1, "cpu", 3),  # no more than go faster together
        (400, 32, 10.7, 1, "cpu", 1),
        (1024, 32, 10.7, 1, "streamed", 5),  # a block costs the way of its expert
        (100, 2, 0.25, 2, "cpu", 2),  # both branches of one sample
        (100, 8, 1.0, 1, "gpu", 8),  # few tokens do not keep it busy
        (1024, 8, 1.0, 1, "gpu", 4),
        (16384, 8, 1.0, 2, "tpu", 2),
    ],
)
def test_a_block_is_as_large_as_pays(tokens, rows, pairs_each, together, platform, expected):
    streamed = platform == "streamed"
    where = "gpu" if streamed else platform
    assert sparse_velocity.block_size(tokens, rows, pairs_each, together, where, streamed) == expected


def plan_of(routing, experts, **how):
    return SamplerConfig((NETWORK,), tuple((0, k) for k in range(experts)), ROUTER, routing, **how)


@pytest.mark.parametrize(
    "routing, how, expected",
    [
        (Routing("full"), {}, 16),
        (Routing("full"), {"guidance": "classifier_free"}, 8),
        (Routing("full"), {"expert_batch_size": 3}, 3),
        (Routing("top_k", 1), {"expert_batch_size": 99}, 16),
        (Routing("threshold", p=0.9), {}, 2),
        (Routing("top_k", 2), {}, 4),
    ],
)
def test_blocks_fit_the_rule(routing, how, expected):
    assert plan_of(routing, 4, **how).rows_per_pass((16, 2, 4, 4, 2)) == expected


@pytest.mark.parametrize("block", [1, 2, 6])
def test_the_result_does_not_depend_on_the_block_size(block):
    x, t, text = inputs()
    arrays = together([random_params(NETWORK, k) for k in range(3)], random_params(ROUTER, 7))
    condition = Condition(text, no_text(text), Strength(jnp.float32(3.0)))
    v = [
        sparse_velocity.ensemble_velocity(
            plan_of(Routing("top_k", 2), 3, guidance="classifier_free", expert_batch_size=b),
            arrays,
            x,
            t,
            condition,
            jnp.int32(0),
        )[0]
        for b in (0, block)
    ]
    np.testing.assert_allclose(*v, rtol=2e-4, atol=2e-4)


def test_no_expert_is_copied_to_be_used():
    """The temporary memory of a deep ensemble's velocity is below one expert, and the same for 2 and for 8 experts."""
    deep = dataclasses.replace(NETWORK, hidden=64, heads=4, single_blocks=12)
    shapes = functional.abstract(deep)
    expert = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    x, t, text = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs(1))

    def temporary(experts):
        stack = jax.tree.map(lambda a: jax.ShapeDtypeStruct((experts, *a.shape), a.dtype), shapes)
        arrays = EnsembleParams((stack,), functional.abstract(ROUTER), jax.ShapeDtypeStruct((experts,), jnp.int32))
        plan = SamplerConfig((deep,), tuple((0, k) for k in range(experts)), ROUTER, Routing("top_k", 1))
        condition = Condition(text, text, Strength(1.0))
        compiled = sparse_velocity.ensemble_velocity.lower(
            plan, arrays, x, t, condition, jax.ShapeDtypeStruct((), jnp.int32)
        ).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    two, eight = temporary(2), temporary(8)
    assert two < 0.5 * expert and abs(eight - two) < 0.02 * expert, (two, eight, expert)


WIDER = dataclasses.replace(NETWORK, hidden=32, heads=2, single_blocks=2)


@pytest.mark.parametrize("routing", [FULL, Routing("top_k", 1), Routing("top_k", 2), Routing("threshold", p=1.0)])
def test_experts_of_different_sizes_serve_in_one_ensemble(routing):
    """Two small ones and a wide one between them: their sum is that of each on its own."""
    x, t, text = inputs()
    params = {0: random_params(NETWORK, 0), 1: random_params(WIDER, 1), 2: random_params(NETWORK, 2)}
    stacks = (
        jax.tree.map(lambda *leaves: jnp.stack(leaves), params[0], params[2]),
        jax.tree.map(lambda a: a[None], params[1]),
    )
    router = random_params(ROUTER, 7)
    plan = SamplerConfig((NETWORK, WIDER), ((0, 0), (1, 0), (0, 1)), ROUTER, routing)
    arrays = EnsembleParams(stacks, router, jnp.arange(3))
    condition = Condition(text, no_text(text), Strength(1.0))
    v, trace = sparse_velocity.ensemble_velocity(plan, arrays, x, t, condition, jnp.int32(0))
    weight = trace.weight
    words = text.tokens, text.length, text.pooled
    each = [functional.apply(c, params[k], x, t, *words) for k, c in enumerate((NETWORK, WIDER, NETWORK))]
    expected = sum(weight[:, k].reshape(-1, 1, 1, 1, 1) * each[k] for k in range(3))
    np.testing.assert_allclose(v, expected, rtol=2e-4, atol=2e-4)
    for expert in range(3):
        alone, _ = sparse_velocity.ensemble_velocity(
            dataclasses.replace(plan, routing=Routing("fixed")), arrays, x, t, condition, jnp.int32(expert)
        )
        np.testing.assert_allclose(alone, each[expert], rtol=2e-4, atol=2e-4)
