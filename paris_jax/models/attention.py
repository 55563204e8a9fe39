"""Attention for every block: dispatch to the fastest kernel, and attention patterns over a video.

Padding is at the end of the keys and passed as lengths: cuDNN's flash attention accepts lengths but no dense mask.
"""

import functools
import logging
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from paris_jax.models import precision
from paris_jax.models.sharding_rules import axes_that_divide, constrain

logger = logging.getLogger(__name__)
Kernel = Literal["xla", "cudnn", "pallas"]
BLOCKS = (512, 256, 128)  # block sizes of the TPU kernel, in tokens
GPU_PLATFORMS = ("gpu", "cuda", "rocm")
CUDNN_CAPABILITY = 8.0  # the least compute capability of cuDNN's flash attention


def pattern(name: str, frames: int, positions: int) -> Callable[..., jax.Array]:
    """The attention pattern "joint" or "factorised", over T frames of P positions each, followed by text tokens."""
    return {"joint": attend, "factorised": functools.partial(factorised, frames=frames, positions=positions)}[name]


def factorised(
    q_BNHD: jax.Array,
    k_BNHD: jax.Array,
    v_BNHD: jax.Array,
    length_B: jax.Array | None = None,
    *,
    frames: int,
    positions: int,
) -> jax.Array:
    """Factorised attention: within each frame and the text, then along time at each position.

    Each position attends to its own frame and the text, then to the results of the same position in all frames: the
    softmax over all frames and positions becomes p(frame) p(position | frame). Both steps use the same queries and
    keys, so the parameters are those of joint attention and its weights can be loaded; for a single frame the result is
    joint attention. The text, which follows the video, attends to all tokens.

    For P positions, T frames and L text tokens it takes P T (P + L + T) query-key products; `attend` takes (P T + L)^2.
    """
    (B, S, H, D), N = q_BNHD.shape, frames * positions

    def by_frame(x_BSHD: jax.Array) -> jax.Array:
        """Each frame followed by the text, (B * T, P + L, H, D)."""
        video = x_BSHD[:, :N].reshape(B, frames, positions, H, D)
        text = jnp.broadcast_to(x_BSHD[:, None, N:], (B, frames, S - N, H, D))
        return jnp.concatenate([video, text], axis=2).reshape(B * frames, positions + S - N, H, D)

    def by_position(x: jax.Array) -> jax.Array:
        return x.reshape(B, frames, positions, H, D).swapaxes(1, 2).reshape(B * positions, frames, H, D)

    length = None if length_B is None else jnp.repeat(length_B - (N - positions), frames)
    video = attend(q_BNHD[:, :N].reshape(B * frames, positions, H, D), by_frame(k_BNHD), by_frame(v_BNHD), length)
    if frames > 1:
        video = attend(by_position(q_BNHD[:, :N]), by_position(k_BNHD[:, :N]), by_position(video))
        video = video.reshape(B, positions, frames, H, D).swapaxes(1, 2)
    text = attend(q_BNHD[:, N:], k_BNHD, v_BNHD, length_B)
    return jnp.concatenate([video.reshape(B, N, H, D), text], axis=1)


