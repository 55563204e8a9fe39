"""The ensemble's velocity at the cost of the selected experts, and the compiled program of its solver steps.

    v(x, t, c) = sum_k weight_k(x, t, c) v_k(x, t, c)

Guidance combines the velocity under up to three conditions, its branches: text and conditioning frames, the frames
alone, neither. Each (sample, branch) is a row of the batch, merged over the experts; then the branches are combined.
All branches of a sample have the same routing weights unless the router is evaluated for each, so linear guidance may
be read as standing inside the sum.

The parameters of experts of one architecture are stacked along a leading axis. Every selected (row, expert) pair is
computed once: pairs are sorted by expert and cut into blocks of a few rows, and a loop runs over the blocks that
exist. A step costs only the selected experts, whatever their number, for rows that agree and rows that do not.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from paris_jax.diffusion import guidance, path, predictions, randomness, solvers, timesteps
from paris_jax.ensemble.conditioning import Condition, EncodedText
from paris_jax.ensemble.routing import Routing, router_logits
from paris_jax.models import functional, stacks
from paris_jax.models.dit import video_tokens

# Video tokens that saturate a device: below, another row in the same pass is free. One row saturates a CPU.
SATURATING_TOKENS = {"cpu": 1, "gpu": 4096, "tpu": 4096}
# Video tokens beyond which larger passes are not faster per row.
EFFICIENT_TOKENS = {"cpu": 256, "gpu": 4096, "tpu": 4096}
# Run(expert, rows) -> velocities (m, ...): () int32, and the inputs of m rows.
Run = Callable[[jax.Array, Any], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnsembleParams:
    """Parameters of an ensemble.

    Attributes:
      experts: for each architecture, the stacked parameters of its experts, each (members, ...).
      router: parameters of the router, or None for a single expert.
      clusters: (E,) int32, the router's class of each expert.
    """

    experts: tuple[functional.Params, ...]
    router: functional.Params | None
    clusters: jax.Array


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """The static part of the sampler: a new value compiles a new program, new values of anything else do not.

    Attributes:
      networks: the architectures of the experts.
      slots: for each expert, the index of its architecture and its index in that architecture's stack.
      router: config of the router, None for a single expert.
      guidance: "" (none) or a `config.sampling.GuidanceMethod`.
      image_guidance: whether conditioning frames guide, too.
      router_conditioning: the text that the router sees for the branches: "prompt", each "branch" its own, or "null".
      expert_batch_size: rows per pass of an expert; 0 chooses by the size of a row and the device.
    """

    networks: tuple[Any, ...]
    slots: tuple[tuple[int, int], ...]
    router: Any
    routing: Routing
    solver: str = "euler"
    guidance: str = ""
    image_guidance: bool = False
    router_conditioning: str = "prompt"
    expert_batch_size: int = 0

    @property
    def branches(self) -> int:
        """Guidance branches, and so rows, per sample."""
        return 3 if self.image_guidance else 2 if self.guidance else 1

    def rows_per_pass(self, shape: tuple[int, ...], streamed: bool = False) -> int:
        """Rows per pass of an expert, for rows (R, T, H, W, C) of a shape; `streamed`: fetched from host memory."""
        R = shape[0]
        branches, experts = self.branches, len(self.slots)
        if self.expert_batch_size:
            return min(self.expert_batch_size, R)
        if self.routing.rule == "full":
            return -(-R // branches)  # every expert sees every sample
        # The number of experts under a threshold is unknown in advance; mostly it is one.
        used = 1 if self.routing.rule == "threshold" else self.routing.most(experts)
        tokens, platform = video_tokens(shape[1:]), jax.default_backend()
        return block_size(tokens, R, R * used / experts, branches, platform, streamed)


def expert_velocity(
    config: SamplerConfig, kind: int, stack: Any, member_S: jax.Array, expert: jax.Array, rows: Any
) -> jax.Array:
    """The velocity for all rows of the expert at index member_S[expert] of an architecture's stack."""
    x, t_B, text, cond = rows
    network, condition = config.networks[kind], (text.tokens, text.length, text.pooled)
    condition = (*condition, cond) if network.cond_frames else condition

    def predict(x: jax.Array, t_B: jax.Array) -> jax.Array:
        return functional.apply_member(network, stack, member_S[expert], x, t_B, *condition)

    return predictions.velocity(network.prediction_type, predict, x, t_B)


