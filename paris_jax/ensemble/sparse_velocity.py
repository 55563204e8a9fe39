"""The ensemble's velocity, and a compiled program that takes any number of a solver's steps.

    v(x, t, c) = sum_k weight_k(x, t, c) v_k(x, t, c)

Guidance asks for the velocity under several conditions, the branches: text and frames that are given, the frames alone,
neither. Each is a row of its own, (sample, branch), which is merged over the experts; then the branches are combined.
All branches of a sample have the same weights unless the router is asked about each of them, so linear guidance may be
read as standing inside the sum.

Experts of one architecture stand stacked on a leading axis, so that the expert of a row is an index.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from paris_jax.diffusion import guidance, path, predictions, randomness, solvers
from paris_jax.ensemble.conditioning import Condition, EncodedText
from paris_jax.ensemble.routing import Routing, router_logits
from paris_jax.models import functional, stacks
from paris_jax.models.dit import video_tokens

# Video tokens that keep a device busy: up to so many, more rows together cost nothing. A CPU is busy with one row.
SATURATING_TOKENS = {"cpu": 1, "gpu": 4096, "tpu": 4096}
# Video tokens beyond which rows together are not worked on faster each, either.
EFFICIENT_TOKENS = {"cpu": 256, "gpu": 4096, "tpu": 4096}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnsembleParams:
    """Arrays of an ensemble.

    Attributes:
      experts: for each kind of network, the stacked parameters of its experts, each (members, ...).
      router: parameters, or None for one expert on its own.
      clusters: (E,) int32, the router's class of each expert.
    """

    experts: tuple[functional.Params, ...]
    router: functional.Params | None
    clusters: jax.Array


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """What decides the compiled code: new values of anything else do not recompile.

    Attributes:
      networks: the kinds of expert.
      places: of each expert, its kind and its place in the kind's stack.
      router: None for one expert on its own.
      guidance: "" (none) or one of `guidance.METHODS`.
      by_image: whether frames that are given guide, too.
      routed_by: the text the router is told for the branches: for all of them the "prompt", each "branch" its own, or
        "nothing".
      block: rows of one expert that are worked on together; 0 chooses by the size of a row and the device.
    """

    networks: tuple[Any, ...]
    places: tuple[tuple[int, int], ...]
    router: Any
    routing: Routing
    solver: str = "euler"
    guidance: str = ""
    by_image: bool = False
    routed_by: str = "prompt"
    block: int = 0

    @property
    def branches(self) -> int:
        """Rows of a sample: with a condition, without its text, without its frames, too."""
        return 3 if self.by_image else 2 if self.guidance else 1

    def rows_at_once(self, shape: tuple[int, ...], streamed: bool = False) -> int:
        """`block`, or the one chosen for rows of this shape (R, T, H, W, C), and experts `streamed` from the host."""
        R = shape[0]
        branches, experts = self.branches, len(self.places)
        if self.block:
            return min(self.block, R)
        if self.routing.rule == "full":
            return -(-R // branches)  # every expert sees every sample
        # How many experts a threshold needs is not known; mostly it is one.
        used = 1 if self.routing.rule == "threshold" else self.routing.most(experts)
        tokens, platform = video_tokens(shape[1:]), jax.default_backend()
        return block_size(tokens, R, R * used / experts, branches, platform, streamed)


def expert_velocity(
    plan: SamplerConfig, kind: int, stack: Any, member_S: jax.Array, expert: jax.Array, rows: Any
) -> jax.Array:
    """The velocity, for all rows given, of the expert at place member_S[expert] of a kind's stack."""
    x, t_B, text, kept = rows
    network, told = plan.networks[kind], (text.tokens, text.length, text.pooled)
    told = (*told, kept) if network.kept_frames else told

    def predict(x: jax.Array, t_B: jax.Array) -> jax.Array:
        return functional.apply_member(network, stack, member_S[expert], x, t_B, *told)

    return predictions.velocity(network.predicts, predict, x, t_B)


