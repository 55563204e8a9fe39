"""Accelerators as the schedulers name them: devices, hosts and labels of "v5e:4x4" or "h100:8"."""

import dataclasses
import math
import re

from paris_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generation of TPUs."""

    label: str  # of GKE's nodes
    prefix: str  # of the accelerator type, "v5litepod-16"
    per_chip: int  # unit of the number in the accelerator type: chips, or two cores of each
    runtime: str  # software version of TPU VMs
    speed: float  # peak of a chip in TFLOP/s, bfloat16


TPUS = {
    "v4": Generation("tpu-v4-podslice", "v4", 2, "tpu-ubuntu2204-base", 275),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", 197),
    "v5p": Generation("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", 459),
    "v6e": Generation("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", 918),
}
# GPU: GKE's node label, xpk's device type, and SkyPilot's name.
GPUS = {
    "l4": ("nvidia-l4", "l4", "L4"),
    "a100": ("nvidia-tesla-a100", "a100-40gb", "A100"),
    "a100-80gb": ("nvidia-a100-80gb", "a100-80gb", "A100-80GB"),
    "h100": ("nvidia-h100-80gb", "h100-80gb", "H100"),
    "h200": ("nvidia-h200-141gb", "h200-141gb", "H200"),
    "b200": ("nvidia-b200", "b200", "B200"),
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """The devices of one role: a TPU slice, or `hosts` nodes with GPUs."""

    kind: str  # "tpu" or "gpu"
    name: str  # "v5e", "h100"
    per_host: int
    hosts: int
    topology: str = ""  # of a slice: "4x4"

    @property
    def devices(self) -> str:
        """Kind and number of all devices, as --preflight takes them."""
        return f"{self.kind}:{self.per_host * self.hosts}"

    @property
    def tpu_type(self) -> str:
        """The accelerator type of a slice: "v5litepod-16"."""
        generation = TPUS[self.name]
        return f"{generation.prefix}-{self.per_host * self.hosts * generation.per_chip}"


def parse(text: str, nodes: int = 1) -> Accelerator:
    """Parses `--accelerator`: a TPU slice by its topology, or the GPUs of each of `nodes` nodes."""
    name, _, size = text.lower().partition(":")
    if name in GPUS and re.fullmatch(r"[1-9]\d*", size):
        return Accelerator("gpu", name, int(size), nodes)
    dimensions = 3 if name in ("v4", "v5p") else 2
    if name not in TPUS or not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (dimensions - 1), size):
        raise UserError(
            f"--accelerator={text}: must be a TPU slice such as v5e:4x4, v6e:2x4, v5p:2x2x4 or v4:2x2x2, or GPUs of "
            f"{', '.join(GPUS)} with their number per node, such as h100:8"
        )
    if nodes != 1:
        raise UserError(f"--nodes={nodes}: goes with GPUs; a slice such as {text} has as many hosts as its topology")
    chips = math.prod(int(side) for side in size.split("x"))
    one_host = chips <= 4 or (dimensions == 2 and size == "2x4")
    return Accelerator("tpu", name, chips if one_host else 4, 1 if one_host else chips // 4, size)


def parse_type(text: str) -> tuple[Generation, int]:
    """Parses an accelerator type such as "v5p-16": its generation and number of chips."""
    prefix, _, number = text.rpartition("-")
    found = next((each for each in TPUS.values() if each.prefix == prefix), None)
    if found is None or not re.fullmatch(r"[1-9]\d*", number):
        known = ", ".join(each.prefix for each in TPUS.values())
        raise UserError(f"--type={text}: must be an accelerator type of {known}, such as v5litepod-16")
    return found, max(1, int(number) // found.per_chip)
