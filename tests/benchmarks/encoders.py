"""Memory of the published encoders at full size, compiled ahead of time for a simulated TPU. Needs libtpu.

    python -m tests.benchmarks.encoders [--chip=v5p:2x2x1] [--only=t5,clip,dinov2-l,dinov2-g,piece]
    python -m tests.benchmarks.encoders --only=vae --videos=33x256x256,33x512x512

Prints, for each encoder, the memory of its weights (matrices in bfloat16) and the peak memory of the chip for one
batch. `piece` is the smallest tile of the VAE (`hunyuan.Tiling`), which does not depend on the video's size; `vae`
encodes and decodes whole videos without tiling.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from paris_jax.encoders import clip, dinov2, hunyuan, placement, t5
from paris_jax.encoders.transformer import Blocks
from paris_jax.planning.topologies import Topology

GIB = 2**30
BATCH = 16  # clips that `prepare` encodes in one batch (data/encoding.py)
STAGES = (128, 256, 512, 512)  # channels of the VAE's stages; two blocks per stage encode, three decode
DINOV2 = {"dinov2-l": (24, 1024, 4096, 16, False), "dinov2-g": (40, 1536, 4096, 24, True)}


def dense(*shape: int, bias: bool = True) -> dict[str, Any]:
    return {"weight": shape} | ({"bias": (*shape[:-2], shape[-2])} if bias else {})


def normed(*shape: int, bias: bool = True) -> dict[str, Any]:
    return {"weight": shape} | ({"bias": shape} if bias else {})


def blocks(layers: int, D: int, F: int, *, bias: bool = True, gated: bool = False) -> dict[str, Any]:
    mlp = {"in": dense(layers, F, D, bias=bias), "out": dense(layers, D, F, bias=bias)}
    return {
        "norm1": normed(layers, D, bias=bias),
        "attention": {name: dense(layers, D, D, bias=bias) for name in ("q", "k", "v", "out")},
        "norm2": normed(layers, D, bias=bias),
        "mlp": mlp | ({"gate": dense(layers, F, D, bias=bias)} if gated else {}),
    }


def t5_xxl() -> dict[str, Any]:
    stack = blocks(24, 4096, 10240, bias=False, gated=True)
    return {"tokens": (32128, 4096), "distances": (32, 64), "blocks": stack, "norm": normed(4096, bias=False)}


def clip_l() -> dict[str, Any]:
    text = {"blocks": blocks(12, 768, 3072), "positions": (77, 768), "tokens": (49408, 768), "norm": normed(768)}
    return {"text": text}


def dino(layers: int, D: int, F: int, gated: bool) -> dict[str, Any]:
    stack = blocks(layers, D, F, gated=gated) | {"scale1": (layers, D), "scale2": (layers, D)}
    patches = {"weight": (D, 3, 14, 14), "bias": (D,)}
    return {"cls": (D,), "positions": (1 + 37**2, D), "patches": patches, "blocks": stack, "norm": normed(D)}


def conv(outputs: int, inputs: int, size: int = 3) -> dict[str, Any]:
    return {"weight": (size, size, size, inputs, outputs), "bias": (outputs,)}


def resnet(inputs: int, outputs: int) -> dict[str, Any]:
    block = {"norm1": normed(inputs), "conv1": conv(outputs, inputs), "norm2": normed(outputs)}
    block["conv2"] = conv(outputs, outputs)
    return block | ({"shortcut": conv(outputs, inputs, 1)} if inputs != outputs else {})


def half(widths: tuple[int, ...], count: int, inputs: int, outputs: int) -> dict[str, Any]:
    """Shapes of the VAE's encoder, or of its decoder when the widths are reversed."""
    stages, before = [], widths[0]
    for i, width in enumerate(widths):
        stage = {"resnets": [resnet(before if j == 0 else width, width) for j in range(count)]}
        stages.append(stage | ({"sample": conv(width, width)} if i < 3 else {}))
        before = width
    middle = widths[-1] if count == 2 else widths[0]
    return {
        "in": conv(widths[0], inputs),
        "stages": stages,
        "middle": [resnet(middle, middle)] * 2,
        "attention": {name: dense(middle, middle) for name in ("q", "k", "v", "out")} | {"norm": normed(middle)},
        "norm": normed(widths[-1]),
        "out": conv(outputs, widths[-1]),
    }


