"""Memory of sampling at full size, with the ensemble's sampler compiled for a TPU or GPU that is not attached.

    python -m tests.benchmarks.fits [--config=configs/paris2.py] [--chip=v5p:2x2x1] [--experts=3] [--batch=1]
        [--ways=auto,int8,auto+offload,int8+offload]

For every placement of the experts (compute dtype or 8-bit integers, on the chip or in host memory), prints the bytes
of arguments on the host and the peak memory of the chip during sampling with guidance, and the attention kernels in
the program. Needs libtpu, or for `--chip=h100:1` JAX for CUDA; offload cannot be checked for GPUs.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from paris_jax.config import files
from paris_jax.config.experiment import Experiment
from paris_jax.diffusion import timesteps
from paris_jax.diffusion.guidance import Strength
from paris_jax.encoders import codecs
from paris_jax.ensemble import conditioning, sparse_velocity
from paris_jax.ensemble.routing import Routing
from paris_jax.models import functional, sharding_rules, stacks
from paris_jax.models.dit import video_tokens
from paris_jax.planning import program
from paris_jax.planning.topologies import Topology

GIB = 2**30
STEPS = 50


def abstract(config, experts, weights, offload, device):
    """Abstract parameters of the experts, stored as `placement.Keeping` stores them."""

    def abstract_leaf(path, leaf):
        keys = [key.key for key in path]
        kernel, block = keys[-1] == "kernel", keys[0] in functional.BLOCKS
        on_chip, shape = SingleDeviceSharding(device), (experts, *leaf.shape)
        if not (kernel and block):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16 if kernel else leaf.dtype, sharding=on_chip)
        stored_at = SingleDeviceSharding(device, memory_kind="pinned_host") if offload else on_chip
        members, layers, inputs, outputs = shape
        words = offload and weights == "int8"  # int32 words of four int8 values each
        dtype = jnp.int32 if words else jnp.int8 if weights == "int8" else jnp.bfloat16
        stored = (members * layers, inputs // 4 if words else inputs, outputs) if offload else shape
        matrix = jax.ShapeDtypeStruct(stored, dtype, sharding=stored_at)
        matrix = stacks.OnHost(matrix) if offload else matrix
        if weights != "int8":
            return matrix
        scale = jax.ShapeDtypeStruct((*shape[:-2], 1, shape[-1]), jnp.float32, sharding=on_chip)
        return stacks.Int8(matrix, scale)

    return jax.tree_util.tree_map_with_path(abstract_leaf, functional.abstract(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/paris2.py")
    parser.add_argument("--chip", default="v5p:2x2x1")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ways", default="auto,int8,auto+offload,int8+offload")
    flags = parser.parse_args()
    experiment = Experiment.from_config(files.load(flags.config))
    target = Topology.parse(flags.chip)
    device = target.devices()[0]
    mesh = sharding_rules.device_mesh(sharding_rules.MESH_AXES, (1, 1, 1, 1), [device])  # names the platform
    T, H, W, C = codecs.latent_shape(experiment)
    sizes = {"channels": C, "pooled_width": 768, "dtype": "bfloat16"}
    network = functional.network_config(experiment.network, text_width=4096, **sizes)
    router = functional.router_config(experiment.router, clusters=flags.experts, **sizes)
    sharding = SingleDeviceSharding(device)
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)  # noqa: E731
    B = flags.batch
    text = conditioning.EncodedText(array(B, 512, 4096), array(B, dtype=jnp.int32), array(B, 768))
    condition = conditioning.Condition(
        text, text, Strength(array()), router_temperature=array(), present=array(flags.experts, dtype=jnp.bool_)
    )
    routers = jax.tree.map(lambda a: array(*a.shape, dtype=a.dtype), functional.abstract(router))
    capacity = timesteps.capacity(STEPS)
    places = tuple((0, k) for k in range(flags.experts))
    rows = 2 * B  # conditional and unconditional; one pass takes all of them
    size = f"{flags.experts} x {functional.count(network) / 1e9:.2f}B, latent {(T, H, W, C)}"
    print(f"{size}, batch {B}, {flags.chip}")
    for way in flags.ways.split(","):
        weights, _, offload = way.partition("+")
        block = sparse_velocity.block_size(
            video_tokens((T, H, W, C)), rows, rows / flags.experts, 2, "tpu", streamed=bool(offload)
        )
        plan = sparse_velocity.SamplerConfig(
            (network,), places, router, Routing("top_k", 1), guidance="classifier_free", expert_batch_size=block
        )
        experts = abstract(network, flags.experts, weights, bool(offload), device)
        arrays = sparse_velocity.EnsembleParams((experts,), routers, array(flags.experts, dtype=jnp.int32))
        start = time.perf_counter()
        state = jax.tree.map(
            lambda a: array(*a.shape, dtype=a.dtype),
            jax.eval_shape(
                functools.partial(sparse_velocity.initial_state, plan, steps=capacity), array(B, T, H, W, C)
            ),
        )
        span, keys = [array(dtype=jnp.int32)] * 2, array(B, 2, dtype=jnp.uint32)
        try:
            with jax.set_mesh(mesh):
                lowered = sparse_velocity.take_steps.lower(
                    plan, arrays, state, *span, keys, array(capacity + 1), condition, array(capacity, dtype=jnp.int32)
                )
            compiled = lowered.compile(compiler_options=target.compiler_options)
            memory, report = compiled.memory_analysis(), program.read(compiled.as_text() or "")
        except jax.errors.JaxRuntimeError as error:
            print(f"{way:14s} does not fit: {' '.join(str(error).split())[:1500]}", flush=True)
            continue
        chip = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        host = memory.host_argument_size_in_bytes
        seconds = time.perf_counter() - start
        print(f"{way:14s} chip {chip / GIB:6.1f} GiB (temporary {memory.temp_size_in_bytes / GIB:.2f}), "
              f"host {host / GIB:6.1f} GiB; flash attention {report.flash or 'none'}; compiled in {seconds:.0f} s",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
