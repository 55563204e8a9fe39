"""Random draws that belong to a sample, not to a batch.

Every draw is a function of (seed, step, global sample index) alone, so it does not change with the number of devices or
hosts, nor with the other samples of the batch.
"""

import jax


def sample_keys(seed: int | jax.Array, step: int | jax.Array, index_B: jax.Array) -> jax.Array:
    """One key per sample, (B,), from the seed, the step and each sample's global index."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)


def normal(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of `shape` for each key, (B, *shape) float32."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)