def vae() -> dict[str, Any]:
    ends = {"quant": conv(32, 32, 1), "post_quant": conv(16, 16, 1)}
    return ends | {"encoder": half(STAGES, 2, 3, 32), "decoder": half(STAGES[::-1], 3, 16, 3)}


def jobs(only: list[str], videos: list[tuple[int, int, int]]) -> Iterator[tuple[str, Any, Any, Any, list[Any]]]:
    """Yields name, jitted function, config, shapes of the weights, and (shape, dtype) of each input."""
    xxl = t5.T5(Blocks(64, "gelu_tanh", 1e-6, rms=True, scaled=False), 32, 128)
    if "t5" in only:
        for count, length in ((1, 512), (BATCH, 512)):
            inputs = [((count, length), jnp.int32), ((count,), jnp.int32)]
            yield f"T5-v1.1-XXL, {count} x {length} tokens", t5.encode, xxl, t5_xxl(), inputs
    if "clip" in only:
        large = clip.Clip(Blocks(12, "quick_gelu", 1e-5), None, 49407)
        inputs = [((BATCH, 77), jnp.int32)]
        yield f"CLIP ViT-L/14's text, {BATCH} x 77 tokens", clip.encode_text, large, clip_l(), inputs
    for name in (n for n in DINOV2 if n in only):
        layers, D, F, heads, gated = DINOV2[name]
        config = dinov2.Dino(Blocks(heads, "silu" if gated else "gelu", 1e-6))
        inputs = [((4 * BATCH, 224, 224, 3), jnp.float32)]
        yield f"{name}, {4 * BATCH} frames", dinov2.encode, config, dino(layers, D, F, gated), inputs
    tiling = hunyuan.Tiling()
    whole = [("", size) for size in videos] if "vae" in only else []
    piece = [("piece of ", (4 * tiling.frames + 1, 8 * tiling.side, 8 * tiling.side))] if "piece" in only else []
    for kind, (T, H, W) in piece + whole:
        inputs = [((1, T, H, W, 3), jnp.float32)]
        yield f"VAE, encoding {kind}{T} x {H} x {W}", hunyuan.encode, hunyuan.VAE(32), vae(), inputs
        inputs = [((1, 1 + (T - 1) // 4, H // 8, W // 8, 16), jnp.float32)]
        yield f"VAE, decoding {kind}{T} x {H} x {W}", hunyuan.decode, hunyuan.VAE(32), vae(), inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default="v5p:2x2x1")
    parser.add_argument("--only", default="t5,clip,dinov2-l,dinov2-g,piece")
    parser.add_argument("--videos", default="33x256x256,33x512x512")
    flags = parser.parse_args()
    sharding = SingleDeviceSharding(Topology.parse(flags.chip).devices()[0])
    sizes: Any = [tuple(map(int, video.split("x"))) for video in flags.videos.split(",")]

    def weight(path: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        dtype = jnp.bfloat16 if placement.is_matrix(name, len(shape)) else jnp.float32
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    for name, function, config, shapes, inputs in jobs(flags.only.split(","), sizes):
        params = jax.tree_util.tree_map_with_path(weight, shapes, is_leaf=lambda x: isinstance(x, tuple))
        arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in inputs]
        bytes_ = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
        start = time.perf_counter()
        try:
            memory = function.lower(config, params, *arrays, "bfloat16").compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            print(f"{name:44s} does not fit: {' '.join(str(error).split())[:300]}", flush=True)
            continue
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        print(
            f"{name:44s} weights {bytes_ / GIB:5.2f} GiB, peak {peak / GIB:6.2f} GiB "
            f"(temporary {memory.temp_size_in_bytes / GIB:.2f}); compiled in {time.perf_counter() - start:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
