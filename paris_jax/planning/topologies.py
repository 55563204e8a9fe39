"""Devices to compile for that are not attached: TPU slices, NVIDIA GPUs, simulated CPUs."""

import dataclasses
import math
import os
import re
from typing import Any

import jax

from paris_jax.errors import UserError, first_line
from paris_jax.planning.gpu_targets import GPUS, GPUS_PER_HOST, target_config

GENERATIONS = ("v4", "v5e", "v5p", "v6e")
# The flags of launch/device_flags.sh.
TPU_FLAGS = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
GPU_OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Without a GPU nothing is autotuned, and some of Triton's default tilings do not compile.
    "xla_gpu_enable_triton_gemm": False,
}
# libtpu searches for a local TPU host and logs errors without one; the compilation target does not depend on these.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so other programs with libtpu do not matter
    "LIBTPU_INIT_ARGS": " ".join(TPU_FLAGS),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices by name: "v5p:2x2x4" is a TPU slice of 16 chips, "h100:8" a host of GPUs, "cpu:8" simulated devices."""

    generation: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, target: str) -> "Topology":
        """Parses `--target`; raises UserError for an unknown generation or a wrong number of sizes."""
        generation, _, shape = target.partition(":")
        dimensions = 3 if generation in ("v4", "v5p") else 1 if generation in ("cpu", *GPUS) else 2
        sizes = [int(n) for n in shape.split("x")] if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) else []
        if generation not in (*GENERATIONS, *GPUS, "cpu") or len(sizes) != dimensions:
            raise UserError(
                f"--target={target}: must be a TPU slice such as v4:2x2x2, v5p:2x2x4 (three sizes), v5e:4x4, v6e:4x8 "
                f"(two sizes), GPUs such as {', '.join(f'{name}:8' for name in GPUS)}, or cpu:8 (simulated devices)"
            )
        if generation in GPUS and sizes[0] > GPUS_PER_HOST and sizes[0] % GPUS_PER_HOST:
            raise UserError(f"--target={target}: more than {GPUS_PER_HOST} GPUs must be whole hosts of {GPUS_PER_HOST}")
        return cls(generation, tuple(sizes))

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def platform(self) -> str:
        """ "tpu", "gpu" or "cpu"."""
        return "gpu" if self.generation in GPUS else "cpu" if self.generation == "cpu" else "tpu"

    @property
    def compiler_options(self) -> dict[str, Any]:
        return GPU_OPTIONS if self.platform == "gpu" else {}

    def devices(self) -> list[Any]:
        """Descriptions of the devices to compile for; call it before JAX initialises any device."""
        jax.config.update("jax_platforms", "cpu")
        if self.generation == "cpu":
            jax.config.update("jax_num_cpu_devices", self.size)
            return jax.devices()
        jax.config.update("jax_enable_compilation_cache", False)  # programs of absent devices cannot be read back
        return self._gpus() if self.platform == "gpu" else self._chips()

    def _gpus(self) -> list[Any]:
        from jax.experimental import topologies

        hosts = max(1, self.size // GPUS_PER_HOST)
        try:
            description = topologies.get_topology_desc(
                platform="cuda",
                topology_name=str(self),
                target_config=target_config(self.generation),
                topology=f"1x{hosts}x{self.size // hosts}",
            )
        except Exception as error:  # JAX's CUDA plugin is missing
            reason = first_line(error)[:200]
            raise UserError(
                f"--target={self} cannot be compiled for ({reason}); install JAX for CUDA with pip install -e "
                "'.[cuda12]', which needs no GPU and no driver here"
            ) from error
        return list(description.devices)

    def _chips(self) -> list[Any]:
        from jax.experimental import topologies

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
