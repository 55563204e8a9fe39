"""The router: a DiT encoder with a CLS token that classifies the cluster of a noised latent.

Paris 2.0: a DiT-B-size network on the noisy latent, AdaLN from time and pooled text, trained as a classifier
p(cluster | x_t, t, text). Its softmax is the weight of each expert (Decentralized Diffusion Models, arXiv 2501.05450).

Class k is cluster k of the partition. Training draws clips of all clusters in natural proportion, so the softmax
contains the prior p(cluster) and is not corrected for it. Its calibration is measured by the evaluation; the parameter
`router_temperature` of sampling changes it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paris_jax.models import positions
from paris_jax.models.attention import pattern
from paris_jax.models.blocks import Conditioning, Modulation, Stream, linear, modulate, scan_blocks, stacked
from paris_jax.models.dit import PATCH, cond_projection, embed_video
from paris_jax.models.sharding_rules import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Sizes of a router; presets are in `config/network.py`."""

    channels: int
    pooled_width: int
    clusters: int
    hidden: int
    heads: int
    blocks: int
    rope_axes: tuple[int, int, int]
    mlp_ratio: int = 4
    theta: float = 1e4
    remat: str = "none"
    dtype: str = "float32"
    cond_frames: bool = False  # whether the network has an input for conditioning frames
    attention: str = "joint"  # or "factorised": the attention pattern (`attention.pattern`)


class RouterBlock(Stream):
    """Self-attention, then MLP, both modulated (AdaLN-Zero)."""

    def __call__(self, x, condition, rope, attend):  # arrays in, (x,) out
        shift, scale, *gates = self.modulation(condition)
        q, k, v = self.heads_of(x, shift, scale)
        attended = attend(positions.rotate(q, *rope), positions.rotate(k, *rope), v)
        return (constrain(self.update(x, attended, gates), "batch", None, None),)


class Router(nnx.Module):
    """log p(cluster | x_t, t, text, conditioning frames) up to a constant."""

    def __init__(self, config: RouterConfig, rngs: nnx.Rngs):
        dtype, D = jnp.dtype(config.dtype), config.hidden
        self.config = config
        self.video_in = linear(config.channels * PATCH * PATCH, D, dtype, rngs)
        self.cond_in = cond_projection(config.channels, D, dtype, rngs) if config.cond_frames else None
        self.cls = nnx.Param(0.02 * jax.random.normal(rngs.params(), (D,)))
        self.conditioning = Conditioning(config.pooled_width, D, dtype, rngs)
        self.blocks = stacked(functools.partial(_build, config), config.blocks, rngs)
        self.final_modulation = Modulation(D, 2, dtype, rngs)
        self.logits_out = linear(D, config.clusters, jnp.float32, rngs, zero=True)

    def __call__(
        self, x_BTHWC: jax.Array, t_B: jax.Array, pooled_BP: jax.Array, cond_BTHWX: jax.Array | None = None
    ) -> jax.Array:
        """Logits over the clusters, (B, K) float32, of noised latents at timesteps t in [0, 1].

        `cond_BTHWX` holds the conditioning frames, as in `SpatiotemporalDiT`.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        B, T, H, W, _ = x_BTHWC.shape
        video = embed_video(self.video_in, self.cond_in, x_BTHWC, cond_BTHWX)
        cls = jnp.broadcast_to(self.cls[...].astype(dtype), (B, 1, config.hidden))
        condition = self.conditioning(t_B, pooled_BP)
        rope = _rope(T, H // PATCH, W // PATCH, config.rope_axes, config.theta)
        shared = condition, rope, pattern(config.attention, T, video.shape[1] // T)
        (x,) = scan_blocks(self.blocks, (jnp.concatenate([video, cls], axis=1),), config.remat, *shared)
        shift, scale = self.final_modulation(condition)
        return self.logits_out(modulate(x[:, -1:], shift, scale)[:, 0].astype(jnp.float32))


def _build(config: RouterConfig, rngs: nnx.Rngs) -> RouterBlock:
    return RouterBlock(config, rngs)


@functools.lru_cache(maxsize=64)
def _rope(frames: int, rows: int, columns: int, axes: tuple[int, int, int], theta: float):
    """Rotary tables: the video tokens by frame, row and column, then the CLS token at position zero."""
    ids = np.concatenate([positions.video_positions(frames, rows, columns), np.zeros((1, 3), np.float32)])
    return positions.rotary_table(ids, axes, theta)
