"""Times implementations of top-k sampling over K experts, relative to k passes of one expert over the same batch.

    python -m tests.benchmarks.sparse [--config=configs/shapes.py:tiny] [--experts=3,8,16] [--batch=1,8,32] [--k=1]
        [--ways=velocity,blocks,pairs,switch,skip,dense] [--rounds=20] [--config.a.b=value ...]

    each alone  the other baseline: each sample's passes through its own experts, one sample at a time, unstacked
    velocity    the sampler's velocity with the router, against k passes and one pass of the router
    blocks N    the same without the router: pairs of (sample, expert) sorted by expert, N of one expert at a time;
                a star marks the N that the sampler chooses
    pairs       one pair at a time, with the expert's parameters sliced from the stack first
    switch      one pair at a time, `lax.switch` between the experts
    skip        every expert that any sample chose, on the whole batch
    dense       every expert on the whole batch
    ragged      the matrix products of a pass as grouped products (`jax.lax.ragged_dot`), against plain ones

The samples of a batch choose different experts. The implementations take turns, so that a slow moment of the machine
affects all of them. Prints, for each, the median ratio of its time to that of k passes over the batch and to that of
`each alone`, its temporary memory, and its compile time in seconds.
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.config import files
from paris_jax.config.experiment import Experiment
from paris_jax.diffusion.guidance import Strength
from paris_jax.encoders import codecs
from paris_jax.ensemble import conditioning, sparse_velocity
from paris_jax.ensemble.routing import Routing
from paris_jax.local_jobs.devices import keep_freed_memory
from paris_jax.models import functional
from paris_jax.models.dit import video_tokens

TEXT_TOKENS = 14  # text tokens per clip, as in the captions of the shapes
TEXT = 64, 64  # widths of token and pooled embeddings


def random_params(config: functional.Config, experts: int):
    """Random parameters of `experts` networks, stacked along the first axis."""
    leaves, tree = jax.tree.flatten(functional.abstract(config))
    rng = np.random.default_rng(0)
    return tree.unflatten([jnp.asarray(0.05 * rng.normal(size=(experts, *a.shape)), jnp.float32) for a in leaves])


def inputs(shape, batch):
    rng = np.random.default_rng(1)
    draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
    text = draw(batch, TEXT_TOKENS, TEXT[0]), jnp.full(batch, TEXT_TOKENS, jnp.int32), draw(batch, TEXT[1])
    return draw(batch, *shape), jnp.full(batch, 0.5), *text


def routing_weights(batch: int, experts: int, k: int) -> jax.Array:
    """Routing weights (B, E) of k experts per sample; every sample chooses other experts."""
    weight = np.zeros((batch, experts), np.float32)
    for b in range(batch):
        weight[b, (b + np.arange(k)) % experts] = 1 / k
    return jnp.asarray(weight)


def blocks(config, stacks, weight_BE, rows, k, size):
    run = lambda expert, rows: functional.apply_member(config, stacks, expert, *rows)  # noqa: E731
    return sparse_velocity.weighted_sum(run, weight_BE, rows, k, size)


def map_pairs(run, weight_BE, rows, k):
    weight_BS, expert_BS = jax.lax.top_k(weight_BE, k)

    def pair(i):
        row = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i // k, 1), rows)
        return run(expert_BS.reshape(-1)[i], row)[0]

    v = jax.lax.map(pair, jnp.arange(weight_BS.size)).reshape(*weight_BS.shape, *rows[0].shape[1:])
    return jnp.einsum("bs,bs...->b...", weight_BS, v)


def pairs(config, stacks, weight_BE, rows, k):
    expert = lambda e: jax.tree.map(lambda a: a[e], stacks)  # noqa: E731
    return map_pairs(lambda e, row: functional.apply(config, expert(e), *row), weight_BE, rows, k)


def switch(config, stacks, weight_BE, rows, k):
    def run(e, *row):  # sliced inside the branch; outside, every expert would be copied from the stack
        return functional.apply(config, jax.tree.map(lambda a: a[e], stacks), *row)

    branches = [functools.partial(run, e) for e in range(weight_BE.shape[1])]
    return map_pairs(lambda e, row: jax.lax.switch(e, branches, *row), weight_BE, rows, k)


def sequential(config, stacks, weight_BE, rows, k, skipping):
    def add(total, expert):
        params, weight_B = expert
        run = lambda: weight_B[:, None, None, None, None] * functional.apply(config, params, *rows)  # noqa: E731
        if skipping:
            return total + jax.lax.cond((weight_B > 0).any(), run, lambda: jnp.zeros_like(total)), None
        return total + run(), None

    return jax.lax.scan(add, jnp.zeros_like(rows[0]), (stacks, weight_BE.T))[0]


def products(config, stacks, tokens: int, groups_E, grouped: bool):
    """Matrix products of the blocks for `tokens` tokens: with one expert, or grouped by the expert of each token."""
    total = jnp.float32(0)
    for name in functional.BLOCKS:
        for kernel in jax.tree.leaves(stacks[name]):
            if kernel.ndim != 4:
                continue
            x = jnp.ones((tokens, kernel.shape[2]))

            def layer(total, w, x=x):
                y = jax.lax.ragged_dot(x, w, groups_E) if grouped else x @ w[0]
                return total + y.sum(), None

            total, _ = jax.lax.scan(layer, total, jnp.moveaxis(kernel, 1, 0))
    return total


def ways_of(config, stacks, weight_BE, rows, k, wanted):
    batch, experts = weight_BE.shape
    random_params = {}
    if "blocks" in wanted:
        for size in (n for n in (1, 2, 4, 8, 16, 32) if n <= batch):
            random_params[f"blocks {size}"] = lambda s, w, r, size=size: blocks(config, s, w, r, k, size)
    for name, implementation in {"pairs": pairs, "switch": switch}.items():
        if name in wanted:
            random_params[name] = lambda s, w, r, implementation=implementation: implementation(config, s, w, r, k)
    for name in ("skip", "dense"):
        if name in wanted:
            random_params[name] = lambda s, w, r, name=name: sequential(config, s, w, r, k, name == "skip")
    if "ragged" in wanted:
        tokens = batch * video_tokens(rows[0].shape[1:])
        groups = jnp.asarray(np.diff(np.linspace(0, tokens, experts + 1).astype(int)), jnp.int32)
        random_params["products, plain"] = lambda s, w, r: products(config, s, tokens, groups, False)
        random_params["products, ragged"] = lambda s, w, r: products(config, s, tokens, groups, True)
    return random_params


@dataclasses.dataclass(frozen=True)
class ForcedRouter:
    """A router that runs its network but adds the given choices to the logits, which decide the routing."""

    network: functional.Config
    cond_frames: bool = False

    def apply(self, params, *inputs):
        return 1e-3 * functional.apply(self.network, params["router"], *inputs) + params["choices"]


def velocity(config, router, k):
    """Returns the sampler's velocity with a router forced to the given weights (B, E)."""
    forced = ForcedRouter(router)

    def ensemble_velocity(stacks, weight_BE, rows, router_params):
        experts = weight_BE.shape[1]
        plan = sparse_velocity.SamplerConfig(
            (config,), tuple((0, e) for e in range(experts)), forced, Routing("top_k", k)
        )
        params = {"router": router_params, "choices": jnp.where(weight_BE > 0, 0.0, -1e3)}
        arrays = sparse_velocity.EnsembleParams((stacks,), params, jnp.arange(experts))
        text = conditioning.EncodedText(*rows[2:])
        condition = conditioning.Condition(text, text, Strength(1.0))
        return sparse_velocity.ensemble_velocity(plan, arrays, *rows[:2], condition, jnp.int32(0))[0]

    return ensemble_velocity


