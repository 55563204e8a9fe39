"""The ensemble is the right mixture: invariant 5 of the design, on exact experts and on real networks."""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.config.sampling import GuidanceMethod, RouterConditioning
from paris_jax.diffusion.guidance import Strength, projected
from paris_jax.ensemble import sparse_velocity
from paris_jax.ensemble.conditioning import Condition, EncodedText
from paris_jax.ensemble.routing import Routing, weights
from paris_jax.ensemble.sparse_velocity import EnsembleParams, SamplerConfig
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig
from tests.conftest import no_text

NETWORK = DiTConfig(
    channels=2, text_width=3, pooled_width=4, hidden=16, heads=1, double_blocks=1, single_blocks=1, rope_axes=(4, 6, 6)
)
ROUTER = RouterConfig(channels=2, pooled_width=4, clusters=3, hidden=16, heads=1, blocks=1, rope_axes=(4, 6, 6))
FULL = Routing("full")


def random_params(config, seed):
    leaves, tree = jax.tree.flatten(functional.abstract(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def together(experts, router=None, clusters=None):
    """Weights of experts of one kind."""
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)
    return EnsembleParams((stack,), router, jnp.arange(len(experts)) if clusters is None else clusters)


def key_data(seed, count):
    return jax.random.key_data(jax.random.split(jax.random.key(seed), count))


def plan_of(routing, experts=3, network=NETWORK, router=ROUTER, **how):
    return SamplerConfig((network,), tuple((0, k) for k in range(experts)), router, routing, **how)


def condition_of(text, scale=1.0, negative=None, **strength):
    return Condition(text, negative or no_text(text), Strength(jnp.float32(scale), **strength))


def sample(plan, arrays, noise, keys, times, condition, fixed_expert):
    """All steps at once: the latent, and the trace."""
    steps = len(times) - 1
    state = sparse_velocity.take_steps(
        plan, arrays, sparse_velocity.initial_state(plan, noise, steps), 0, steps, keys, times, condition, fixed_expert
    )
    return state.x, sparse_velocity.trace_of(state)


def inputs(batch=3):
    keys = jax.random.split(jax.random.key(9), 3)
    text = EncodedText(
        jax.random.normal(keys[0], (batch, 4, 3)),
        jnp.arange(batch, dtype=jnp.int32) % 4 + 1,
        jax.random.normal(keys[1], (batch, 4)),
    )
    return jax.random.normal(keys[2], (batch, 2, 2, 4, 2)), jnp.linspace(0.2, 0.8, batch), text


def velocity(routing, arrays, scale=1.0, fixed_expert=0, network=NETWORK, router=ROUTER, at=None, **how):
    x, t, text = at or inputs()
    guidance = "classifier_free" if scale != 1.0 else ""
    plan = plan_of(routing, len(arrays.clusters), network, router, guidance=guidance, **how)
    v, trace = sparse_velocity.ensemble_velocity(plan, arrays, x, t, condition_of(text, scale), jnp.int32(fixed_expert))
    return v, trace.weight


@dataclasses.dataclass(frozen=True)
class GaussianVelocity:
    """The exact velocity of the flow to N(mean, std^2) for every element, as an expert."""

    prediction_type: str = "velocity"
    cond_frames: bool = False

    def apply(self, params, x, t, tokens, length, pooled):
        t = t.reshape(-1, 1, 1, 1, 1)
        mean, std = params["mean"], params["std"]
        variance = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)


@dataclasses.dataclass(frozen=True)
class GaussianPosterior:
    """log p(k | x_t, t) of a Gaussian mixture up to a constant, prior included, as a router."""

    cond_frames: bool = False

    def apply(self, params, x, t, pooled):
        t, x = t[:, None], x.reshape(x.shape[0], 1, -1)
        mean, std, prior = params["mean"], params["std"], params["prior"]
        variance = (1 - t) ** 2 * std**2 + t**2
        square = jnp.square(x - ((1 - t) * mean)[..., None]).sum(-1)
        return jnp.log(prior) - 0.5 * square / variance - 0.5 * x.shape[-1] * jnp.log(variance)


MIXTURE = {"mean": jnp.array([-1.0, 0.3, 1.2]), "std": jnp.array([0.3, 0.5, 0.2]), "prior": jnp.array([0.2, 0.5, 0.3])}


def mixture_arrays(present=(0, 1, 2)):
    chosen = jnp.array(present)
    stack = {k: MIXTURE[k][chosen] for k in ("mean", "std")}
    return EnsembleParams((stack,), MIXTURE, chosen.astype(jnp.int32))


