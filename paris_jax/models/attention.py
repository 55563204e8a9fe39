"""One attention for every block, dispatched to the fastest kernel at hand.

Padding is at the end of the keys and given as lengths, which cuDNN's flash attention takes (a dense mask it does not).
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from paris_jax.models.axes import constrain, fitting

logger = logging.getLogger(__name__)

Kernel = Literal["xla", "cudnn", "pallas"]
BLOCKS = (512, 256, 128)  # tokens that the TPU's kernel takes at once


def attend(q_BNHD: jax.Array, k_BNHD: jax.Array, v_BNHD: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the first `length` keys of each sample; returns (B, N, H, D).

    What queries beyond `length` get is not defined.
    """
    # Heads are independent: a device that holds some of the tokens gives them away for all tokens of some heads.
    q_BNHD, k_BNHD, v_BNHD = (constrain(x, "batch", None, "attending", None) for x in (q_BNHD, k_BNHD, v_BNHD))
    kernel = implementation(_platform(), q_BNHD.dtype.name, q_BNHD.shape[-1], q_BNHD.shape[1])
    if kernel == "pallas":
        attended_BNHD = _on_every_device(_flash, q_BNHD, k_BNHD, v_BNHD, _lengths(q_BNHD, length_B))
    elif kernel == "cudnn":
        attended_BNHD = jax.nn.dot_product_attention(
            q_BNHD,
            k_BNHD,
            v_BNHD,
            query_seq_lengths=None if length_B is None else _lengths(q_BNHD, None),
            key_value_seq_lengths=length_B,
            implementation="cudnn",
        )
    else:
        attended_BNHD = _plain(q_BNHD, k_BNHD, v_BNHD, length_B)
    return checkpoint_name(constrain(attended_BNHD, "batch", None, "attending", None), "attended")


def _lengths(x_BNHD: jax.Array, length_B: jax.Array | None) -> jax.Array:
    return jnp.full(x_BNHD.shape[0], x_BNHD.shape[1], jnp.int32) if length_B is None else length_B


def _platform() -> str:
    """Of the mesh that is compiled for, which may not be here; without one, of this process."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


@functools.cache
def implementation(platform: str, dtype: str, head_width: int, tokens: int) -> Kernel:
    """Chooses a kernel, and logs the choice once, with the reason where it is not the fast one."""
    choice: Kernel = "xla"
    if platform == "tpu" and tokens < BLOCKS[-1]:
        reason = f"the TPU's flash kernel works on {BLOCKS[-1]} tokens at once, and here are {tokens}"
    elif platform == "tpu":
        choice, reason = "pallas", "flash attention"
    elif platform not in ("gpu", "cuda"):
        reason = f"there is no flash attention for {platform}"
    elif dtype not in ("bfloat16", "float16"):
        reason = f"cuDNN's kernel takes 16-bit floats, not {dtype}"
    elif head_width % 8 or head_width > 128:
        reason = f"cuDNN's kernel takes head widths up to 128 in steps of 8, not {head_width}"
    else:
        choice, reason = "cudnn", "flash attention"
    logger.info("attention: %s (%s)", choice, reason)
    return choice


def _on_every_device(kernel, q_BNHD: jax.Array, k_BNHD: jax.Array, v_BNHD: jax.Array, length_B: jax.Array):
    """A kernel that XLA cannot split, called by each device of the mesh on its own samples and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q_BNHD, k_BNHD, v_BNHD, length_B)
    heads = fitting(mesh, q_BNHD.shape, "batch", None, "attending", None)
    specs = (heads, heads, heads, fitting(mesh, length_B.shape, "batch"))
    free = set(mesh.axis_names) - set(mesh.manual_axes)
    split = jax.shard_map(kernel, axis_names=free, in_specs=specs, out_specs=heads, check_vma=False)
    return split(q_BNHD, k_BNHD, v_BNHD, length_B)


