"""Splits the devices of this machine into groups, one for each role that trains at the same time."""

import ctypes
import dataclasses
import glob
import os
import shutil
import subprocess

from paris_jax.errors import UserError

KINDS = "auto, cpu, cpu:0,1, gpu:0,1 or tpu:0,1,2,3"
# libtpu's bounds of the chips of one process: x, y, z extents for each number of chips that tiles a host.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices to run processes on: "gpu", "tpu" or "cpu" (its cores), by number.

    Without numbers, the whole machine.
    """

    kind: str
    numbers: tuple[str, ...] = ()

    def groups(self, num_roles: int) -> list["Devices"]:
        """Splits the devices into disjoint groups of equal size, at most one for each role."""
        if not self.numbers:
            return [self]
        size = max(1, len(self.numbers) // max(1, num_roles))
        if self.kind != "cpu":  # a power of two, so that it divides a batch
            size = max(s for s in TPU_BOUNDS if s <= size)
        count = max(1, min(num_roles, len(self.numbers) // size))
        return [dataclasses.replace(self, numbers=self.numbers[i * size : (i + 1) * size]) for i in range(count)]

    def environment(self) -> dict[str, str]:
        """Environment variables that restrict a process to these devices."""
        if self.kind == "gpu":
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.numbers)}
        if self.kind == "tpu":
            return {
                "TPU_VISIBLE_CHIPS": ",".join(self.numbers),
                "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(self.numbers)],
                "TPU_PROCESS_BOUNDS": "1,1,1",
            }
        return {"JAX_PLATFORMS": "cpu"}

    def pin(self) -> None:
        """Pins the calling thread, and every process that it starts, to these cores."""
        if self.kind == "cpu" and self.numbers:
            os.sched_setaffinity(0, [int(n) for n in self.numbers])

    def __str__(self) -> str:
        """The devices as a shell prefix of a command."""
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        pinned = ["taskset", "-c", ",".join(self.numbers)] if self.kind == "cpu" and self.numbers else []
        return " ".join([*variables, *pinned])


# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Makes this process reuse freed memory instead of returning it to the system; needs glibc, else does nothing.

    On a CPU, XLA allocates a step's temporary memory anew at every step. Pages that were returned to the system are
    faulted in and cleared each time, which took a third of a training step of the shapes network.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(option, value)


def find_devices(requested: str) -> Devices:
    """Parses `--devices`: "auto" is all accelerators or, without any, the cores of the CPU.

    Raises:
      UserError: the value is malformed, or names cores that this process may not use.
    """
    kind, _, listed = requested.partition(":")
    numbers = tuple(listed.split(","))
    if kind in ("cpu", "gpu", "tpu") and listed:
        if not all(n.isdigit() for n in numbers) or len(set(numbers)) < len(numbers):
            raise UserError(f"--devices={requested}: must name different devices by number, as in {kind}:0,1")
        if kind == "cpu" and not set(numbers) <= set(_cores()):
            raise UserError(
                f"--devices={requested}: the cores that may be used here are {','.join(_cores()) or 'unknown'}"
            )
        return Devices(kind, numbers)
    if requested not in ("auto", "cpu"):
        raise UserError(f"--devices={requested}: must be {KINDS}")
    platforms = os.environ.get("JAX_PLATFORMS", "") if requested == "auto" else "cpu"
    if not platforms.startswith("cpu"):
        if gpus := _gpus():
            return Devices("gpu", gpus)
        if chips := _tpus():
            return Devices("tpu", chips)
    return Devices("cpu", _cores())


def _cores() -> tuple[str, ...]:
    """Returns the cores that this process may use; empty on systems without CPU affinity (all but Linux)."""
    return tuple(map(str, sorted(os.sched_getaffinity(0)))) if hasattr(os, "sched_getaffinity") else ()


def _gpus() -> tuple[str, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        count = sum(line.startswith("GPU ") for line in listing.splitlines())
    else:
        count = len(glob.glob("/dev/nvidia[0-9]*"))
    if count and visible is not None:
        return tuple(n.strip() for n in visible.split(",") if n.strip())
    return tuple(map(str, range(count)))


def _tpus() -> tuple[str, ...]:
    chips = glob.glob("/dev/accel[0-9]*") or (
        glob.glob("/dev/vfio/[0-9]*") if os.environ.get("TPU_ACCELERATOR_TYPE") else []
    )
    return tuple(map(str, range(len(chips))))
