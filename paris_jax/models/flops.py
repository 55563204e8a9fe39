"""FLOPs of the networks, and peak compute and memory of accelerators: the basis of MFU and of equal compute.

Matrix products only (2 m n k each), backward counted as twice the forward, recomputation not counted.
"""

import dataclasses
from typing import Any

from paris_jax.models.blocks import TIME_FEATURES
from paris_jax.models.dit import PATCH, DiTConfig, video_tokens
from paris_jax.models.router import RouterConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device, which is a whole chip for every kind listed here."""

    name: str  # as in topology names: "v5p"
    kind: str  # prefix of `device_kind`
    peak: float  # dense bfloat16, FLOP/s
    memory: float  # bytes
    bandwidth: float  # memory bandwidth, bytes/s
    peak32: float  # of float32 products as JAX computes them: in bfloat16 passes on TPUs, in TF32 on GPUs


CHIPS = (
    Chip("v4", "TPU v4", 275e12, 32 * GIB, 1.228e12, 275e12),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 0.819e12, 197e12),
    Chip("v5p", "TPU v5p", 459e12, 95 * GIB, 2.765e12, 459e12),
    Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2.765e12, 459e12),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1.64e12, 918e12),
    Chip("h200", "NVIDIA H200", 989e12, 141e9, 4.8e12, 494e12),
    Chip("h100", "NVIDIA H100", 989e12, 80e9, 3.35e12, 494e12),
    Chip("a100", "NVIDIA A100", 312e12, 80e9, 2.0e12, 156e12),
    Chip("l4", "NVIDIA L4", 121e12, 24e9, 0.3e12, 60e12),
)


def chip_of(device: Any) -> Chip | None:
    """The chip of a device, or None for a device that is not listed (CPUs)."""
    matches = [chip for chip in CHIPS if device.device_kind.startswith(chip.kind)]
    return max(matches, key=lambda chip: len(chip.kind), default=None)


def chip_named(name: str) -> Chip | None:
    return next((chip for chip in CHIPS if chip.name == name), None)


def forward_flops(config: DiTConfig | RouterConfig, latent_shape: tuple[int, ...], text_length: int) -> int:
    """FLOPs of one forward pass on one sample.

    Args:
      latent_shape: (T, H, W, C).
      text_length: text tokens per sample, padding included (the router reads none).
    """
    N, D, M = video_tokens(latent_shape), config.hidden, config.mlp_ratio
    patch = latent_shape[-1] * PATCH * PATCH
    inputs = patch + (latent_shape[-1] + 1) * PATCH * PATCH * config.cond_frames
    conditioning = 2 * D * (TIME_FEATURES + D + config.pooled_width + D)
    final = 2 * D * 2 * D  # modulation
    L = 1 if isinstance(config, RouterConfig) else text_length
    layers = 2 * (N + L) * D * D * (4 + 2 * M) + attention_flops(config, latent_shape, text_length)
    if isinstance(config, RouterConfig):
        block = layers + 2 * D * 6 * D
        return 2 * N * inputs * D + conditioning + config.blocks * block + final + 2 * D * config.clusters
    double = layers + 2 * 2 * D * 6 * D
    single = layers + 2 * D * 3 * D
    embed = 2 * N * inputs * D + 2 * L * config.text_width * D
    return (
        embed + conditioning + config.double_blocks * double + config.single_blocks * single + final + 2 * N * D * patch
    )


def attention_flops(config: DiTConfig | RouterConfig, latent_shape: tuple[int, ...], text_length: int) -> int:
    """FLOPs of the two products of attention, queries with keys and weights with values, of one block and sample."""
    N, T = video_tokens(latent_shape), latent_shape[0]
    L = 1 if isinstance(config, RouterConfig) else text_length
    pairs = (N + L) ** 2  # of queries and keys
    if config.attention == "factorised":
        pairs = N * (N // T + L) + (N * T if T > 1 else 0) + L * (N + L)
    return 4 * pairs * config.hidden


def training_flops(config: DiTConfig | RouterConfig, latent_shape: tuple[int, ...], text_length: int) -> int:
    """FLOPs of one training step on one sample: forward, and backward at twice its cost."""
    return 3 * forward_flops(config, latent_shape, text_length)