def _flash(q_BNHD: jax.Array, k_BNHD: jax.Array, v_BNHD: jax.Array, length_B: jax.Array) -> jax.Array:
    """JAX's Pallas flash attention for TPU, forward and backward (Dao et al. 2022), on padded tokens."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    tokens = q_BNHD.shape[1]
    padding = -tokens % BLOCKS[-1]
    block = next(b for b in BLOCKS if (tokens + padding) % b == 0)
    names = [name for name in kernel.BlockSizes.__dataclass_fields__ if name != "block_b"]
    sizes = kernel.BlockSizes(block_b=1, **dict.fromkeys(names, block))
    # Padding is a segment of its own, which nobody else looks at.
    is_padding = (jnp.arange(tokens + padding) >= length_B[:, None]).astype(jnp.int32)

    def by_head(x_BNHD: jax.Array) -> jax.Array:
        return jnp.pad(x_BNHD, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)

    attended_BHND = kernel.flash_attention(
        *(by_head(x) for x in (q_BNHD, k_BNHD, v_BNHD)),
        segment_ids=kernel.SegmentIds(is_padding, is_padding),
        sm_scale=q_BNHD.shape[-1] ** -0.5,
        block_sizes=sizes,
    )
    return attended_BHND[:, :, :tokens].transpose(0, 2, 1, 3)


@jax.custom_vjp
def _plain(q_BNHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, length_B: jax.Array | None) -> jax.Array:
    """Attention in products that XLA compiles anywhere, with the backward pass of flash attention.

    Differentiated by itself, softmax would go over all pairs of tokens three times more.
    """
    return _plain_forward(q_BNHD, k_BSHD, v_BSHD, length_B)[0]


def _plain_forward(q_BNHD, k_BSHD, v_BSHD, length_B):
    scores_BHNS = jnp.einsum("BNHD,BSHD->BHNS", q_BNHD, k_BSHD, preferred_element_type=jnp.float32)
    scores_BHNS = scores_BHNS * q_BNHD.shape[-1] ** -0.5
    if length_B is not None:
        counts_BS = jnp.arange(k_BSHD.shape[1]) < length_B[:, None]
        scores_BHNS = jnp.where(counts_BS[:, None, None], scores_BHNS, jnp.finfo(jnp.float32).min)
    weights_BHNS = jnp.exp(scores_BHNS - scores_BHNS.max(-1, keepdims=True))  # softmax, but for the sums
    sums_BNH1 = weights_BHNS.sum(-1).transpose(0, 2, 1)[..., None]
    weights_BHNS = weights_BHNS.astype(v_BSHD.dtype)
    # Heads first, as they stand in the weights: for one sample, XLA would otherwise turn the weights around.
    v_BHSD = v_BSHD.transpose(0, 2, 1, 3)
    summed_BHND = jnp.einsum("BHNS,BHSD->BHND", weights_BHNS, v_BHSD, preferred_element_type=jnp.float32)
    attended_BNHD = (summed_BHND.transpose(0, 2, 1, 3) / sums_BNH1).astype(v_BSHD.dtype)
    return attended_BNHD, (q_BNHD, k_BSHD, v_BSHD, weights_BHNS, sums_BNH1, attended_BNHD)


def _plain_backward(kept, gradient_BNHD):
    """Dao et al. 2022, appendix B.4: the sum over keys in softmax's gradient is one over features, of out * d out."""
    q_BNHD, k_BSHD, v_BSHD, weights_BHNS, sums_BNH1, attended_BNHD = kept
    dtype, scale = v_BSHD.dtype, q_BNHD.shape[-1] ** -0.5
    gradient_BNHD = gradient_BNHD / sums_BNH1
    means_BHN1 = (gradient_BNHD * attended_BNHD).sum(-1).transpose(0, 2, 1)[..., None]
    gradient_BNHD = gradient_BNHD.astype(dtype)
    of_weights_BHNS = jnp.einsum("BNHD,BSHD->BHNS", gradient_BNHD, v_BSHD, preferred_element_type=jnp.float32)
    of_scores_BHNS = (weights_BHNS * (of_weights_BHNS - means_BHN1) * scale).astype(dtype)
    of_q_BNHD = jnp.einsum("BHNS,BSHD->BNHD", of_scores_BHNS, k_BSHD)
    of_k_BSHD = jnp.einsum("BHNS,BNHD->BSHD", of_scores_BHNS, q_BNHD)
    of_v_BSHD = jnp.einsum("BHNS,BNHD->BSHD", weights_BHNS, gradient_BNHD)
    return of_q_BNHD, of_k_BSHD, of_v_BSHD, None


_plain.defvjp(_plain_forward, _plain_backward)