def merge_experts(
    plan: SamplerConfig,
    arrays: EnsembleParams,
    weight_RE: jax.Array,
    x,
    t_R,
    text: EncodedText,
    kept: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the chosen experts' velocities, (R, T, H, W, C); and who broke, (E,), see `dispatch.merge`.

    On a mesh with an axis `expert`, each group of devices works on the experts that it holds, and sums meet at the end.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spread, experts = "expert" in mesh.shape, weight_RE.shape[1]
    held_GS, places = experts_by_group(plan.places, mesh.shape["expert"] if spread else 1)
    weight_GRS = jnp.moveaxis(jnp.where(held_GS >= 0, weight_RE[:, held_GS], 0.0), 1, 0)
    most = plan.routing.most(experts)

    def of_group(kinds: Any, weight_1RS: jax.Array, rows: Any, held_1S: Any, **how: Any) -> tuple[Any, Any]:
        """The sum over the experts of one group: a kind at a time, so that all groups are at the same network."""
        total, broken_E = jnp.zeros(rows[0].shape), jnp.zeros(experts, jnp.int32)
        for kind, stack in enumerate(kinds):
            held = np.array([s for s, place in enumerate(places) if place[0] == kind])
            member_S = jnp.asarray([places[s][1] for s in held], jnp.int32)
            run = functools.partial(expert_velocity, plan, kind, stack, member_S)
            block = plan.rows_at_once(rows[0].shape, stacks.on_host(stack))
            v, broken_S = weighted_sum(run, weight_1RS[0][:, held], rows, min(most, len(held)), block, **how)
            total, broken_E = total + v, broken_E.at[held_1S[0][held]].add(broken_S)  # an empty place breaks nothing
        return total, broken_E

    if not spread or mesh.shape["expert"] * mesh.shape["data"] == 1:
        return of_group(arrays.experts, weight_GRS, (x, t_R, text, kept), held_GS)

    # Where the devices of a group talk to each other, all groups take as many turns as the busiest one: some of XLA's
    # exchanges wait for every device of the mesh.
    talking = mesh.size > mesh.shape["expert"] * mesh.shape["data"]

    def of_its_group(*given: Any) -> tuple[jax.Array, jax.Array]:
        how = {"turns": lambda blocks: jax.lax.pmax(blocks, ("expert", "data"))} if talking else {}
        v, broken_E = of_group(*given, **how)
        return jax.lax.psum(v, "expert"), jax.lax.psum(broken_E, ("expert", "data"))

    more = -x.shape[0] % mesh.shape["data"]  # empty rows, which cost nothing
    rows = jax.tree.map(lambda a: jnp.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))), (x, t_R, text, kept))
    weight_GRS = jnp.pad(weight_GRS, ((0, 0), (0, more), (0, 0)))
    shared = jax.shard_map(
        of_its_group,
        axis_names={"expert", "data"} if talking else set(mesh.axis_names),
        in_specs=(P("expert"), P("expert", "data"), P("data"), P("expert")),
        out_specs=(P("data"), P()),
        check_vma=False,
    )
    v, broken_E = shared(arrays.experts, weight_GRS, rows, jnp.asarray(held_GS))
    return v[: x.shape[0]], broken_E


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What is told of a step: the weights that each sample's prompt gave the experts, (B, E), and who broke, (E,)."""

    weight: jax.Array
    broken: jax.Array


def _guided_velocity(
    plan: SamplerConfig, arrays: EnsembleParams, x, t_B, told: Condition, forced, memory, step: Any = 0, steps=1
):
    """The ensemble's guided velocity, the memory of guidance, and what there is to tell (`Trace`)."""
    text, kept = told.branches(plan.branches)
    x_R, t_R = (jnp.repeat(a, plan.branches, axis=0) for a in (x, t_B))
    weight_RE = _routing_weights(plan, arrays, x_R, t_R, text, kept, told, forced)
    by_text_B, by_image_B = told.strength.at(t_B, step)
    # Where guidance is off, the branches that it needs are not computed.
    needed = jnp.ones_like(by_text_B), by_text_B | (plan.by_image & by_image_B), by_image_B
    needed_R = jnp.stack(needed[: plan.branches], 1).reshape(-1, 1)
    v, broken_E = merge_experts(plan, arrays, weight_RE * needed_R, x_R, t_R, text, kept)
    conditional, *others = (v[branch :: plan.branches] for branch in range(plan.branches))
    trace = Trace(weight_RE[:: plan.branches], broken_E)
    if not others:
        return conditional, memory, trace
    if plan.guidance == "projected":
        guided, running = guidance.projected(conditional, others[0], x, t_B, told.strength, memory)
        memory = jnp.where(path.per_sample(by_text_B, x), running, memory)
    else:
        guided = guidance.classifier_free(conditional, others[0], told.strength.scale)
    guided = jnp.where(path.per_sample(by_text_B, x), guided, conditional)
    if plan.by_image:
        scales_T = told.strength.image_scales(step, steps, x.shape[1])
        guided += jnp.where(path.per_sample(by_image_B, x), guidance.by_image(others[0], others[1], scales_T), 0.0)
    if plan.guidance == "classifier_free":
        guided = guidance.rescaled(guided, conditional, told.strength.rescale)
    return guided, memory, trace