def merge_experts(
    config: SamplerConfig,
    params: EnsembleParams,
    weight_RE: jax.Array,
    x,
    t_R,
    text: EncodedText,
    cond: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the selected experts' velocities (R, T, H, W, C), and each expert's non-finite rows (E,).

    On a mesh with an axis `expert`, each group of devices computes the experts that it holds; one psum adds the groups.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spread, experts = "expert" in mesh.shape, weight_RE.shape[1]
    held_GS, slots = experts_by_group(config.slots, mesh.shape["expert"] if spread else 1)
    weight_GRS = jnp.moveaxis(jnp.where(held_GS >= 0, weight_RE[:, held_GS], 0.0), 1, 0)
    most = config.routing.most(experts)

    def of_group(kinds: Any, weight_1RS: jax.Array, rows: Any, held_1S: Any, **how: Any) -> tuple[Any, Any]:
        """The sum over the experts of one group, one architecture at a time: all groups run the same network."""
        total, nonfinite_E = jnp.zeros(rows[0].shape), jnp.zeros(experts, jnp.int32)
        for kind, stack in enumerate(kinds):
            held = np.array([s for s, slot in enumerate(slots) if slot[0] == kind])
            member_S = jnp.asarray([slots[s][1] for s in held], jnp.int32)
            run = functools.partial(expert_velocity, config, kind, stack, member_S)
            batch = config.rows_per_pass(rows[0].shape, stacks.on_host(stack))
            v, nonfinite_S = weighted_sum(run, weight_1RS[0][:, held], rows, min(most, len(held)), batch, **how)
            total, nonfinite_E = total + v, nonfinite_E.at[held_1S[0][held]].add(nonfinite_S)  # empty slots add 0
        return total, nonfinite_E

    if not spread or mesh.shape["expert"] * mesh.shape["data"] == 1:
        return of_group(params.experts, weight_GRS, (x, t_R, text, cond), held_GS)

    # Where devices of a group communicate, all groups run as many iterations as the busiest one: some of XLA's
    # collectives wait for every device of the mesh.
    communicating = mesh.size > mesh.shape["expert"] * mesh.shape["data"]

    def of_its_group(*given: Any) -> tuple[jax.Array, jax.Array]:
        how = {"iterations": lambda blocks: jax.lax.pmax(blocks, ("expert", "data"))} if communicating else {}
        v, nonfinite_E = of_group(*given, **how)
        return jax.lax.psum(v, "expert"), jax.lax.psum(nonfinite_E, ("expert", "data"))

    more = -x.shape[0] % mesh.shape["data"]  # empty rows, which cost nothing
    rows = jax.tree.map(lambda a: jnp.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))), (x, t_R, text, cond))
    weight_GRS = jnp.pad(weight_GRS, ((0, 0), (0, more), (0, 0)))
    shared = jax.shard_map(
        of_its_group,
        axis_names={"expert", "data"} if communicating else set(mesh.axis_names),
        in_specs=(P("expert"), P("expert", "data"), P("data"), P("expert")),
        out_specs=(P("data"), P()),
        check_vma=False,
    )
    v, nonfinite_E = shared(params.experts, weight_GRS, rows, jnp.asarray(held_GS))
    return v[: x.shape[0]], nonfinite_E


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """Record of a step: routing weights of each sample's prompt (B, E), and non-finite rows of each expert (E,)."""

    weight: jax.Array
    nonfinite: jax.Array


def _guided_velocity(
    config: SamplerConfig,
    params: EnsembleParams,
    x,
    t_B,
    condition: Condition,
    fixed_expert,
    guidance_state,
    step: Any = 0,
    steps: Any = 1,
):
    """The guided velocity (B, T, H, W, C), the new guidance state, and the `Trace`."""
    text, cond = condition.branches(config.branches)
    x_R, t_R = (jnp.repeat(a, config.branches, axis=0) for a in (x, t_B))
    weight_RE = _routing_weights(config, params, x_R, t_R, text, cond, condition, fixed_expert)
    by_text_B, by_image_B = condition.strength.at(t_B, step)
    # Branches of samples without guidance at this timestep have weight 0 and are not computed.
    needed = jnp.ones_like(by_text_B), by_text_B | (config.image_guidance & by_image_B), by_image_B
    needed_R = jnp.stack(needed[: config.branches], 1).reshape(-1, 1)
    v, nonfinite_E = merge_experts(config, params, weight_RE * needed_R, x_R, t_R, text, cond)
    conditional, *others = (v[branch :: config.branches] for branch in range(config.branches))
    trace = Trace(weight_RE[:: config.branches], nonfinite_E)
    if not others:
        return conditional, guidance_state, trace
    if config.guidance == "projected":
        guided, running = guidance.projected(conditional, others[0], x, t_B, condition.strength, guidance_state)
        guidance_state = jnp.where(path.per_sample(by_text_B, x), running, guidance_state)
    else:
        guided = guidance.classifier_free(conditional, others[0], condition.strength.scale)
    guided = jnp.where(path.per_sample(by_text_B, x), guided, conditional)
    if config.image_guidance:
        scales_T = condition.strength.image_scales(step, steps, x.shape[1])
        guided += jnp.where(path.per_sample(by_image_B, x), guidance.by_image(others[0], others[1], scales_T), 0.0)
    if config.guidance == "classifier_free":
        guided = guidance.rescaled(guided, conditional, condition.strength.rescale)
    return guided, guidance_state, trace


