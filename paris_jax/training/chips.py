"""Accelerators: what one device can compute, hold and move, from the makers' data sheets."""

import dataclasses
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them: a whole chip on all of these."""

    name: str  # as in names of slices: "v5p"
    kind: str  # what `device_kind` begins with
    peak: float  # dense bfloat16, FLOP/s
    memory: float  # bytes
    bandwidth: float  # of that memory, bytes/s


CHIPS = (
    Chip("v4", "TPU v4", 275e12, 32 * GIB, 1.228e12),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 0.819e12),
    Chip("v5p", "TPU v5p", 459e12, 95 * GIB, 2.765e12),
    Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2.765e12),
    Chip("v6e", "TPU v6 lite", 918e12, 32 * GIB, 1.64e12),
    Chip("h200", "NVIDIA H200", 989e12, 141e9, 4.8e12),
    Chip("h100", "NVIDIA H100", 989e12, 80e9, 3.35e12),
    Chip("a100", "NVIDIA A100", 312e12, 80e9, 2.0e12),
    Chip("l4", "NVIDIA L4", 121e12, 24e9, 0.3e12),
)


def of(device: Any) -> Chip | None:
    """The chip a device is, or None for one that is not listed (CPUs)."""
    matches = [chip for chip in CHIPS if device.device_kind.startswith(chip.kind)]
    return max(matches, key=lambda chip: len(chip.kind), default=None)


def named(name: str) -> Chip | None:
    return next((chip for chip in CHIPS if chip.name == name), None)
