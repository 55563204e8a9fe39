"""Compiles training steps for TPU topologies that are not attached, and reports their memory."""

import dataclasses
import math
import os
import re
from typing import Any

import jax

from paris_jax.errors import UserError, first_line
from paris_jax.models import flops
from paris_jax.training.distributed import interruptible
from paris_jax.training.step import ShardedStep

GENERATIONS = ("v4", "v5e", "v5p", "v6e")
# libtpu searches for a local TPU host and logs errors without one; the compilation target does not depend on these.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so other programs with libtpu do not matter
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A TPU slice by name: "v5p:2x2x4" is 16 chips, "cpu:8" eight simulated devices."""

    generation: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, target: str) -> "Topology":
        """Parses `--target`; raises UserError for an unknown generation or a wrong number of sizes."""
        generation, _, shape = target.partition(":")
        dimensions = 3 if generation in ("v4", "v5p") else 1 if generation == "cpu" else 2
        sizes = [int(n) for n in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
        if generation not in (*GENERATIONS, "cpu") or len(sizes) != dimensions:
            raise UserError(
                f"--target={target}: must be a TPU slice such as v4:2x2x2, v5p:2x2x4 (three sizes), v5e:4x4, v6e:4x8 "
                "(two sizes), or cpu:8 (simulated devices)"
            )
        return cls(generation, tuple(sizes))

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def devices(self) -> list[Any]:
        """Returns descriptions of the slice's devices to compile for; call it before JAX initialises any device."""
        jax.config.update("jax_platforms", "cpu")
        if self.generation == "cpu":
            jax.config.update("jax_num_cpu_devices", self.size)
            return jax.devices()
        from jax.experimental import topologies

        jax.config.update("jax_enable_compilation_cache", False)  # programs of absent devices cannot be read back
        os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
        # The two cores of a chip work as one device, as they do by default on these slices.
        options: dict[str, Any] = {"chip_config_name": "megacore"} if self.generation == "v4" else {}
        if 1 in self.shape[:2]:  # part of a host, which has 2 x 2 chips
            options["chips_per_host_bounds"] = [*(min(size, 2) for size in self.shape[:2]), 1]
        try:
            description = topologies.get_topology_desc(platform="tpu", topology_name=str(self), **options)
        except Exception as error:  # libtpu is missing, or does not know the topology
            reason = first_line(error)[:200]
            raise UserError(
                f"--target={self} cannot be compiled for ({reason}); install libtpu with pip install -e '.[tpu]', "
                "and choose a shape that this generation offers"
            ) from error
        return list(description.devices)


@dataclasses.dataclass(frozen=True)
class Footprint:
    """Bytes per device that a compiled step needs, and the memory of the device."""

    arguments: float  # state and batch, resident
    temporaries: float  # activations, gradients, gathered parameters
    peak: float
    memory: float | None

    @property
    def fits(self) -> bool:
        return self.memory is None or self.peak <= self.memory


def compile_step(program: ShardedStep) -> Footprint:
    """Compiles a job's training step for the devices of its mesh and returns its memory footprint."""
    chip = flops.chip_of(program.mesh.devices.flat[0])
    memory = chip.memory if chip else None
    lowered = program.lower()
    try:
        compiled = interruptible("compiling", lowered.compile, lambda: None)  # Ctrl-C works meanwhile
        stats = compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        arguments, size_and_unit = program.argument_bytes(), [part for part in needed.groups() if part]
        size = float(size_and_unit[0]) * 1024 ** " KMGT".index(size_and_unit[1])
        temporaries = size if needed[1] else max(0.0, size - arguments)
        return Footprint(arguments, temporaries, arguments + temporaries, memory)
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    return Footprint(arguments, temporaries, max(stats.peak_memory_in_bytes, arguments + temporaries), memory)
