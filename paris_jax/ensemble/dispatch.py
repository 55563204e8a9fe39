"""Sparse use of the experts: the sum over the chosen ones, at the cost of the chosen ones.

Every chosen (row, expert) pair is worked on once. Pairs of one expert stand together and are cut into blocks of a few
rows; a loop goes over the blocks that there are, and only those. So a step costs what was chosen, whatever the number
of experts, for rows that agree and rows that do not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paris_jax.diffusion import path

# Run(expert, rows) -> velocities (m, ...): () int32, and the inputs of m rows.
Run = Callable[[jax.Array, Any], jax.Array]

# Video tokens that keep a device busy: up to so many, more rows together cost nothing. A CPU is busy with one row.
BUSY = {"cpu": 1, "gpu": 4096, "tpu": 4096}
# Video tokens beyond which rows together are not worked on faster each, either.
ENOUGH = {"cpu": 256, "gpu": 4096, "tpu": 4096}


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
    busy, enough = (-(-of.get(platform, 1) // tokens) for of in (BUSY, ENOUGH))
    faster = int(pairs_each / 2) if streamed else min(enough, int(pairs_each / 2))
    return max(1, min(rows, max(busy, together, faster)))


def merge(
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