def attend(q_BNHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, length_B: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over the first `length` keys of each sample; returns (B, N, H, D).

    In self-attention, the outputs of queries beyond `length` are undefined.
    """
    # Heads are independent: an all-to-all exchanges a shard of the tokens for all tokens of a shard of the heads.
    q_BNHD, k_BSHD, v_BSHD = (constrain(x, "batch", None, "attending", None) for x in (q_BNHD, k_BSHD, v_BSHD))
    kernel = implementation(*_device(), q_BNHD.dtype.name, q_BNHD.shape[-1], k_BSHD.shape[1])
    if kernel == "xla":
        attended_BNHD = _plain(q_BNHD, k_BSHD, v_BSHD, length_B)
    else:
        flash = {"pallas": _pallas, "cudnn": _cudnn}[kernel]
        attended_BNHD = _on_every_device(flash, q_BNHD, k_BSHD, v_BSHD, length_B)
    return constrain(attended_BNHD, "batch", None, "attending", None)


def _device() -> tuple[str, str]:
    """Platform and compute capability of the devices that the program is compiled for.

    The platform is that of the current mesh, whose devices this machine may lack, or else JAX's default backend. The
    compute capability is "7.5" for an NVIDIA T4, "gfx90a" for an AMD GPU, and "" where it is unknown.
    """
    mesh = jax.sharding.get_abstract_mesh()
    backend, capability = precision.current_device()
    platform = backend if mesh.empty else mesh.abstract_device.platform
    return platform, capability if platform == backend else ""


@functools.cache
def implementation(platform: str, capability: str, dtype: str, head_width: int, keys: int) -> Kernel:
    """Chooses a kernel and logs the choice once, with the reason for any fallback."""
    choice, reason = choose(platform, capability, dtype, head_width, keys)
    # A CPU has one kernel only.
    logger.log(logging.DEBUG if platform == "cpu" else logging.INFO, "attention: %s (%s)", choice, reason)
    return choice


def choose(platform: str, capability: str, dtype: str, head_width: int, keys: int) -> tuple[Kernel, str]:
    """The kernel for attention over so many keys, and why."""
    choice: Kernel = "xla"
    if keys <= head_width:
        reason = f"the attention weights over {keys} keys take no more memory than the queries"
    elif platform == "tpu" and keys < BLOCKS[-1]:
        reason = f"the TPU's flash kernel needs at least {BLOCKS[-1]} keys, not {keys}"
    elif platform == "tpu":
        choice, reason = "pallas", "flash attention"
    elif platform not in GPU_PLATFORMS:
        reason = f"no flash attention for {platform}"
    elif platform == "rocm" or capability.startswith("gfx"):
        reason = "cuDNN's kernel runs on NVIDIA GPUs only"
    elif capability and float(capability) < CUDNN_CAPABILITY:
        reason = f"cuDNN's kernel needs compute capability {CUDNN_CAPABILITY} (A100 or later), not {capability}"
    elif dtype not in ("bfloat16", "float16"):
        reason = f"cuDNN's kernel takes 16-bit floats, not {dtype}; set compute_dtype"
    elif head_width % 8 or head_width > 128:
        reason = f"cuDNN's kernel takes head widths up to 128 in steps of 8, not {head_width}"
    else:
        choice, reason = "cudnn", "flash attention"
    return choice, reason


def _on_every_device(kernel, q_BNHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, length_B: jax.Array | None):
    """Calls a kernel that XLA cannot shard on each device of the mesh, for its own samples and heads.

    All axes of the mesh are manual inside: JAX's rule for sharding cuDNN's kernel fails where some are manual already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return kernel(q_BNHD, k_BSHD, v_BSHD, length_B)
    heads = axes_that_divide(mesh, q_BNHD.shape, "batch", None, "attending", None)
    lengths = PartitionSpec() if length_B is None else axes_that_divide(mesh, length_B.shape, "batch")
    automatic = set(mesh.axis_names) - set(mesh.manual_axes)
    specs = (heads, heads, heads, lengths)
    sharded = jax.shard_map(kernel, axis_names=automatic, in_specs=specs, out_specs=heads, check_vma=False)
    return sharded(q_BNHD, k_BSHD, v_BSHD, length_B)


def _cudnn(q_BNHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, length_B: jax.Array | None) -> jax.Array:
    """cuDNN's flash attention, forward and backward.

    JAX refuses odd numbers of tokens in the backward pass, so they are padded by one token, which lengths exclude.
    """
    (B, N), S = q_BNHD.shape[:2], k_BSHD.shape[1]
    queries = None
    if length_B is not None or N % 2 or S % 2:
        queries = jnp.full(B, N, jnp.int32)
        length_B = jnp.full(B, S, jnp.int32) if length_B is None else length_B
    q_BNHD, k_BSHD, v_BSHD = (_pad_tokens(x, x.shape[1] + x.shape[1] % 2) for x in (q_BNHD, k_BSHD, v_BSHD))
    attended_BNHD = jax.nn.dot_product_attention(
        q_BNHD,
        k_BSHD,
        v_BSHD,
        query_seq_lengths=queries,
        key_value_seq_lengths=length_B,
        implementation="cudnn",
    )
    return attended_BNHD[:, :N]


def _pad_tokens(x_BNHD: jax.Array, tokens: int) -> jax.Array:
    return jnp.pad(x_BNHD, ((0, 0), (0, tokens - x_BNHD.shape[1]), (0, 0), (0, 0)))


def _pallas(q_BNHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, length_B: jax.Array | None) -> jax.Array:
    """JAX's Pallas flash attention for TPU, forward and backward (Dao et al. 2022), on padded tokens."""
    from jax.experimental.pallas.ops.tpu import flash_attention as kernel

    (B, N), S = q_BNHD.shape[:2], k_BSHD.shape[1]
    queries, keys = (-(-n // BLOCKS[-1]) * BLOCKS[-1] for n in (N, S))
    block_q, block_k = (next(b for b in BLOCKS if n % b == 0) for n in (queries, keys))
    names = [name for name in kernel.BlockSizes.__dataclass_fields__ if name != "block_b"]
    sizes = kernel.BlockSizes(block_b=1, **{n: block_q if n.startswith("block_q") else block_k for n in names})
    segments = None
    if length_B is not None or keys > S:  # padding keys form a segment of their own, to which no query attends
        length_B = jnp.full(B, S, jnp.int32) if length_B is None else length_B
        is_padding = (jnp.arange(keys) >= length_B[:, None]).astype(jnp.int32)
        segments = kernel.SegmentIds(jnp.zeros((B, queries), jnp.int32), is_padding)
    attended_BHND = kernel.flash_attention(
        _pad_tokens(q_BNHD, queries).transpose(0, 2, 1, 3),
        _pad_tokens(k_BSHD, keys).transpose(0, 2, 1, 3),
        _pad_tokens(v_BSHD, keys).transpose(0, 2, 1, 3),
        segment_ids=segments,
        sm_scale=q_BNHD.shape[-1] ** -0.5,
        block_sizes=sizes,
    )
    return attended_BHND[:, :, :N].transpose(0, 2, 1, 3)


@jax.custom_vjp
def _plain(q_BNHD: jax.Array, k_BSHD: jax.Array, v_BSHD: jax.Array, length_B: jax.Array | None) -> jax.Array:
    """Attention in plain matrix products for any platform, with the backward pass of flash attention.

    Automatic differentiation of the softmax would take three more passes over all pairs of tokens.
    """
    return _plain_forward(q_BNHD, k_BSHD, v_BSHD, length_B)[0]


def _plain_forward(q_BNHD, k_BSHD, v_BSHD, length_B):
    scores_BHNS = jnp.einsum("BNHD,BSHD->BHNS", q_BNHD, k_BSHD, preferred_element_type=jnp.float32)
    scores_BHNS = scores_BHNS * q_BNHD.shape[-1] ** -0.5
    if length_B is not None:
        valid_BS = jnp.arange(k_BSHD.shape[1]) < length_B[:, None]
        scores_BHNS = jnp.where(valid_BS[:, None, None], scores_BHNS, jnp.finfo(jnp.float32).min)
    weights_BHNS = jnp.exp(scores_BHNS - scores_BHNS.max(-1, keepdims=True))  # unnormalised softmax
    sums_BNH1 = weights_BHNS.sum(-1).transpose(0, 2, 1)[..., None]
    weights_BHNS = weights_BHNS.astype(v_BSHD.dtype)
    # Heads first, the layout of the weights: for one sample, XLA would otherwise transpose the weights.
    v_BHSD = v_BSHD.transpose(0, 2, 1, 3)
    summed_BHND = jnp.einsum("BHNS,BHSD->BHND", weights_BHNS, v_BHSD, preferred_element_type=jnp.float32)
    attended_BNHD = (summed_BHND.transpose(0, 2, 1, 3) / sums_BNH1).astype(v_BSHD.dtype)
    attended_BNHD = checkpoint_name(attended_BNHD, "attended")
    return attended_BNHD, (q_BNHD, k_BSHD, v_BSHD, weights_BHNS, sums_BNH1, attended_BNHD)


def _plain_backward(saved, gradient_BNHD):
    """Dao et al. 2022, appendix B.4: softmax's sum over keys equals the sum over features of out * d_out."""
    q_BNHD, k_BSHD, v_BSHD, weights_BHNS, sums_BNH1, attended_BNHD = saved
    dtype, scale = v_BSHD.dtype, q_BNHD.shape[-1] ** -0.5
    gradient_BNHD = gradient_BNHD / sums_BNH1
    means_BHN1 = (gradient_BNHD * attended_BNHD).sum(-1).transpose(0, 2, 1)[..., None]
    gradient_BNHD = gradient_BNHD.astype(dtype)
    d_weights_BHNS = jnp.einsum("BNHD,BSHD->BHNS", gradient_BNHD, v_BSHD, preferred_element_type=jnp.float32)
    d_scores_BHNS = (weights_BHNS * (d_weights_BHNS - means_BHN1) * scale).astype(dtype)
    d_q_BNHD = jnp.einsum("BHNS,BSHD->BNHD", d_scores_BHNS, k_BSHD)
    d_k_BSHD = jnp.einsum("BHNS,BNHD->BSHD", d_scores_BHNS, q_BNHD)
    d_v_BSHD = jnp.einsum("BHNS,BNHD->BSHD", weights_BHNS, gradient_BNHD)
    return d_q_BNHD, d_k_BSHD, d_v_BSHD, None


_plain.defvjp(_plain_forward, _plain_backward)