def _routing_weights(
    plan: SamplerConfig, arrays: EnsembleParams, x_R, t_R, text: EncodedText, kept, told: Condition, forced
) -> jax.Array:
    """Each expert's weight for every row, (R, E): the router is asked about each branch, or for each sample once."""
    if plan.routed_by == "branch":
        return told.weights(
            plan.routing,
            router_logits(plan.router, arrays.router, arrays.clusters, x_R, t_R, text.pooled, kept),
            forced,
        )
    nothing = jnp.zeros_like(told.text.pooled) if told.nothing is None else told.nothing
    pooled = told.text.pooled if plan.routed_by == "prompt" else nothing
    x, t_B = x_R[:: plan.branches], t_R[:: plan.branches]
    weight_BE = told.weights(
        plan.routing, router_logits(plan.router, arrays.router, arrays.clusters, x, t_B, pooled, told.kept), forced
    )
    return jnp.repeat(weight_BE, plan.branches, axis=0)


def _guidance_state(plan: SamplerConfig, x: jax.Array) -> Any:
    """What guidance remembers before the first step."""
    return jnp.zeros_like(x) if plan.guidance == "projected" else ()


@functools.partial(jax.jit, static_argnames=("plan",))
def ensemble_velocity(
    plan: SamplerConfig, arrays: EnsembleParams, x, t_B, told: Condition, forced: jax.Array
) -> tuple[jax.Array, Trace]:
    """The ensemble's velocity (B, T, H, W, C), each sample at its own time, and what there is to tell."""
    v, _, trace = _guided_velocity(plan, arrays, x, t_B, told, forced, _guidance_state(plan, x))
    return v, _replicated(trace)


def initial_state(plan: SamplerConfig, noise: jax.Array, steps: int) -> solvers.State:
    """Before the first of so many steps, from noise (B, T, H, W, C)."""
    lead, B, E = (steps, solvers.EVALUATIONS[plan.solver]), noise.shape[0], len(plan.places)
    traces = Trace(jnp.zeros((*lead, B, E), jnp.float32), jnp.zeros((*lead, E), jnp.int32))
    return solvers.begin(noise, _guidance_state(plan, noise), traces)


@functools.partial(jax.jit, static_argnames=("plan",))
def take_steps(
    plan: SamplerConfig,
    arrays: EnsembleParams,
    state: solvers.State,
    first: jax.Array | int,
    last: jax.Array | int,
    keys_B2: jax.Array,
    times: jax.Array,
    told: Condition,
    forced_S: jax.Array,
) -> solvers.State:
    """Takes the steps from `first` up to `last` on the way from noise to data, with one program for any two of them.

    Args:
      state: from `begin`, or from the steps before.
      keys_B2: (B, 2) uint32, data of a key for each sample, for the noise that a stochastic solver adds.
      times: (S + 1,) from 1 to 0.
      told: prompts and guidance.
      forced_S: (S,) int32, the expert of each step for the rule "forced".

    Returns:
      The state, whose `x` is the latent (B, T, H, W, C) in units of the training data's spread after the last step.
    """

    def field(x: jax.Array, t: jax.Array, step: jax.Array, memory: Any) -> tuple[jax.Array, Any, Trace]:
        t_B, steps = jnp.full(x.shape[:1], t), times.shape[0] - 1
        return _guided_velocity(plan, arrays, x, t_B, told, forced_S[step], memory, step, steps)

    def fresh(step: jax.Array) -> jax.Array:
        keys_B = jax.random.wrap_key_data(keys_B2)
        return randomness.normal(jax.vmap(jax.random.fold_in, (0, None))(keys_B, step), state.x.shape[1:])

    # Every process reads all of it.
    return _replicated(solvers.integrate(field, state, times, first, last, plan.solver, fresh))


def trace_of(state: solvers.State) -> Trace:
    """What was told of each step, (S, ...): the weights of its first evaluation, and who broke in any of them."""
    return Trace(state.traces.weight[:, 0], state.traces.broken.sum(1))


def _replicated(tree: Any) -> Any:
    """The same arrays, on a mesh whole on every device."""
    return tree if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(tree, P())