def marginal_velocity(x, t, mixture=MIXTURE):
    """d/dt of the marginal flow, E[e - x_0 | x_t], from the mixture's density alone, in float64.

    For any p_t of the linear path, E[e | x] = -t grad log p_t(x), and x = (1 - t) E[x_0 | x] + t E[e | x].
    """
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    mean, std, prior = (np.asarray(mixture[k], np.float64) for k in ("mean", "std", "prior"))
    out = np.empty_like(x)
    for b in range(len(x)):
        variance = (1 - t[b]) ** 2 * std**2 + t[b] ** 2
        flat = x[b].reshape(-1)
        logs = np.log(prior) - 0.5 * ((flat[:, None] - (1 - t[b]) * mean) ** 2 / variance + np.log(variance)).sum(0)
        posterior = np.exp(logs - logs.max())
        posterior /= posterior.sum()
        score = -(((flat[:, None] - (1 - t[b]) * mean) / variance) @ posterior)
        noise = -t[b] * score
        out[b] = (noise - (flat - t[b] * noise) / (1 - t[b])).reshape(x[b].shape)
    return out


@pytest.mark.parametrize("routing", [FULL, Routing("top_k", 3), Routing("threshold", p=1.0)])
def test_exact_experts_and_router_give_the_marginal_flow(routing):
    x, t, text = inputs(6)
    v, w = velocity(
        routing, mixture_arrays(), network=GaussianVelocity(), router=GaussianPosterior(), at=(0.5 * x, t, text)
    )
    assert float(w.max(-1).min()) < 0.999  # the experts do mix here
    np.testing.assert_allclose(v, marginal_velocity(0.5 * x, t), rtol=1e-5, atol=1e-5)


EVERY_TIME = jnp.array([0.01, 0.03, 0.1, 0.3, 0.7, 0.9, 0.97, 0.999])


@pytest.mark.parametrize("routing", [FULL, Routing("top_k", 3), Routing("threshold", p=1.0)])
def test_the_marginal_flow_is_met_from_next_to_data_to_next_to_noise(routing):
    """At points that the path goes through, where the weights go from one-hot to the prior's."""
    count = len(EVERY_TIME)
    _, _, text = inputs(count)
    data, rng = mixture_data(count, 4, seed=5), np.random.default_rng(6)
    t = EVERY_TIME[:, None]
    x = ((1 - t) * data + t * rng.normal(size=(count, 4))).reshape(-1, 1, 2, 2, 1).astype(np.float32)
    v, w = velocity(
        routing, mixture_arrays(), network=GaussianVelocity(), router=GaussianPosterior(), at=(x, EVERY_TIME, text)
    )
    assert float(w[0].max()) > 0.999 and float(jnp.abs(w[-1] - MIXTURE["prior"]).max()) < 0.01
    np.testing.assert_allclose(v, marginal_velocity(x, EVERY_TIME), rtol=1e-5, atol=1e-5)


def mixture_data(count, elements, seed=0):
    """Draws of the mixture itself, (count, elements): all elements of one draw belong to one component."""
    rng = np.random.default_rng(seed)
    of = rng.choice(3, (count, 1), p=np.asarray(MIXTURE["prior"]))
    return np.asarray(MIXTURE["mean"])[of] + np.asarray(MIXTURE["std"])[of] * rng.normal(size=(count, elements))


def kolmogorov(first, second):
    """The two-sample Kolmogorov-Smirnov statistic of two sets of as many numbers."""
    both = np.sort(np.concatenate([first, second]))
    empirical = [np.searchsorted(np.sort(s), both, side="right") / len(s) for s in (first, second)]
    return np.abs(empirical[0] - empirical[1]).max()


@pytest.mark.parametrize(
    "solver, steps",
    [
        ("euler", 150),
        ("dpm++2m", 100),
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in (("heun", 40), ("ab2", 60), ("ancestral", 250))
        ),
    ],
)
def test_samples_of_the_exact_ensemble_follow_the_data(solver, steps):
    """20,000 draws of three elements, which are what they are together: every one, and their mean and spread."""
    count = 20_000
    text = EncodedText(jnp.zeros((count, 1, 3)), jnp.ones(count, jnp.int32), jnp.zeros((count, 4)))
    noise = jax.random.normal(jax.random.key(3), (count, 1, 1, 1, 3))
    plan = plan_of(
        Routing("top_k", 3), 3, GaussianVelocity(), GaussianPosterior(), solver=solver, expert_batch_size=count
    )
    keys, fixed_expert = key_data(4, count), jnp.zeros(steps, jnp.int32)
    z, _ = sample(plan, mixture_arrays(), noise, keys, jnp.linspace(1, 0, steps + 1), condition_of(text), fixed_expert)
    drawn, data = np.asarray(z).reshape(count, 3), mixture_data(count, 3)
    for look in (*(lambda a, i=i: a[:, i] for i in range(3)), lambda a: a.mean(1), lambda a: a.std(1)):
        assert kolmogorov(look(drawn), look(data)) < 1.95 * np.sqrt(2 / count)  # at level 0.001: 0.0195


