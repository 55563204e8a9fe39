"""Frames that are given and to be kept: what turns text-to-video into image-to-video and video continuation.

A network is told them by an input of its own, (B, T, H, W, 1 + C): the mask, 1 where a latent frame is given, and the
clean latent where it is (Open-Sora 2.0, arXiv 2503.09642). The noised latent and the loss are those of text-to-video.
"""

import jax
import jax.numpy as jnp

# What is given: nothing, the first latent frame, the last, both of them, or any number of frames from the beginning on.
MASK_KINDS = ("none", "first", "last", "both", "prefix")


def of_kind(kind: str, frames: int, prefix: int | jax.Array = 1) -> jax.Array:
    """Which of so many latent frames a kind of mask gives, (T,) bool; `prefix` is the length of a "prefix"."""
    T = jnp.arange(frames)
    first, last = prefix > T if kind == "prefix" else T < 1, frames - 1 <= T
    return {"none": T < 0, "last": last, "both": first | last}.get(kind, first)


def draw(keys_B: jax.Array, weights: tuple[float, ...], frames: int) -> jax.Array:
    """A mask for each key, (B, T) bool: a kind with chances as `weights`, in the order of `KINDS`.

    A prefix has any length that leaves a frame to make, each as likely; a single frame has none.
    """
    chances = jnp.cumsum(jnp.asarray(weights) / sum(weights))[:-1]

    def one(key: jax.Array) -> jax.Array:
        which, length = jax.random.split(key)
        kind = jnp.searchsorted(chances, jax.random.uniform(which), side="right")
        prefix = jax.random.randint(length, (), 1, max(frames, 2))
        return jnp.stack([of_kind(k, frames, prefix) for k in MASK_KINDS])[kind] & (frames > 1)

    return jax.vmap(one)(keys_B)


def cond_input(x_0: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The input that tells a network of the frames of x_0 (B, T, H, W, C) to keep: (B, T, H, W, 1 + C) float32."""
    mask = jnp.broadcast_to(mask_BT[..., None, None, None], (*x_0.shape[:-1], 1)).astype(jnp.float32)
    return jnp.concatenate([mask, jnp.where(mask > 0, x_0, 0.0)], axis=-1)