# Run(expert, rows) -> velocities (m, ...): () int32, and the inputs of m rows.
Run = Callable[[jax.Array, Any], jax.Array]


def block_size(tokens: int, rows: int, pairs_each: float, together: int, platform: str, streamed: bool = False) -> int:
    """Rows of one expert that are worked on together.

    The most of: as many as keep the device busy; the rows that go to the same expert anyway; and as many as go faster
    together, but at most half of what an expert gets on average, so that few blocks are left half empty. Not more than
    there are.

    Args:
      tokens: video tokens of a row.
      rows: of the batch.
      pairs_each: rows that an expert gets on average.
      together: rows of one sample, its branches.
      streamed: whether each block fetches its expert from the host, so that every row more is worth it.
    """
    busy, enough = (-(-of.get(platform, 1) // tokens) for of in (SATURATING_TOKENS, EFFICIENT_TOKENS))
    faster = int(pairs_each / 2) if streamed else min(enough, int(pairs_each / 2))
    return max(1, min(rows, max(busy, together, faster)))


def weighted_sum(
    run: Run,
    weight_RE: jax.Array,
    rows: Any,
    most: int,
    block: int,
    turns: Callable[[jax.Array], jax.Array] = lambda blocks: blocks,
) -> tuple[jax.Array, jax.Array]:
    """sum_e weight_e v_e of each row.

    Args:
      run: one expert's velocity for `block` rows.
      weight_RE: weight of each expert, 0 where it is not used; a row of zeros costs nothing and gives zeros.
      rows: the experts' inputs, arrays (R, ...); the first is the latent.
      most: experts that a row may use.
      block: rows of one expert that are worked on together.
      turns: how often the loop goes round for so many blocks; turns beyond them change nothing.

    Returns:
      (R, T, H, W, C) float32; and, (E,) int32, how many finite rows each expert answered with values that are not.
    """
    experts = weight_RE.shape[1]
    weight_RS, expert_RS = jax.lax.top_k(weight_RE, most)
    weight_P = weight_RS.reshape(-1)
    expert_P = jnp.where(weight_P > 0, expert_RS.reshape(-1), experts)  # what is not used belongs to nobody
    order_P = jnp.argsort(expert_P)
    count_E = jnp.sum(expert_P[:, None] == jnp.arange(experts), axis=0)
    first_E = jnp.cumsum(count_E) - count_E
    blocks_E = -(-count_E // block)
    end_E = jnp.cumsum(blocks_E)

    def add(number: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, broken_E = so_far
        expert = jnp.minimum(jnp.searchsorted(end_E, number, side="right"), experts - 1)
        within = (number - end_E[expert] + blocks_E[expert]) * block + jnp.arange(block)
        pair = order_P[jnp.minimum(first_E[expert] + within, order_P.shape[0] - 1)]
        row = pair // most
        inputs = jax.tree.map(lambda a: a[row], rows)
        v = run(expert, inputs)
        # The last block of an expert may hold rows that are not its own; whatever they give is left out.
        own = within < count_E[expert]
        weighted = jnp.where(path.per_sample(own, v), path.per_sample(weight_P[pair], v) * v, 0.0)
        broken = own & _finite(jax.tree.leaves(inputs)[0]) & ~_finite(v)
        return total.at[row].add(weighted), broken_E.at[expert].add(broken.sum())

    x = jax.tree.leaves(rows)[0]
    begin = jnp.zeros(x.shape, jnp.float32), jnp.zeros(experts, jnp.int32)
    return jax.lax.fori_loop(0, turns(end_E[-1]), add, begin)


def _finite(x: jax.Array) -> jax.Array:
    """Whether all of each row's values are finite, (R,)."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def experts_by_group(
    places: tuple[tuple[int, int], ...], groups: int
) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """Which experts each of so many groups holds.

    Args:
      places: of each expert, its kind and its place in the kind's stack.

    Returns:
      The experts of each group, (groups, held) int32, -1 where a place is empty; and of each such place, its kind and
      its place in the group's piece of the kind's stack.
    """
    of_place = {place: expert for expert, place in enumerate(places)}
    kinds = sorted({kind for kind, _ in places})
    each = [-(-sum(k == kind for k, _ in places) // groups) for kind in kinds]  # members of a kind a group holds
    local = tuple((kind, member) for kind in kinds for member in range(each[kind]))
    held = [[of_place.get((kind, g * each[kind] + member), -1) for kind, member in local] for g in range(groups)]
    return np.asarray(held, np.int32), local
