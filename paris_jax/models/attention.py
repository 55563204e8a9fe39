"""One attention for every block, dispatched to the fastest kernel at hand.

Padding is at the end of the keys and given as lengths, which cuDNN's flash attention takes (a dense mask it does not).
"""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp

logger = logging.getLogger(__name__)

Kernel = Literal["xla", "cudnn"]


def attend(q_BNHD: jax.Array, k_BNHD: jax.Array, v_BNHD: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the first `length` keys of each sample; returns (B, N, H, D)."""
    return jax.nn.dot_product_attention(
        q_BNHD,
        k_BNHD,
        v_BNHD,
        query_seq_lengths=None if length_B is None else jnp.full_like(length_B, q_BNHD.shape[1]),
        key_value_seq_lengths=length_B,
        implementation=implementation(jax.default_backend(), q_BNHD.dtype.name, q_BNHD.shape[-1]),
    )


@functools.cache
def implementation(backend: str, dtype: str, head_width: int) -> Kernel:
    """Chooses "cudnn" or "xla", and logs the choice once, with the reason where it is not the fast one."""
    choice: Kernel
    if backend != "gpu":
        choice, reason = "xla", f"there is no flash attention for {backend} here yet"
    elif dtype not in ("bfloat16", "float16"):
        choice, reason = "xla", f"cuDNN's kernel takes 16-bit floats, not {dtype}"
    elif head_width % 8 or head_width > 128:
        choice, reason = "xla", f"cuDNN's kernel takes head widths up to 128 in steps of 8, not {head_width}"
    else:
        choice, reason = "cudnn", "flash attention"
    logger.info("attention: %s (%s)", choice, reason)
    return choice
