"""The transformer of T5, CLIP and DINOv2: pre-norm blocks of attention and MLP, stacked and scanned.

Published encoders are pure functions of their weights; nothing here is trained.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP's
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes and variants of the blocks of one encoder.

    Attributes:
      heads: of attention.
      activation: a name in ACTIVATIONS.
      epsilon: of the norms.
      rms: norms without mean and shift (T5), instead of LayerNorm.
      scaled: whether attention divides by the root of the head width; T5's weights contain the factor.
    """

    heads: int
    activation: str
    epsilon: float
    rms: bool = False
    scaled: bool = True


def norm(blocks: Blocks, weights: Params, x: jax.Array) -> jax.Array:
    """LayerNorm with scale and shift, or T5's RMSNorm with a scale, in float32."""
    wide = x.astype(jnp.float32)
    if not blocks.rms:
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + blocks.epsilon) * weights["weight"]
    return (wide + weights["bias"] if "bias" in weights else wide).astype(x.dtype)


def dense(weights: Params, x: jax.Array) -> jax.Array:
    """x W^T + b with a published layer's (outputs, inputs) matrix; b where there is one."""
    y = x @ weights["weight"].astype(x.dtype).T
    return y + weights["bias"].astype(x.dtype) if "bias" in weights else y


def attention(blocks: Blocks, weights: Params, x_BLD: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Self-attention; `bias`, (..., H or 1, L, L), is added to the logits, whose softmax is float32."""

    def heads(name: str) -> jax.Array:
        return dense(weights[name], x_BLD).reshape(*x_BLD.shape[:2], blocks.heads, -1)

    q, k, v = heads("q"), heads("k"), heads("v")
    logits = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5 if blocks.scaled else logits
    weight = jax.nn.softmax(logits if bias is None else logits + bias).astype(x_BLD.dtype)
    mixed = jnp.einsum("bhlm,bmhd->blhd", weight, v)
    return dense(weights["out"], mixed.reshape(*x_BLD.shape[:2], -1))


def mlp(blocks: Blocks, weights: Params, x: jax.Array) -> jax.Array:
    """Linear, activation, linear; gated where there is a gate: activation(gate x) * (in x)."""
    act = ACTIVATIONS[blocks.activation]
    if "gate" in weights:
        return dense(weights["out"], act(dense(weights["gate"], x)) * dense(weights["in"], x))
    return dense(weights["out"], act(dense(weights["in"], x)))


def run(blocks: Blocks, stack: Params, x_BLD: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Every block in turn: x += scale1 * attention(norm1 x), x += scale2 * mlp(norm2 x).

    Args:
      stack: weights of all blocks, each with a leading layer axis: norm1, norm2, attention {q, k, v, out}, mlp {in,
        out, gate}, and scale1, scale2 where there is LayerScale.
      bias: added to the logits of every block's attention.
    """

    def block(x: jax.Array, weights: Params) -> tuple[jax.Array, None]:
        for part, function in (
            ("1", lambda y: attention(blocks, weights["attention"], y, bias)),
            ("2", lambda y: mlp(blocks, weights["mlp"], y)),
        ):
            y = function(norm(blocks, weights[f"norm{part}"], x))
            x = x + (y * weights[f"scale{part}"].astype(y.dtype) if f"scale{part}" in weights else y)
        return x, None

    return jax.lax.scan(block, x_BLD, stack)[0]


def normalise(image: jax.Array, mean: tuple[float, ...], spread: tuple[float, ...]) -> jax.Array:
    """Normalises images (..., 3) in [0, 1] by an encoder's mean and standard deviation."""
    return (image.astype(jnp.float32) - jnp.asarray(mean)) / jnp.asarray(spread)


def patches(weights: Params, image_BHW3: jax.Array, dtype: str) -> jax.Array:
    """A convolution whose stride is its kernel, (D, 3, P, P): a product over patches, (B, N, D)."""
    D, C, P, _ = weights["weight"].shape
    B, H, W, _ = image_BHW3.shape
    x = image_BHW3.reshape(B, H // P, P, W // P, P, C).transpose(0, 1, 3, 5, 2, 4).reshape(B, -1, C * P * P)
    return dense(weights | {"weight": weights["weight"].reshape(D, -1)}, x.astype(dtype))