def test_a_missing_expert_is_the_softmax_over_the_rest():
    x, t, text = inputs(6)
    kept = {"mean": MIXTURE["mean"][::2], "std": MIXTURE["std"][::2], "prior": MIXTURE["prior"][::2] / 0.5}
    v, _ = velocity(
        FULL, mixture_arrays((0, 2)), network=GaussianVelocity(), router=GaussianPosterior(), at=(x, t, text)
    )
    np.testing.assert_allclose(v, marginal_velocity(x, t, kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", [FULL, Routing("top_k", 1), Routing("top_k", 2), Routing("threshold", p=0.7)])
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.exhaustive), 5.0])
def test_copies_of_one_expert_are_that_expert(routing, scale):
    one = random_params(NETWORK, 0)
    arrays = together([one] * 3, random_params(ROUTER, 1))
    expected, _ = velocity(FULL, together([one]), scale, router=None)
    np.testing.assert_allclose(velocity(routing, arrays, scale)[0], expected, rtol=2e-4, atol=2e-4)


def arrays_of_three():
    return together([random_params(NETWORK, k) for k in range(3)], random_params(ROUTER, 7))


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.exhaustive), 5.0])
def test_all_rules_that_keep_every_expert_agree(scale):
    full, w = velocity(FULL, arrays_of_three(), scale)
    for routing in (Routing("top_k", 3), Routing("threshold", p=1.0)):
        other, w_other = velocity(routing, arrays_of_three(), scale)
        np.testing.assert_allclose(other, full, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(w_other, w, atol=1e-6)


@pytest.mark.parametrize("expert", [0, *(pytest.param(k, marks=pytest.mark.exhaustive) for k in (1, 2))])
def test_a_forced_expert_and_a_one_hot_router_are_that_expert(expert):
    arrays = arrays_of_three()
    alone = together([random_params(NETWORK, expert)])
    expected, _ = velocity(FULL, alone, router=None)
    np.testing.assert_allclose(
        velocity(Routing("fixed"), arrays, fixed_expert=expert)[0], expected, rtol=1e-4, atol=1e-4
    )
    bias = arrays.router["logits_out"]["bias"] + 1e4 * jax.nn.one_hot(expert, 3)
    router = arrays.router | {"logits_out": arrays.router["logits_out"] | {"bias": bias}}
    one_hot = EnsembleParams(arrays.experts, router, arrays.clusters)
    for routing in (FULL, Routing("top_k", 1), Routing("top_k", 2), Routing("threshold", p=0.9)):
        np.testing.assert_allclose(velocity(routing, one_hot)[0], expected, rtol=1e-4, atol=1e-4)


def test_guidance_inside_the_merge_is_guidance_outside_with_the_same_weights():
    x, t, text = inputs()
    arrays, scale = arrays_of_three(), 4.0
    guided, w = velocity(FULL, arrays, scale)
    branches = [sparse_velocity.merge_experts(plan_of(FULL), arrays, w, x, t, own)[0] for own in (text, no_text(text))]
    np.testing.assert_allclose(guided, branches[1] + scale * (branches[0] - branches[1]), rtol=1e-3, atol=1e-3)

    def difference(method):
        """Between guiding the merged velocity and merging what each expert, guided on its own, says."""
        outside, *each = (
            sparse_velocity.ensemble_velocity(
                plan_of(rule, guidance=method), arrays, x, t, condition_of(text, scale), jnp.int32(expert)
            )[0]
            for rule, expert in ((FULL, 0), *((Routing("fixed"), k) for k in range(3)))
        )
        inside = jnp.einsum("be,ebthwc->bthwc", w, jnp.stack(each))
        return jnp.linalg.norm(outside - inside) / jnp.linalg.norm(outside)

    assert difference("classifier_free") < 1e-3 < difference("projected")  # what is linear may change places


def test_a_sample_does_not_depend_on_its_batch_mates():
    x, t, text = inputs()
    for routing in (FULL, Routing("top_k", 2)):
        together, _ = velocity(routing, arrays_of_three(), 3.0)
        one = jax.tree.map(lambda a: a[1:2], (x, t, text))
        alone, _ = velocity(routing, arrays_of_three(), 3.0, at=one)
        np.testing.assert_allclose(together[1], alone[0], rtol=2e-4, atol=2e-4)


LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]))


