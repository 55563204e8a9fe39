"""TPU topologies that are not attached: their devices by name, and the memory of a step compiled for them."""

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
# libtpu looks for the TPU host it runs on, and complains aloud where there is none; what it compiles for is the target.
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
    """A named slice: "v5p:2x2x4" is 16 chips, "cpu:8" eight simulated devices."""

    generation: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, target: str) -> "Topology":
        generation, _, shape = target.partition(":")
        flat = 3 if generation in ("v4", "v5p") else 1 if generation == "cpu" else 2
        sizes = [int(n) for n in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
        if generation not in (*GENERATIONS, "cpu") or len(sizes) != flat:
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
        """Descriptions of its devices, that programs can be compiled for; to be called before JAX has any device."""
        jax.config.update("jax_platforms", "cpu")
        if self.generation == "cpu":
            jax.config.update("jax_num_cpu_devices", self.size)
            return jax.devices()
        from jax.experimental import topologies

        jax.config.update("jax_enable_compilation_cache", False)  # programs of absent devices cannot be read back
        os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
        # The two cores of a chip work as one device, as they do by default on these slices.
        how = {"chip_config_name": "megacore"} if self.generation == "v4" else {}
        try:
            found = topologies.get_topology_desc(platform="tpu", topology_name=str(self), **how)
        except Exception as error:  # libtpu is missing, or does not know the topology
            reason = first_line(error)[:200]
            raise UserError(
                f"--target={self} cannot be described here ({reason}); install libtpu with pip install -e '.[tpu]', "
                "and choose a shape that the makers offer"
            ) from error
        return list(found.devices)


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
    """Compiles a job's real step for the devices of its mesh and reads off what it needs."""
    chip = flops.chip_of(program.mesh.devices.flat[0])
    memory = chip.memory if chip else None
    lowered = program.lower()
    try:
        compiled = interruptible("compiling", lowered.compile, lambda: None)  # Ctrl-C is heard meanwhile
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
