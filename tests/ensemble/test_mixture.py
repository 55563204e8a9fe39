"""The ensemble is the right mixture: invariant 5 of the design, on exact experts and on real networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.ensemble import sampler
from paris_jax.ensemble.routing import Routing, weights
from paris_jax.ensemble.sampler import Plan, Text, Weights
from paris_jax.errors import Refused
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig

NETWORK = DiTConfig(
    channels=2, text_width=3, pooled_width=4, hidden=16, heads=1, double_blocks=1, single_blocks=1, rope_axes=(4, 6, 6)
)
ROUTER = RouterConfig(channels=2, pooled_width=4, clusters=3, hidden=16, heads=1, blocks=1, rope_axes=(4, 6, 6))
FULL = Routing("full")


def random_params(config, seed):
    leaves, tree = jax.tree.flatten(functional.abstract(config))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def inputs(batch=3):
    keys = jax.random.split(jax.random.key(9), 3)
    text = Text(
        jax.random.normal(keys[0], (batch, 4, 3)),
        jnp.arange(batch, dtype=jnp.int32) % 4 + 1,
        jax.random.normal(keys[1], (batch, 4)),
    )
    return jax.random.normal(keys[2], (batch, 2, 2, 4, 2)), jnp.linspace(0.2, 0.8, batch), text


def velocity(routing, arrays, scale=1.0, forced=0, network=NETWORK, router=ROUTER, at=None):
    x, t, text = at or inputs()
    plan = Plan(network, router, routing, guided=scale != 1.0)
    return sampler.velocity(plan, arrays, x, t, text, jnp.float32(scale), jnp.int32(forced))


@dataclasses.dataclass(frozen=True)
class GaussianVelocity:
    """The exact velocity of the flow to N(mean, std^2) for every element, as an expert."""

    def apply(self, params, x, t, tokens, length, pooled):
        t = t.reshape(-1, 1, 1, 1, 1)
        mean, std = params["mean"], params["std"]
        variance = (1 - t) ** 2 * std**2 + t**2
        return -mean + (t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)


@dataclasses.dataclass(frozen=True)
class GaussianPosterior:
    """log p(k | x_t, t) of a Gaussian mixture up to a constant, prior included, as a router."""

    def apply(self, params, x, t, pooled):
        t, x = t[:, None], x.reshape(x.shape[0], 1, -1)
        mean, std, prior = params["mean"], params["std"], params["prior"]
        variance = (1 - t) ** 2 * std**2 + t**2
        square = jnp.square(x - ((1 - t) * mean)[..., None]).sum(-1)
        return jnp.log(prior) - 0.5 * square / variance - 0.5 * x.shape[-1] * jnp.log(variance)


MIXTURE = {"mean": jnp.array([-1.0, 0.3, 1.2]), "std": jnp.array([0.3, 0.5, 0.2]), "prior": jnp.array([0.2, 0.5, 0.3])}


def mixture_arrays(present=(0, 1, 2)):
    chosen = jnp.array(present)
    return Weights({k: MIXTURE[k][chosen] for k in ("mean", "std")}, MIXTURE, chosen.astype(jnp.int32))


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


def test_samples_of_the_exact_ensemble_follow_the_mixture():
    count = 4000
    _, _, text = inputs(count)
    noise = jax.random.normal(jax.random.key(3), (count, 1, 1, 1, 1))
    plan = Plan(GaussianVelocity(), GaussianPosterior(), FULL, solver="heun", guided=False)
    z, _ = sampler.sample(
        plan, mixture_arrays(), noise, jnp.linspace(1, 0, 129), text, jnp.float32(1), jnp.zeros(128, jnp.int32)
    )
    rng = np.random.default_rng(0)
    component = rng.choice(3, count, p=np.asarray(MIXTURE["prior"]))
    data = np.asarray(MIXTURE["mean"])[component] + np.asarray(MIXTURE["std"])[component] * rng.normal(size=count)
    both = np.sort(np.concatenate([np.ravel(z), data]))
    empirical = [np.searchsorted(np.sort(s), both, side="right") / count for s in (np.ravel(z), data)]
    kolmogorov = np.abs(empirical[0] - empirical[1]).max()
    assert kolmogorov < 1.95 * np.sqrt(2 / count)  # two-sample Kolmogorov-Smirnov at level 0.001


def test_a_missing_expert_is_the_softmax_over_the_rest():
    x, t, text = inputs(6)
    kept = {"mean": MIXTURE["mean"][::2], "std": MIXTURE["std"][::2], "prior": MIXTURE["prior"][::2] / 0.5}
    v, _ = velocity(
        FULL, mixture_arrays((0, 2)), network=GaussianVelocity(), router=GaussianPosterior(), at=(x, t, text)
    )
    np.testing.assert_allclose(v, marginal_velocity(x, t, kept), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("routing", [FULL, Routing("top_k", 1), Routing("top_k", 2), Routing("threshold", p=0.7)])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_copies_of_one_expert_are_that_expert(routing, scale):
    one = random_params(NETWORK, 0)
    arrays = Weights(stack([one] * 3), random_params(ROUTER, 1), jnp.arange(3))
    single = Weights(stack([one]), None, jnp.arange(1))
    expected, _ = velocity(FULL, single, scale, router=None)
    np.testing.assert_allclose(velocity(routing, arrays, scale)[0], expected, rtol=2e-4, atol=2e-4)


def arrays_of_three():
    return Weights(stack([random_params(NETWORK, k) for k in range(3)]), random_params(ROUTER, 7), jnp.arange(3))


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_all_rules_that_keep_every_expert_agree(scale):
    full, w = velocity(FULL, arrays_of_three(), scale)
    for routing in (Routing("top_k", 3), Routing("threshold", p=1.0)):
        other, w_other = velocity(routing, arrays_of_three(), scale)
        np.testing.assert_allclose(other, full, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(w_other, w, atol=1e-6)


@pytest.mark.parametrize("expert", range(3))
def test_a_forced_expert_and_a_one_hot_router_are_that_expert(expert):
    arrays = arrays_of_three()
    alone = Weights(jax.tree.map(lambda a: a[expert : expert + 1], arrays.experts), None, jnp.arange(1))
    expected, _ = velocity(FULL, alone, router=None)
    np.testing.assert_allclose(velocity(Routing("forced"), arrays, forced=expert)[0], expected, rtol=1e-4, atol=1e-4)
    bias = arrays.router["logits_out"]["bias"] + 1e4 * jax.nn.one_hot(expert, 3)
    router = arrays.router | {"logits_out": arrays.router["logits_out"] | {"bias": bias}}
    one_hot = Weights(arrays.experts, router, arrays.clusters)
    for routing in (FULL, Routing("top_k", 1), Routing("top_k", 2), Routing("threshold", p=0.9)):
        np.testing.assert_allclose(velocity(routing, one_hot)[0], expected, rtol=1e-4, atol=1e-4)


def test_guidance_inside_the_merge_is_guidance_outside_with_the_same_weights():
    x, t, text = inputs()
    arrays, scale = arrays_of_three(), 4.0
    guided, w = velocity(FULL, arrays, scale)
    plan = Plan(NETWORK, ROUTER, FULL)
    branches = [sampler.merge(plan, arrays, w, x, t, own, None) for own in (text, text.null())]
    np.testing.assert_allclose(guided, branches[1] + scale * (branches[0] - branches[1]), rtol=1e-3, atol=1e-3)


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
    with pytest.raises(Refused, match=named):
        routing.check(3)


def test_new_values_do_not_recompile():
    """Prompt, seed, guidance and times are arguments of one compiled program a shape."""
    x, _, text = inputs()
    plan = Plan(NETWORK, ROUTER, Routing("top_k", 2))
    before = sampler.sample._cache_size()
    for scale, shift, seed in ((2.0, 1.0, 0), (5.0, 0.5, 1), (7.5, 0.25, 2)):
        changed = dataclasses.replace(text, tokens=text.tokens * (1 + seed))
        noise = jax.random.normal(jax.random.key(seed), x.shape)
        times = jnp.linspace(1, 0, 5) ** shift
        sampler.sample(plan, arrays_of_three(), noise, times, changed, jnp.float32(scale), jnp.zeros(4, jnp.int32))
    assert sampler.sample._cache_size() == before + 1