def test_top_k_keeps_the_heaviest_and_renormalises_over_them():
    np.testing.assert_allclose(weights(LOGITS, Routing("top_k", 2)), [[0.625, 0.375, 0], [1 / 9, 0, 8 / 9]], atol=1e-6)
    np.testing.assert_allclose(weights(LOGITS, Routing("top_k", 1)), [[1, 0, 0], [0, 0, 1]], atol=1e-6)


def test_threshold_keeps_the_smallest_set_that_reaches_p():
    np.testing.assert_allclose(weights(LOGITS, Routing("threshold", p=0.75)), [[0.625, 0.375, 0], [0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(weights(LOGITS, Routing("threshold", p=0.0)), [[1, 0, 0], [0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(weights(LOGITS, Routing("threshold", p=1.0)), jnp.exp(LOGITS), atol=1e-6)


@pytest.mark.parametrize(
    "routing, named",
    [
        (Routing("top_k", 4), "top_k=4"),
        (Routing("top_k", 0), "top_k=0"),
        (Routing("threshold", p=1.5), "threshold=1.5"),
        (Routing("topk"), "routing='topk'"),
    ],
)
def test_an_impossible_rule_is_refused_by_name(routing, named):
    with pytest.raises(UserError, match=named):
        routing.check(3)


def test_new_values_do_not_recompile():
    """Prompt, seed, guidance and times are arguments of one compiled program a shape."""
    x, _, text = inputs()
    plan, keys = plan_of(Routing("top_k", 2), guidance="classifier_free"), key_data(0, 3)
    before = sparse_velocity.take_steps._cache_size()
    for scale, shift, seed in ((2.0, 1.0, 0), (5.0, 0.5, 1), (7.5, 0.25, 2)):
        changed = dataclasses.replace(text, tokens=text.tokens * (1 + seed))
        noise = jax.random.normal(jax.random.key(seed), x.shape)
        times = jnp.linspace(1, 0, 5) ** shift
        fixed_expert = jnp.zeros(4, jnp.int32)
        sample(plan, arrays_of_three(), noise, keys, times, condition_of(changed, scale), fixed_expert)
    assert sparse_velocity.take_steps._cache_size() == before + 1


def guided(x, t, text, negative=None, plan=None, **strength):
    plan = plan or plan_of(Routing("top_k", 2), guidance="classifier_free")
    v, trace = sparse_velocity.ensemble_velocity(
        plan, arrays_of_three(), x, t, condition_of(text, 4.0, negative, **strength), jnp.int32(0)
    )
    return v, trace.weight


def test_guidance_is_on_in_its_interval_and_free_outside(monkeypatch):
    x, _, text = inputs()
    t, passes = jnp.array([0.2, 0.5, 0.8]), []
    on, _ = guided(x, t, text)
    plain, _ = velocity(Routing("top_k", 2), arrays_of_three(), at=(x, t, text))
    run = sparse_velocity.expert_velocity

    def counted(*given):
        jax.debug.callback(lambda: passes.append(1))
        return run(*given)

    monkeypatch.setattr(sparse_velocity, "expert_velocity", counted)
    sparse_velocity.ensemble_velocity.clear_cache()
    one_by_one = plan_of(Routing("top_k", 2), guidance="classifier_free", expert_batch_size=1)
    some, _ = guided(x, t, text, plan=one_by_one, low=jnp.float32(0.4), high=jnp.float32(0.6))
    jax.effects_barrier()
    sparse_velocity.ensemble_velocity.clear_cache()
    np.testing.assert_allclose(some, jnp.stack([plain[0], on[1], plain[2]]), rtol=2e-4, atol=2e-4)
    assert len(passes) == 2 * 4  # two experts, for two samples without guidance and for one with both branches


def test_projected_guidance_has_no_momentum_from_steps_without_it():
    """After steps outside of its interval, the first guided one is as if it were the first of all."""
    x, _, text = inputs()
    plan = plan_of(Routing("top_k", 1), guidance="projected")
    condition = condition_of(text, 4.0, low=jnp.float32(0.1), high=jnp.float32(0.9))

    def field(t, memory):
        return sparse_velocity._guided_velocity(plan, arrays_of_three(), x, t, condition, jnp.int32(0), memory)

    _, memory, _ = field(jnp.full(3, 0.95), jnp.zeros_like(x))
    np.testing.assert_array_equal(memory, jnp.zeros_like(x))
    _, memory, _ = field(jnp.full(3, 0.5), memory)
    assert float(jnp.abs(memory).max()) > 0
    np.testing.assert_array_equal(field(jnp.full(3, 0.05), memory)[1], memory)


def test_a_negative_prompt_takes_the_place_of_no_prompt():
    x, t, text = inputs()
    negative = dataclasses.replace(text, tokens=text.tokens[::-1], pooled=-text.pooled)
    v, w = guided(x, t, text, negative)
    towards, away = (
        sparse_velocity.merge_experts(plan_of(Routing("top_k", 2)), arrays_of_three(), w, x, t, c)[0]
        for c in (text, negative)
    )
    np.testing.assert_allclose(v, away + 4.0 * (towards - away), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", get_args(GuidanceMethod))
def test_router_conditioning_decides_the_weights_of_both_branches(method):
    x, t, text = inputs()
    plans = {by: plan_of(FULL, guidance=method, router_conditioning=by) for by in get_args(RouterConditioning)}
    w = {by: guided(x, t, text, plan=plan)[1] for by, plan in plans.items()}
    np.testing.assert_allclose(w["prompt"], w["branch"], atol=1e-6)  # both report the prompt's, from two programs
    blind, _ = velocity(FULL, arrays_of_three(), at=(x, t, no_text(text)))
    assert np.abs(w["null"] - w["prompt"]).max() > 0.01
    same_prompt = dataclasses.replace(text, pooled=jnp.zeros_like(text.pooled))
    np.testing.assert_allclose(w["null"], guided(x, t, same_prompt, plan=plans["prompt"])[1], atol=1e-6)
    # No text may be an encoding, which the router then reads.
    empty = dataclasses.replace(text, pooled=text.pooled[::-1])
    condition = dataclasses.replace(condition_of(text, 4.0), null_pooled=empty.pooled)
    of_empty = sparse_velocity.ensemble_velocity(plans["null"], arrays_of_three(), x, t, condition, jnp.int32(0))[
        1
    ].weight
    np.testing.assert_allclose(of_empty, guided(x, t, empty, plan=plans["prompt"])[1], atol=1e-6)
    # Asked about each branch, the router makes the unconditional velocity the whole ensemble's without a prompt.
    v, w_prompt = guided(x, t, text, plan=plans["branch"], momentum=0.0)
    towards, _ = sparse_velocity.merge_experts(plan_of(FULL), arrays_of_three(), w_prompt, x, t, text)
    if method == "classifier_free":
        np.testing.assert_allclose(v, blind + 4.0 * (towards - blind), rtol=1e-3, atol=1e-3)
    else:
        strength = Strength(4.0, momentum=0.0)
        expected, _ = projected(towards, blind, x, t, strength, jnp.zeros_like(x))
        np.testing.assert_allclose(v, expected, rtol=1e-3, atol=1e-3)


def test_the_routers_temperature_goes_from_one_expert_to_all_alike():
    x, t, text = inputs()

    def weight(temperature):
        condition = dataclasses.replace(condition_of(text), router_temperature=jnp.float32(temperature))
        return sparse_velocity.ensemble_velocity(plan_of(FULL), arrays_of_three(), x, t, condition, jnp.int32(0))[
            1
        ].weight

    plain = np.asarray(weight(1.0))
    np.testing.assert_allclose(weight(2.0), np.sqrt(plain) / np.sqrt(plain).sum(-1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(weight(1e-4), np.eye(3)[plain.argmax(-1)], atol=1e-4)
    np.testing.assert_allclose(weight(1e4), np.full((3, 3), 1 / 3), atol=1e-3)


def test_a_stochastic_solver_draws_fresh_noise_every_step_and_for_every_sample():
    x, _, text = inputs()
    plan, arrays = plan_of(FULL, 3, GaussianVelocity(), GaussianPosterior(), solver="ancestral"), mixture_arrays()
    times, fixed_expert = jnp.linspace(1, 0, 9), jnp.zeros(8, jnp.int32)
    draw = lambda keys: sample(plan, arrays, x, keys, times, condition_of(text), fixed_expert)[0]  # noqa: E731
    keys = key_data(0, 3)
    first = draw(keys)
    np.testing.assert_array_equal(first, draw(keys))
    other = draw(jnp.concatenate([keys[:2], key_data(5, 1)]))
    np.testing.assert_allclose(other[:2], first[:2], atol=1e-5)
    assert np.abs(other[2] - first[2]).max() > 0.05