def _routing_weights(
    config: SamplerConfig, params: EnsembleParams, x_R, t_R, text: EncodedText, cond, condition: Condition, fixed_expert
) -> jax.Array:
    """Routing weights of every row (R, E): the router is evaluated for each branch, or once per sample."""
    if config.router_conditioning == "branch":
        return condition.weights(
            config.routing,
            router_logits(config.router, params.router, params.clusters, x_R, t_R, text.pooled, cond),
            fixed_expert,
        )
    null_pooled = jnp.zeros_like(condition.text.pooled) if condition.null_pooled is None else condition.null_pooled
    pooled = condition.text.pooled if config.router_conditioning == "prompt" else null_pooled
    x, t_B = x_R[:: config.branches], t_R[:: config.branches]
    weight_BE = condition.weights(
        config.routing,
        router_logits(config.router, params.router, params.clusters, x, t_B, pooled, condition.cond),
        fixed_expert,
    )
    return jnp.repeat(weight_BE, config.branches, axis=0)


def _guidance_state(config: SamplerConfig, x: jax.Array) -> Any:
    """The guidance state before the first step."""
    return jnp.zeros_like(x) if config.guidance == "projected" else ()


@functools.partial(jax.jit, static_argnames=("config",))
def ensemble_velocity(
    config: SamplerConfig, params: EnsembleParams, x, t_B, condition: Condition, fixed_expert: jax.Array
) -> tuple[jax.Array, Trace]:
    """The ensemble's velocity (B, T, H, W, C), each sample at its own timestep, and the `Trace`."""
    v, _, trace = _guided_velocity(config, params, x, t_B, condition, fixed_expert, _guidance_state(config, x))
    return v, _replicated(trace)


def initial_state(config: SamplerConfig, noise: jax.Array, steps: int) -> solvers.State:
    """The solver state before the first step, from noise (B, T, H, W, C), with room for the traces of `steps` steps."""
    lead, B, E = (steps, solvers.EVALUATIONS[config.solver]), noise.shape[0], len(config.slots)
    traces = Trace(jnp.zeros((*lead, B, E), jnp.float32), jnp.zeros((*lead, E), jnp.int32))
    return solvers.begin(noise, _guidance_state(config, noise), traces)


@functools.partial(jax.jit, static_argnames=("config",))
def take_steps(
    config: SamplerConfig,
    params: EnsembleParams,
    state: solvers.State,
    first: jax.Array | int,
    last: jax.Array | int,
    keys_B2: jax.Array,
    schedule: jax.Array,
    condition: Condition,
    fixed_expert_S: jax.Array,
) -> solvers.State:
    """Integrates from step `first` up to step `last`; one compiled program serves any two of them.

    Args:
      state: from `initial_state`, or from earlier steps.
      keys_B2: (B, 2) uint32, key data of each sample, for the noise of a stochastic solver.
      schedule: (S + 1,) timesteps from 1 to 0, which may be padded with zeros (`timesteps.padded`).
      condition: conditioning of the samples, and the strength of guidance.
      fixed_expert_S: (S,) int32, the expert of each step for the rule "fixed".

    Returns:
      The solver state, whose `x` is the latent (B, T, H, W, C) in units of the training data's standard deviation.
    """

    def field(x: jax.Array, t: jax.Array, step: jax.Array, guidance_state: Any) -> tuple[jax.Array, Any, Trace]:
        t_B, steps = jnp.full(x.shape[:1], t), timesteps.num_steps(schedule)
        return _guided_velocity(config, params, x, t_B, condition, fixed_expert_S[step], guidance_state, step, steps)

    def fresh(step: jax.Array) -> jax.Array:
        keys_B = jax.random.wrap_key_data(keys_B2)
        return randomness.normal(jax.vmap(jax.random.fold_in, (0, None))(keys_B, step), state.x.shape[1:])

    # Every process reads the whole state.
    return _replicated(solvers.integrate(field, state, schedule, first, last, config.solver, fresh))


def trace_of(state: solvers.State) -> Trace:
    """Routing weights of each step's first evaluation (S, B, E), and non-finite rows over all evaluations (S, E)."""
    return Trace(state.traces.weight[:, 0], state.traces.nonfinite.sum(1))


