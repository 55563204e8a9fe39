"""Training losses per sample: each is independent of the other samples of the batch."""

import jax
import jax.numpy as jnp
import optax

from paris_jax.diffusion import path, predictions

LARGEST_WEIGHT = 16.0  # [O] of the loss of predicted data, from t = 1/4 downwards


def flow_matching(velocity_field: predictions.Predictor, x_0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """|| v(x_t, t) - (e - x_0) ||^2, averaged over each sample's elements: (B,) float32.

    Decentralized Diffusion Models (arXiv 2501.05450), equation of the expert loss: x_0 comes from one cluster only.
    """
    predicted = velocity_field(path.interpolate(x_0, noise, t_B), t_B)
    return _mean_square(predicted, path.velocity(x_0, noise))


def noise_prediction(network: predictions.Predictor, x_0: jax.Array, noise: jax.Array, s_B: jax.Array) -> jax.Array:
    """|| e^(x_s, s) - e ||^2 on the cosine path, averaged over each sample's elements: (B,) float32.

    Ho et al. 2020 (arXiv 2006.11239), equation 14: DDPM's simple loss.
    """
    return _mean_square(network(predictions.cosine(x_0, noise, s_B), s_B), noise)


def data_prediction(network: predictions.Predictor, x_0: jax.Array, noise: jax.Array, t_B: jax.Array) -> jax.Array:
    """min(1 / t^2, 16) || x_0^(x_t, t) - x_0 ||^2, averaged over each sample's elements: (B,) float32.

    1 / t^2 makes it the loss of the velocity; unbounded, a few samples at small t would rule a clipped gradient.
    """
    weight_B = jnp.minimum(1 / jnp.square(t_B), LARGEST_WEIGHT)
    return weight_B * _mean_square(network(path.interpolate(x_0, noise, t_B), t_B), x_0)


def _mean_square(predicted: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(predicted.astype(jnp.float32) - target), axis=tuple(range(1, target.ndim)))


def cross_entropy(logits_BK: jax.Array, cluster_B: jax.Array) -> jax.Array:
    """-log p(cluster | x_t, t, c), the router's loss: (B,) float32, nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BK.astype(jnp.float32), cluster_B)


def by_time_bin(values_B: jax.Array, t_B: jax.Array, bins: int) -> tuple[jax.Array, jax.Array]:
    """Sums and counts of a per-sample value in equal bins of the timestep: two arrays (bins,) float32."""
    bin_one_hot = jax.nn.one_hot(jnp.clip((t_B * bins).astype(jnp.int32), 0, bins - 1), bins)
    return values_B @ bin_one_hot, bin_one_hot.sum(0)
