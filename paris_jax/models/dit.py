"""The spatiotemporal DiT: a FLUX-style MM-DiT over packed video latents (Paris 2.0; Open-Sora 2.0, arXiv 2503.09642).

Video and text tokens have their own weights in the double-stream blocks and share them in the single-stream ones.
Attention is joint in both, or factorised into space and time (`attention.factorised`). Position embeddings are rotary
over (t, h, w); text tokens have position zero. The timestep and the pooled text modulate every block.

Shape letters: B batch, T latent frames, H W latent rows and columns, C channels, N video tokens, L text tokens,
D width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from paris_jax.models import positions
from paris_jax.models.attention import pattern
from paris_jax.models.blocks import (
    Conditioning,
    HeadNorm,
    Modulation,
    Stream,
    gated,
    join_heads,
    linear,
    modulate,
    scan_blocks,
    split_heads,
    stacked,
    to_heads,
)
from paris_jax.models.sharding_rules import constrain

PATCH = 2  # rows and columns of the latent that make one token, as published


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of a spatiotemporal DiT; presets are in `config/network.py`."""

    channels: int  # of the latent, C
    text_width: int
    pooled_width: int
    hidden: int
    heads: int
    double_blocks: int
    single_blocks: int
    rope_axes: tuple[int, int, int]  # features of a head rotated by t, h, w; their sum is the head width
    mlp_ratio: int = 4
    theta: float = 1e4
    remat: str = "none"  # rematerialisation in the backward pass: a key of `blocks.REMAT`
    dtype: str = "float32"  # of the computation; parameters are float32
    cond_frames: bool = False  # whether the network has an input for conditioning frames (image-to-video)
    prediction_type: str = "velocity"  # or "noise", "x0": a key of `diffusion.predictions.PREDICTIONS`
    attention: str = "joint"  # or "factorised": the attention pattern (`attention.pattern`)


