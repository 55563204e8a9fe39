"""Learning rate by width of the experts and the monolith; each width has its number of heads."""

from paris_jax.config.overrides import axis, product, zipped

POINTS = product(
    axis("training.learning_rate", [1e-3, 3e-3, 1e-2]),
    zipped(axis("network.hidden", [32, 48]), axis("network.heads", [2, 3])),
)
