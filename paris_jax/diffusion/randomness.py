"""Random draws per sample, independent of the batch.

Every draw is a function of (seed, step, global sample index) alone, so it does not change with the number of devices or
hosts, nor with the other samples of the batch.
"""

import jax
import jax.numpy as jnp


def key_of(seed: int | jax.Array) -> jax.Array:
    """The key of a seed of up to 64 bits (`jax.random.key` takes 32)."""
    if isinstance(seed, int) and seed >= 2**32:
        return jax.random.wrap_key_data(jnp.array([seed >> 32, seed % 2**32], jnp.uint32))
    return jax.random.key(seed)


def sample_keys(seed: int | jax.Array, step: int | jax.Array, index_B: jax.Array) -> jax.Array:
    """One key per sample, (B,), from the seed, the step and each sample's global index."""
    key = jax.random.fold_in(key_of(seed), step)
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)


def normal(keys_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise of `shape` for each key, (B, *shape) float32."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)
