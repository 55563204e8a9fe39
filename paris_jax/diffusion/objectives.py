"""What the networks minimise, per sample: nothing here looks at a sample's neighbours in the batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from paris_jax.diffusion import path


def flow_matching(
    velocity_field: Callable[[jax.Array, jax.Array], jax.Array], x_0: jax.Array, noise: jax.Array, t_B: jax.Array
) -> jax.Array:
    """|| v(x_t, t) - (e - x_0) ||^2, averaged over each sample's elements: (B,) float32.

    Decentralized Diffusion Models (arXiv 2501.05450), equation of the expert loss: x_0 comes from one cluster only.
    """
    predicted = velocity_field(path.interpolate(x_0, noise, t_B), t_B)
    error = predicted.astype(jnp.float32) - path.velocity(x_0, noise)
    return jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))


def cross_entropy(logits_BK: jax.Array, cluster_B: jax.Array) -> jax.Array:
    """-log p(cluster | x_t, t, c), the router's loss: (B,) float32, nats."""
    log_probabilities = jax.nn.log_softmax(logits_BK.astype(jnp.float32))
    return -jnp.take_along_axis(log_probabilities, cluster_B[:, None], axis=1)[:, 0]


def by_time_bin(values_B: jax.Array, t_B: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Sums and counts of a per-sample value in equal bins of time: two arrays (bins,)."""
    member = jax.nn.one_hot(jnp.clip((t_B * bins).astype(jnp.int32), 0, bins - 1), bins)
    return values_B @ member, member.sum(0)