def each_alone(config, apart, weight_BE, rows):
    """Returns a call that runs each sample alone through its own experts; `apart` holds the unstacked experts."""
    run = jax.jit(lambda params, row: functional.apply(config, params, *row))
    pairs = [(apart[e], [a[b : b + 1] for a in rows]) for b, e in zip(*np.nonzero(np.asarray(weight_BE)), strict=True)]
    return lambda: [run(params, row) for params, row in pairs]


def timed(calls, rounds):
    """Times the calls in turn, after one warm-up round; returns seconds as {name: (rounds,)}."""
    seconds = {name: np.empty(rounds) for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= 0:
                seconds[name][turn] = time.perf_counter() - start
    return seconds


def compare(config, router, shape, experts, batch, k, wanted, rounds):
    stacks, rows, weight = random_params(config, experts), inputs(shape, batch), routing_weights(batch, experts, k)
    apart = [jax.tree.map(lambda a, e=e: jnp.array(a[e]), stacks) for e in range(experts)]
    router = dataclasses.replace(router, clusters=experts)
    router_params = jax.tree.map(lambda a: a[0], random_params(router, 1))
    ways = {
        "one expert": (lambda first, w, r: functional.apply(config, first, *r), (apart[0], weight, rows)),
        "router": (
            lambda p, x, t, pooled: functional.apply(router, p, x, t, pooled),
            (router_params, *rows[:2], rows[4]),
        ),
    }
    for name, way in ways_of(config, stacks, weight, rows, k, wanted).items():
        ways[name] = way, (stacks, weight, rows)
    if "velocity" in wanted:
        ways["velocity"] = velocity(config, router, k), (stacks, weight, rows, router_params)
    calls, memory, compiling = {}, {}, {}
    for name, (way, arguments) in ways.items():
        start = time.perf_counter()
        compiled = jax.jit(way).lower(*arguments).compile()
        compiling[name] = time.perf_counter() - start
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        calls[name] = functools.partial(compiled, *arguments)
    calls["each alone"] = each_alone(config, apart, weight, rows)
    seconds = timed(calls, rounds)
    milliseconds = {name: f"{1e3 * np.median(seconds[name]):.1f} ms" for name in ("one expert", "router", "each alone")}
    print(
        f"K = {experts}, k = {k}, batch {batch}:", ", ".join(f"{n} {ms}" for n, ms in milliseconds.items()), flush=True
    )
    chosen_size = sparse_velocity.block_size(video_tokens(shape), batch, batch * k / experts, 1, jax.default_backend())
    for name in [n for n in memory if n not in milliseconds]:
        passes, alone = k * seconds["one expert"], seconds["each alone"]
        if name == "velocity":
            passes, alone = passes + seconds["router"], alone + seconds["router"]
        if name.startswith("products"):
            passes = seconds["products, plain"]
        star = "*" if name == f"blocks {chosen_size}" else ""
        figures = f"{np.median(seconds[name] / passes):6.2f} {np.median(seconds[name] / alone):6.2f}"
        print(f"  {name + star:18s} {figures} {memory[name]:8.1f} MiB {compiling[name]:6.1f} s", flush=True)


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=f"{files.embedded()}:tiny")
    parser.add_argument("--experts", type=numbers, default=[3, 8, 16])
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32])
    parser.add_argument("--k", type=numbers, default=[1])
    parser.add_argument("--ways", default="velocity,blocks,pairs,switch,skip,dense")
    parser.add_argument("--rounds", type=int, default=20)
    flags, changes = parser.parse_known_args()
    config = files.load(flags.config)
    files.change(config, [c.removeprefix("--config.") for c in changes])
    experiment = Experiment.from_config(config)
    shape = codecs.latent_shape(experiment)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    sizes = {"channels": shape[-1], "pooled_width": TEXT[1], "dtype": dtype}
    network = functional.network_config(experiment.network, text_width=TEXT[0], **sizes)
    router = functional.router_config(experiment.router, clusters=1, **sizes)
    print(f"{functional.count(network) / 1e6:.2f}M parameters, latent {shape}, {jax.devices()[0].device_kind}")
    for experts in flags.experts:
        for batch in flags.batch:
            for k in flags.k:
                compare(network, router, shape, experts, batch, k, flags.ways.split(","), flags.rounds)


if __name__ == "__main__":
    main()
