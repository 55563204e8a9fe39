"""Conditioning masks: which latent frames condition a network, for image-to-video and video continuation.

The network reads them from an extra input, (B, T, H, W, 1 + C): the mask, 1 for a conditioning frame, and the clean
latent (Open-Sora 2.0, arXiv 2503.09642). The noised latent and the loss are the same as for text-to-video.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Conditioning frames: none, the first latent frame, the last, both, or a prefix of any length.
MASK_KINDS = ("none", "first", "last", "both", "prefix")


def of_kind(kind: str, frames: int, prefix: int | jax.Array = 1) -> jax.Array:
    """The mask of one of `MASK_KINDS`, (T,) bool; `prefix` is the number of frames of a "prefix" mask."""
    T = jnp.arange(frames)
    first, last = prefix > T if kind == "prefix" else T < 1, frames - 1 <= T
    return {"none": T < 0, "last": last, "both": first | last}.get(kind, first)


def draw(keys_B: jax.Array, weights: tuple[float, ...], frames: int) -> tuple[jax.Array, jax.Array]:
    """Draws a mask for each key, (B, T) bool, and says whether it is a prefix, (B,) bool.

    The probability of a kind is proportional to its entry in `weights`, in the order of `MASK_KINDS`. The length of a
    prefix is uniform and leaves at least one frame to sample. A single latent frame is never a conditioning frame.
    """
    cumulative = jnp.cumsum(jnp.asarray(weights) / sum(weights))[:-1]

    def draw_one(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        kind_key, length_key = jax.random.split(key)
        kind = jnp.searchsorted(cumulative, jax.random.uniform(kind_key), side="right")
        prefix = jax.random.randint(length_key, (), 1, max(frames, 2))
        masks = jnp.stack([of_kind(k, frames, prefix) for k in MASK_KINDS])
        return masks[kind] & (frames > 1), kind == MASK_KINDS.index("prefix")

    return jax.vmap(draw_one)(keys_B)


def cond_input(x_0: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The conditioning input for frames of x_0 (B, T, H, W, C): mask and masked latent, (B, T, H, W, 1 + C) float32."""
    mask = jnp.broadcast_to(mask_BT[..., None, None, None], (*x_0.shape[:-1], 1)).astype(jnp.float32)
    return jnp.concatenate([mask, jnp.where(mask > 0, x_0, 0.0)], axis=-1)


def with_images(x_0: jax.Array, images_B2HWC: jax.Array) -> jax.Array:
    """Latents x_0 (B, T, H, W, C) whose first and last frame are those of encoded images (B, 2, H, W, C)."""
    return x_0.at[:, 0].set(images_B2HWC[:, 0]).at[:, -1].set(images_B2HWC[:, 1])


def write_back(x_0: np.ndarray, cond: np.ndarray) -> np.ndarray:
    """Sampled latents x_0 (B, T, H, W, C) with the conditioning frames of `cond` (B, T, H, W, 1 + C) in their place."""
    return np.where(cond[..., :1] > 0, cond[..., 1:], x_0)
