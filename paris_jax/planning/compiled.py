"""Compiles training steps for devices that are not attached: their memory and operations."""

import dataclasses
import logging
import re
import time
from pathlib import Path
from typing import Any

import jax

from paris_jax.models import attention, flops
from paris_jax.models.dit import video_tokens
from paris_jax.models.flops import Chip, chip_named
from paris_jax.models.router import RouterConfig
from paris_jax.planning import program
from paris_jax.planning.gpu_targets import GPUS
from paris_jax.planning.topologies import Topology
from paris_jax.training.distributed import interruptible
from paris_jax.training.job import Job
from paris_jax.training.step import ShardedStep

logger = logging.getLogger(__name__)
GPU_MEMORY_FRACTION = 0.92  # of a GPU's memory, which launch/device_flags.sh gives to JAX


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


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job compiled for a topology.

    Attributes:
      report: of the compiled program; None where the compiler gave up for lack of memory.
      seconds: that it took to compile.
    """

    job: Job
    slice: Topology
    footprint: Footprint
    report: program.Report | None
    seconds: float

    @property
    def flops(self) -> float:
        """FLOPs of one training step on all devices, without recomputation."""
        return self.job.flops_per_sample * self.job.settings.global_batch_size

    def roofline(self, chip: Chip) -> float:
        """Seconds of a step at the chips' peak: of its products by dtype, or of reading and writing the state."""
        traffic = 2 * self.footprint.arguments / chip.bandwidth
        if self.report is None:
            return max(traffic, self.flops / (chip.peak * self.slice.size))
        float32 = self.report.flops.get("f32", 0.0)
        narrow = sum(self.report.flops.values()) - float32 + self._flash_flops()
        return max(traffic, narrow / chip.peak + float32 / chip.peak32)

    def _flash_flops(self) -> float:
        """FLOPs of flash attention on one device: a backward pass takes those of two forward passes."""
        assert self.report
        flash, config, job = self.report.flash, self.job.config, self.job
        if not flash:
            return 0.0
        blocks = config.blocks if isinstance(config, RouterConfig) else config.double_blocks + config.single_blocks
        # On TPUs all kernels have one name: one of each block's is the forward pass of training.
        runs = flash.get("forward", blocks * job.settings.grad_accum_steps)
        repeated = runs / (blocks * job.settings.grad_accum_steps)
        samples = job.settings.global_batch_size / self.slice.size
        return samples * (repeated + 2) * blocks * flops.attention_flops(config, job.latent_shape, job.text_length)


def memory_of(target: Topology) -> float | None:
    """Bytes of memory that a job may use on each device; None where they are unknown."""
    if target.generation in GPUS:
        return GPU_MEMORY_FRACTION * GPUS[target.generation].memory
    chip = chip_named(target.generation)
    return chip.memory if chip else None


def attention_kernel(job: Job, target: Topology) -> str:
    """The attention kernel of a job on a target: "cudnn", "pallas" or "xla"."""
    config = job.config
    tokens = video_tokens(job.latent_shape) + (1 if isinstance(config, RouterConfig) else job.padded_text_length)
    return attention.implementation(target.platform, "", config.dtype, config.hidden // config.heads, tokens)


class Compiler:
    """Compiles jobs for topologies, each job once."""

    def __init__(self):
        self._done: dict[Any, Planned] = {}

    def __call__(self, job: Job, target: Topology, devices: list[Any]) -> Planned:
        """The job compiled for `devices`, those of the topology."""
        key = job.config, job.settings, job.masks, str(target)
        if key not in self._done:
            self._done[key] = compile_step(job, target, devices)
        return dataclasses.replace(self._done[key], job=job)


def compile_step(job: Job, target: Topology, devices: list[Any], save: Path | None = None) -> Planned:
    """Compiles a job's training step for the devices of a topology; writes its HLO text to `save`."""
    began, step = time.perf_counter(), ShardedStep(job, devices)
    mesh = " x ".join(f"{name} {n}" for name, n in step.mesh.shape.items() if n > 1) or "one device"
    logger.info("compiling %s for %s (%s, batch %d)", job.name, target, mesh, job.settings.global_batch_size)
    memory, lowered = memory_of(target), step.lower()
    try:
        options = target.compiler_options
        compiled = interruptible("compiling", lambda: lowered.compile(compiler_options=options), lambda: None)
        stats = compiled.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"HLO temporaries \(([\d.]+)([KMGT])\)|Used ([\d.]+)([KMGT]) of", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not needed:
            raise
        arguments, size_and_unit = step.argument_bytes(), [part for part in needed.groups() if part]
        size = float(size_and_unit[0]) * 1024 ** " KMGT".index(size_and_unit[1])
        temporaries = size if needed[1] else max(0.0, size - arguments)
        footprint = Footprint(arguments, temporaries, arguments + temporaries, memory)
        return Planned(job, target, footprint, None, time.perf_counter() - began)
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    footprint = Footprint(arguments, temporaries, max(stats.peak_memory_in_bytes, arguments + temporaries), memory)
    seconds, hlo = time.perf_counter() - began, compiled.as_text()
    if save:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.write_text(hlo)
    return Planned(job, target, footprint, program.read(hlo), seconds)