def _replicated(tree: Any) -> Any:
    """The same arrays, replicated on a mesh."""
    return tree if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(tree, P())


def block_size(tokens: int, rows: int, pairs_each: float, together: int, platform: str, streamed: bool = False) -> int:
    """Rows per pass of an expert.

    The largest of: the rows that saturate the device; the branches of one sample, which go to the same expert anyway;
    and the rows up to which larger passes are faster, but at most half of an expert's average, so that few blocks are
    half empty. At most all rows.

    Args:
      tokens: video tokens of a row.
      rows: of the batch.
      pairs_each: rows per expert, on average.
      together: rows of one sample, its branches.
      streamed: whether each block fetches its expert from host memory, which favours larger passes.
    """
    busy, enough = (-(-of.get(platform, 1) // tokens) for of in (SATURATING_TOKENS, EFFICIENT_TOKENS))
    faster = int(pairs_each / 2) if streamed else min(enough, int(pairs_each / 2))
    return max(1, min(rows, max(busy, together, faster)))


def weighted_sum(
    run: Run,
    weight_RE: jax.Array,
    rows: Any,
    most: int,
    batch: int,
    iterations: Callable[[jax.Array], jax.Array] = lambda blocks: blocks,
) -> tuple[jax.Array, jax.Array]:
    """sum_e weight_e v_e of each row.

    Args:
      run: one expert's velocity for `batch` rows.
      weight_RE: weight of each expert, 0 where it is not used; a row of zeros costs nothing and gives zeros.
      rows: inputs of the experts, arrays (R, ...); the first is the latent.
      most: experts per row, at most.
      batch: rows per pass of an expert.
      iterations: iterations of the loop for a number of blocks; those beyond it add 0.

    Returns:
      (R, T, H, W, C) float32, and (E,) int32, the finite rows for which each expert predicted non-finite values.
    """
    experts = weight_RE.shape[1]
    weight_RS, expert_RS = jax.lax.top_k(weight_RE, most)
    weight_P = weight_RS.reshape(-1)
    expert_P = jnp.where(weight_P > 0, expert_RS.reshape(-1), experts)  # unused pairs sort last
    order_P = jnp.argsort(expert_P)
    count_E = jnp.sum(expert_P[:, None] == jnp.arange(experts), axis=0)
    first_E = jnp.cumsum(count_E) - count_E
    blocks_E = -(-count_E // batch)
    end_E = jnp.cumsum(blocks_E)

    def add(number: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, nonfinite_E = so_far
        expert = jnp.minimum(jnp.searchsorted(end_E, number, side="right"), experts - 1)
        within = (number - end_E[expert] + blocks_E[expert]) * batch + jnp.arange(batch)
        pair = order_P[jnp.minimum(first_E[expert] + within, order_P.shape[0] - 1)]
        row = pair // most
        inputs = jax.tree.map(lambda a: a[row], rows)
        v = run(expert, inputs)
        # The last block of an expert may contain rows of other experts; their output is masked.
        own = within < count_E[expert]
        weighted = jnp.where(path.per_sample(own, v), path.per_sample(weight_P[pair], v) * v, 0.0)
        nonfinite = own & _finite(jax.tree.leaves(inputs)[0]) & ~_finite(v)
        return total.at[row].add(weighted), nonfinite_E.at[expert].add(nonfinite.sum())

    x = jax.tree.leaves(rows)[0]
    begin = jnp.zeros(x.shape, jnp.float32), jnp.zeros(experts, jnp.int32)
    return jax.lax.fori_loop(0, iterations(end_E[-1]), add, begin)


def _finite(x: jax.Array) -> jax.Array:
    """Whether all values of each row are finite, (R,)."""
    return jnp.isfinite(x).all(axis=tuple(range(1, x.ndim)))


def experts_by_group(slots: tuple[tuple[int, int], ...], groups: int) -> tuple[np.ndarray, tuple[tuple[int, int], ...]]:
    """The experts of each device group.

    Args:
      slots: for each expert, the index of its architecture and its index in that architecture's stack.
      groups: number of device groups.

    Returns:
      The experts of each group, (groups, slots per group) int32, -1 for an empty slot; and, for each slot of a group,
      its architecture and its index in the group's shard of that architecture's stack.
    """
    expert_of = {slot: expert for expert, slot in enumerate(slots)}
    kinds = sorted({kind for kind, _ in slots})
    each = [-(-sum(k == kind for k, _ in slots) // groups) for kind in kinds]  # members of a kind a group holds
    local = tuple((kind, member) for kind in kinds for member in range(each[kind]))
    held = [[expert_of.get((kind, g * each[kind] + member), -1) for kind, member in local] for g in range(groups)]
    return np.asarray(held, np.int32), local