def video_tokens(latent_shape: tuple[int, ...]) -> int:
    """The number of video tokens N of a latent (T, H, W, C)."""
    T, H, W, _ = latent_shape
    return T * (H // PATCH) * (W // PATCH)


def pack(x_BTHWC: jax.Array) -> jax.Array:
    """2 x 2 patches of each latent frame to tokens, (B, T * H/2 * W/2, 4 C), channels in (c, row, column) order."""
    B, T, H, W, C = x_BTHWC.shape
    x = x_BTHWC.reshape(B, T, H // PATCH, PATCH, W // PATCH, PATCH, C)
    return x.transpose(0, 1, 2, 4, 6, 3, 5).reshape(B, T * (H // PATCH) * (W // PATCH), C * PATCH * PATCH)


def unpack(tokens_BNX: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `pack`, to a latent of `shape` (B, T, H, W, C)."""
    B, T, H, W, C = shape
    x = tokens_BNX.reshape(B, T, H // PATCH, W // PATCH, C, PATCH, PATCH)
    return x.transpose(0, 1, 2, 5, 3, 6, 4).reshape(B, T, H, W, C)


def cond_projection(channels: int, hidden: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """Projects the packed mask and latent of conditioning frames (Open-Sora 2.0); zero-initialised."""
    return linear((channels + 1) * PATCH * PATCH, hidden, dtype, rngs, zero=True)


def embed_video(video_in: nnx.Linear, cond_in: nnx.Linear | None, x_BTHWC: jax.Array, cond: jax.Array | None):
    """Video tokens (B, N, D) of a noised latent and, where the network has the input, of conditioning frames."""
    video = video_in(pack(x_BTHWC).astype(video_in.dtype))
    if cond_in is None:
        return video
    if cond is None:  # text-to-video: no conditioning frames
        cond = jnp.zeros((*x_BTHWC.shape[:-1], x_BTHWC.shape[-1] + 1), x_BTHWC.dtype)
    return video + cond_in(pack(cond).astype(cond_in.dtype))


class DoubleBlock(nnx.Module):
    """Double-stream block: separate weights for video and text, joint attention."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.video = Stream(config, rngs)
        self.text = Stream(config, rngs)

    def __call__(self, video, text, condition, rope, length, attend):  # arrays in, (video, text) out
        shift_v, scale_v, *gates_v = self.video.modulation(condition)
        shift_t, scale_t, *gates_t = self.text.modulation(condition)
        parts = zip(
            self.video.heads_of(video, shift_v, scale_v), self.text.heads_of(text, shift_t, scale_t), strict=True
        )
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in parts)
        attended = attend(positions.rotate(q, *rope), positions.rotate(k, *rope), v, length)
        N = video.shape[1]
        attended_v = constrain(attended[:, :N], "batch", "tokens", "heads", None)
        attended_t = constrain(attended[:, N:], "batch", None, "heads", None)
        video = constrain(self.video.update(video, attended_v, gates_v), "batch", "tokens", None)
        return video, constrain(self.text.update(text, attended_t, gates_t), "batch", None, None)


class SingleBlock(nnx.Module):
    """Single-stream block: video and text as one sequence, attention and MLP in parallel."""

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        dtype, D, M = jnp.dtype(config.dtype), config.hidden, config.mlp_ratio * config.hidden
        self.modulation = Modulation(D, 3, dtype, rngs)
        self.qkv_mlp = linear(D, 3 * D + M, dtype, rngs)
        self.head_norm = HeadNorm(D // config.heads, rngs)
        self.out = linear(D + M, D, dtype, rngs)
        self.heads, self.head_width = config.heads, D // config.heads

    def __call__(self, x, condition, rope, length, attend):  # arrays in, (x,) out
        shift, scale, gate = self.modulation(condition)
        fused = to_heads(self.qkv_mlp, modulate(x, shift, scale))
        q, k, v, hidden = split_heads(fused, self.heads, self.head_width)
        q, k = self.head_norm(q, k)
        attended = attend(positions.rotate(q, *rope), positions.rotate(k, *rope), v, length)
        attended = constrain(attended, "batch", "tokens", "heads", None)
        mixed = self.out(join_heads(jnp.concatenate([attended, nnx.gelu(hidden, approximate=True)], axis=-1)))
        return (constrain(x + gated(gate, mixed), "batch", "tokens", None),)


class SpatiotemporalDiT(nnx.Module):
    """Predicts the velocity v(x_t, t, text) of a noised video latent, or its noise, or the clean latent.

    `config.prediction_type` says which.
    """

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        dtype, D = jnp.dtype(config.dtype), config.hidden
        self.config = config
        self.video_in = linear(config.channels * PATCH * PATCH, D, dtype, rngs)
        self.cond_in = cond_projection(config.channels, D, dtype, rngs) if config.cond_frames else None
        self.text_in = linear(config.text_width, D, dtype, rngs)
        self.conditioning = Conditioning(config.pooled_width, D, dtype, rngs)
        self.double_blocks = stacked(functools.partial(_build, DoubleBlock, config), config.double_blocks, rngs)
        self.single_blocks = stacked(functools.partial(_build, SingleBlock, config), config.single_blocks, rngs)
        self.final_modulation = Modulation(D, 2, dtype, rngs)
        self.velocity_out = linear(D, config.channels * PATCH * PATCH, dtype, rngs, zero=True)

    def __call__(
        self,
        x_BTHWC: jax.Array,
        t_B: jax.Array,
        tokens_BLX: jax.Array,
        length_B: jax.Array,
        pooled_BP: jax.Array,
        cond_BTHWX: jax.Array | None = None,
        member: jax.Array | None = None,
    ) -> jax.Array:
        """The network's prediction at (x_t, t), conditioned on the text and on conditioning frames.

        Args:
          x_BTHWC: noised latent of unit scale; H and W even.
          t_B: timesteps in [0, 1], 1 is noise.
          tokens_BLX: text embedding, padded at the end.
          length_B: int32, number of text tokens without padding (1 to L); padding is never attended to.
          pooled_BP: pooled text embedding.
          cond_BTHWX: conditioning frames, X = 1 + C: mask (1 or 0) and clean latent (`diffusion.cond_masks`); None for
            no conditioning frames.
          member: () int32, the network to run where the blocks hold several (`functional.apply_member`).

        Returns:
          (B, T, H, W, C) float32.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        _, T, H, W, _ = x_BTHWC.shape
        video = constrain(embed_video(self.video_in, self.cond_in, x_BTHWC, cond_BTHWX), "batch", "tokens", None)
        text = self.text_in(tokens_BLX.astype(dtype))
        condition = self.conditioning(t_B, pooled_BP)
        # Video first: padding is then at the end of the joint sequence, as the attention kernels require.
        N, length = video.shape[1], length_B + video.shape[1]
        rope = _rope(T, H // PATCH, W // PATCH, text.shape[1], config.rope_axes, config.theta)
        shared = condition, rope, length, pattern(config.attention, T, N // T)
        video, text = scan_blocks(self.double_blocks, (video, text), config.remat, *shared, member=member)
        joint = constrain(jnp.concatenate([video, text], axis=1), "batch", "tokens", None)
        (joint,) = scan_blocks(self.single_blocks, (joint,), config.remat, *shared, member=member)
        shift, scale = self.final_modulation(condition)
        tokens = self.velocity_out(modulate(joint[:, :N], shift, scale))
        return unpack(tokens, x_BTHWC.shape).astype(jnp.float32)


def _build(block: type, config: Any, rngs: nnx.Rngs) -> nnx.Module:
    return block(config, rngs)


@functools.lru_cache(maxsize=64)
def _rope(frames: int, rows: int, columns: int, text: int, axes: tuple[int, int, int], theta: float) -> Any:
    """Rotary tables of the joint sequence: video tokens by frame, row and column, then text at position zero."""
    ids = np.concatenate([positions.video_positions(frames, rows, columns), np.zeros((text, 3), np.float32)])
    return positions.rotary_table(ids, axes, theta)
