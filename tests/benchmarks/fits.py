"""Memory of sampling at full size, by compiling the ensemble's sampler for a chip that is not here.

    python -m tests.benchmarks.fits [--config=configs/paris2.py] [--chip=v5p:2x2x1] [--fixed_expert=3] [--batch=1]
        [--ways=auto,int8,auto+offload,int8+offload]

For every way to keep the experts (as they compute or as 8-bit integers, on the chip or in the host's memory): bytes of
arguments on the chip and on the host, and the most memory of the chip while guided videos are drawn. Needs libtpu.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from paris_jax.config import files
from paris_jax.config.experiment import Experiment
from paris_jax.diffusion.guidance import Strength
from paris_jax.encoders import codecs
from paris_jax.ensemble import conditioning, sparse_velocity
from paris_jax.ensemble.routing import Routing
from paris_jax.models import functional, stacks
from paris_jax.models.dit import video_tokens
from paris_jax.planning.topologies import Topology

GIB = 2**30
STEPS = 50


def abstract(config, experts, weights, offload, device):
    """The experts as `placement.Keeping` would lay them on the device."""

    def of(path, leaf):
        keys = [key.key for key in path]
        kernel, block = keys[-1] == "kernel", keys[0] in functional.BLOCKS
        here, shape = SingleDeviceSharding(device), (experts, *leaf.shape)
        if not (kernel and block):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16 if kernel else leaf.dtype, sharding=here)
        away = SingleDeviceSharding(device, memory_kind="pinned_host") if offload else here
        members, layers, inputs, outputs = shape
        words = offload and weights == "int8"  # of four
        dtype = jnp.int32 if words else jnp.int8 if weights == "int8" else jnp.bfloat16
        stored = (members * layers, inputs // 4 if words else inputs, outputs) if offload else shape
        matrix = jax.ShapeDtypeStruct(stored, dtype, sharding=away)
        matrix = stacks.OnHost(matrix) if offload else matrix
        if weights != "int8":
            return matrix
        scale = jax.ShapeDtypeStruct((*shape[:-2], 1, shape[-1]), jnp.float32, sharding=here)
        return stacks.Int8(matrix, scale)

    return jax.tree_util.tree_map_with_path(of, functional.abstract(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/paris2.py")
    parser.add_argument("--chip", default="v5p:2x2x1")
    parser.add_argument("--fixed_expert", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ways", default="auto,int8,auto+offload,int8+offload")
    given = parser.parse_args()
    experiment = Experiment.from_config(files.load(given.config))
    device = Topology.parse(given.chip).devices()[0]
    T, H, W, C = codecs.latent_shape(experiment)
    sizes = {"channels": C, "pooled_width": 768, "dtype": "bfloat16"}
    network = functional.network_config(experiment.network, text_width=4096, **sizes)
    router = functional.router_config(experiment.router, clusters=given.experts, **sizes)
    here = SingleDeviceSharding(device)
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=here)  # noqa: E731
    B = given.batch
    text = conditioning.EncodedText(of(B, 512, 4096), of(B, dtype=jnp.int32), of(B, 768))
    told = conditioning.Condition(
        text, text, Strength(of()), temperature=of(), present=of(given.experts, dtype=jnp.bool_)
    )
    routers = jax.tree.map(lambda a: of(*a.shape, dtype=a.dtype), functional.abstract(router))
    places = tuple((0, k) for k in range(given.experts))
    rows = 2 * B  # with text and without; as many at once as on the chip itself
    size = f"{given.experts} x {functional.count(network) / 1e9:.2f}B, latent {(T, H, W, C)}"
    print(f"{size}, batch {B}, {given.chip}")
    for way in given.ways.split(","):
        weights, _, offload = way.partition("+")
        block = sparse_velocity.block_size(
            video_tokens((T, H, W, C)), rows, rows / given.experts, 2, "tpu", streamed=bool(offload)
        )
        plan = sparse_velocity.SamplerConfig(
            (network,), places, router, Routing("top_k", 1), guidance="classifier_free", expert_batch_size=block
        )
        experts = abstract(network, given.experts, weights, bool(offload), device)
        arrays = sparse_velocity.EnsembleParams((experts,), routers, of(given.experts, dtype=jnp.int32))
        begun = time.perf_counter()
        state = jax.tree.map(
            lambda a: of(*a.shape, dtype=a.dtype),
            jax.eval_shape(functools.partial(sparse_velocity.initial_state, plan, steps=STEPS), of(B, T, H, W, C)),
        )
        span, keys = [of(dtype=jnp.int32)] * 2, of(B, 2, dtype=jnp.uint32)
        try:
            lowered = sparse_velocity.take_steps.lower(
                plan, arrays, state, *span, keys, of(STEPS + 1), told, of(STEPS, dtype=jnp.int32)
            )
            found = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            print(f"{way:14s} does not fit: {' '.join(str(error).split())[:1500]}", flush=True)
            continue
        chip = found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes
        host = found.host_argument_size_in_bytes
        took = time.perf_counter() - begun
        print(f"{way:14s} chip {chip / GIB:6.1f} GiB (of it temporary {found.temp_size_in_bytes / GIB:.2f}), "
              f"host {host / GIB:6.1f} GiB; compiled in {took:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
