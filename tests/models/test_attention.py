"""Dispatch of attention to the kernels of accelerators, traced and lowered on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from paris_jax.models import attention, blocks
from paris_jax.models.sharding_rules import MESH_AXES


@pytest.fixture
def cuda(monkeypatch):
    """Traces for an NVIDIA GPU whose cuDNN is installed."""
    monkeypatch.setattr(attention, "_device", lambda: ("gpu", "9.0"))
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


def gradients(attend, *inputs, weight=1.0):
    def value(q, k, v):
        return (attend(q, k, v, *inputs[3:]).astype(jnp.float32) * weight).sum()

    return jax.grad(value, argnums=(0, 1, 2))(*inputs[:3])


def lowered(function, *inputs):
    """The StableHLO text of a function for an NVIDIA GPU."""
    return jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("queries, keys", [(801, 801), (640, 513), (513, 640), (512, 512)])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_training_lowers_to_cudnn_for_any_number_of_tokens(cuda, queries, keys, padded):
    q, k = (jax.ShapeDtypeStruct((2, n, 2, 64), jnp.bfloat16) for n in (queries, keys))
    lengths = [jax.ShapeDtypeStruct((2,), jnp.int32)] if padded else []
    text = lowered(lambda *inputs: gradients(attention.attend, *inputs), q, k, k, *lengths)
    assert text.count("@__cudnn$fmhaSoftmax(") == 1 and text.count("@__cudnn$fmhaSoftmaxBackward(") == 1


@pytest.mark.parametrize("queries, keys", [(7, 9), (8, 9), (7, 8), (8, 8)])
@pytest.mark.parametrize("lengths", [None, [9, 3]], ids=["whole", "padded"])
def test_the_padding_for_cudnn_changes_no_value(monkeypatch, queries, keys, lengths):
    """The call of the kernel with JAX's own attention in its place, which takes the same lengths."""
    theirs = jax.nn.dot_product_attention

    def checked(q, k, v, *, implementation, **lengths):
        assert implementation == "cudnn" and q.shape[1] % 2 == k.shape[1] % 2 == 0
        return theirs(q, k, v, implementation="xla", **lengths)

    random = jax.random.split(jax.random.key(0), 4)
    shapes = (2, queries, 3, 16), (2, keys, 3, 16), (2, keys, 3, 16), (2, queries, 3, 16)
    q, k, v, weight = (jax.random.normal(key, shape) for key, shape in zip(random, shapes, strict=True))
    length = None if lengths is None else jnp.minimum(jnp.array(lengths, jnp.int32), keys)
    expected = attention._plain(q, k, v, length), gradients(attention._plain, q, k, v, length, weight=weight)
    monkeypatch.setattr(jax.nn, "dot_product_attention", checked)
    actual = attention._cudnn(q, k, v, length), gradients(attention._cudnn, q, k, v, length, weight=weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual, expected)


@pytest.mark.parametrize("manual", [(), ("fsdp",), ("data", "fsdp")])
def test_a_flash_kernel_runs_inside_a_mesh_whose_axes_are_all_manual(manual):
    """Inside `jax.shard_map` over some axes as well: an ensemble is manual over its experts."""
    mesh, seen = jax.sharding.AbstractMesh((2, 2, 2, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4), []

    def kernel(q, k, v, length):
        seen.append(set(jax.sharding.get_abstract_mesh().manual_axes))
        return q

    def call(q):
        return attention._on_every_device(kernel, q, q, q, None)

    if manual:
        call = jax.shard_map(call, axis_names=set(manual), in_specs=P(manual), out_specs=P(manual), check_vma=False)
    with jax.sharding.use_abstract_mesh(mesh):
        assert jax.eval_shape(jax.jit(call), jnp.ones((8, 4, 2, 8))).shape == (8, 4, 2, 8)
    assert seen == [set(MESH_AXES)]


def test_a_gpu_without_flash_attention_falls_back_with_a_reason(caplog):
    attention.implementation.cache_clear()
    with caplog.at_level("INFO"):
        assert attention.implementation("gpu", "7.5", "bfloat16", 64, 999) == "xla"  # T4
        assert attention.implementation("gpu", "7.0", "float16", 64, 999) == "xla"  # V100
        assert attention.implementation("gpu", "gfx942", "bfloat16", 64, 999) == "xla"  # MI300
        assert attention.implementation("gpu", "8.0", "bfloat16", 64, 999) == "cudnn"  # A100
        assert attention.implementation("gpu", "12.0", "bfloat16", 64, 999) == "cudnn"
    assert "not 7.5" in caplog.text and "not 7.0" in caplog.text and "NVIDIA GPUs only" in caplog.text


@pytest.mark.parametrize("remat, kernels", [("none", 1), ("named", 1), ("full", 2)])
def test_rematerialisation_by_name_never_repeats_a_tpus_attention_kernel(remat, kernels):
    def block(x):
        return attention._pallas(x, x, x, None) * 2

    block = block if remat == "none" else jax.checkpoint(block, policy=blocks.REMAT[remat])
    gradient = jax.make_jaxpr(jax.grad(lambda x: block(x).astype(jnp.float32).sum()))
    text = str(gradient(jnp.ones((1, 256, 2, 128), jnp.bfloat16)))
    assert text.count("pallas_call[") == kernels + 2  # the backward pass has two


@pytest.mark.parametrize("remat, kernels", [("none", 1), ("named", 1), ("full", 2)])
def test_rematerialisation_by_name_never_repeats_the_attention_kernel(cuda, remat, kernels):
    def block(x, _):
        q = x * 2
        return (x + attention.attend(q, q, q),), None

    def loss(x):
        body = block if remat == "none" else jax.checkpoint(block, prevent_cse=False, policy=blocks.REMAT[remat])
        return jax.lax.scan(lambda c, i: body(c[0], i), (x,), jnp.arange(3))[0][0].astype(jnp.float32).sum()

    text = lowered(jax.grad(loss), jax.ShapeDtypeStruct((2, 200, 2, 64), jnp.bfloat16))
    assert text.count("@__cudnn$fmhaSoftmax(") == kernels
