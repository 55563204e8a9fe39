"""One formula for the work of a network: what both arms' compute, and the share of peak, are counted with.

Matrix products only (2 m n k each), backward counted as twice the forward, recomputation not counted.
"""

from paris_jax.models.blocks import TIME_FEATURES
from paris_jax.models.dit import PATCH, DiTConfig, video_tokens
from paris_jax.models.router import RouterConfig


def forward(config: DiTConfig | RouterConfig, latent_shape: tuple[int, ...], text_length: int) -> int:
    """FLOPs of one forward pass on one sample.

    Args:
      latent_shape: (T, H, W, C).
      text_length: text tokens a sample, padding included (the router reads none).
    """
    N, D, M = video_tokens(latent_shape), config.hidden, config.mlp_ratio
    patch = latent_shape[-1] * PATCH * PATCH
    read = patch + (latent_shape[-1] + 1) * PATCH * PATCH * config.kept_frames
    conditioning = 2 * D * (TIME_FEATURES + D + config.pooled_width + D)
    final = 2 * D * 2 * D  # modulation
    L = 1 if isinstance(config, RouterConfig) else text_length
    S, T = N + L, latent_shape[0]
    pairs = S * S  # of queries and keys
    if config.attention == "factorised":
        pairs = N * (N // T + L) + (N * T if T > 1 else 0) + L * S
    layers = 2 * S * D * D * (4 + 2 * M) + 4 * pairs * D
    if isinstance(config, RouterConfig):
        block = layers + 2 * D * 6 * D
        return 2 * N * read * D + conditioning + config.blocks * block + final + 2 * D * config.clusters
    double = layers + 2 * 2 * D * 6 * D
    single = layers + 2 * D * 3 * D
    embed = 2 * N * read * D + 2 * L * config.text_width * D
    return (
        embed + conditioning + config.double_blocks * double + config.single_blocks * single + final + 2 * N * D * patch
    )


def training_step(config: DiTConfig | RouterConfig, latent_shape: tuple[int, ...], text_length: int) -> int:
    """FLOPs of one training step on one sample: forward, and backward at twice its cost."""
    return 3 * forward(config, latent_shape, text_length)
