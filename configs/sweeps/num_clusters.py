"""The number of clusters, and so of experts, at equal total compute: prepared once, clustered for each K."""

from paris_jax.config.overrides import axis

POINTS = axis("clustering.num_clusters", [2, 3, 4, 8])
