"""Splits the devices of this machine into groups, one for each role that trains at the same time."""

import ctypes
import dataclasses
import glob
import heapq
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

from paris_jax.errors import UserError

KINDS = "auto, cpu, cpu:0,1, gpu:0,1 or tpu:0,1,2,3"
# libtpu's bounds of the chips of one process: x, y, z extents for each number of chips that tiles a host.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}

# n devices train n ** SCALING times as fast as one: assumed, not measured.
SCALING = 0.75


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices to run processes on: "gpu", "tpu" or "cpu" (its cores), by number.

    Without numbers, the whole machine.
    """

    kind: str
    numbers: tuple[str, ...] = ()

    def groups(self, work: Sequence[float], batch: int = 0) -> list["Devices"]:
        """Splits the devices into disjoint groups, at most one for each role, the largest first.

        Cores of a CPU are split evenly. Accelerators are split into groups of 1, 2, 4 or 8, such that the roles, each
        started on the next free group, end earliest: of eight GPUs, the monolith of three experts gets four.

        Args:
          work: relative training costs of the roles, in the order in which they start.
          batch: the size of a group must divide it; 0: any.
        """
        if not self.numbers:
            return [self]
        if self.kind == "cpu":
            size = max(1, len(self.numbers) // max(1, len(work)))
            sizes: Sequence[int] = (size,) * max(1, min(len(work), len(self.numbers) // size))
        else:
            allowed = [s for s in sorted(TPU_BOUNDS, reverse=True) if batch % s == 0]
            # Of splits that end at the same time, the one with the fewest devices, in the most groups.
            splits = [s for s in _splits(len(self.numbers), allowed) if len(s) <= max(1, len(work))]
            sizes = min(splits, key=lambda split: (_makespan(work, split), sum(split), -len(split)))
        ends = list(itertools.accumulate(sizes))
        return [
            dataclasses.replace(self, numbers=self.numbers[end - size : end])
            for size, end in zip(sizes, ends, strict=True)
        ]

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

    @property
    def expectation(self) -> str:
        """The devices as --preflight takes them: "gpu:2"."""
        return f"{self.kind}:{len(self.numbers)}" if self.kind != "cpu" and self.numbers else self.kind

    def pin(self) -> None:
        """Pins the calling thread, and every process that it starts, to these cores."""
        if self.kind == "cpu" and self.numbers:
            os.sched_setaffinity(0, [int(n) for n in self.numbers])

    def __str__(self) -> str:
        """The devices as a shell prefix of a command."""
        variables = [f"{name}={value}" for name, value in self.environment().items()]
        pinned = ["taskset", "-c", ",".join(self.numbers)] if self.kind == "cpu" and self.numbers else []
        return " ".join([*variables, *pinned])


def _splits(devices: int, sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """All descending tuples of `sizes` (descending) whose sum is at most `devices`, but for the empty one."""
    for k, size in enumerate(sizes):
        if size <= devices:
            yield (size,)
            yield from ((size, *rest) for rest in _splits(devices - size, sizes[k:]))


def _makespan(work: Sequence[float], sizes: Sequence[int]) -> float:
    """When the last role ends, where each starts on the next free group."""
    free = [(0.0, k) for k in range(len(sizes))]
    ends = [0.0]
    for each in work:
        at, group = heapq.heappop(free)
        ends.append(at + each / sizes[group] ** SCALING)
        heapq.heappush(free, (ends[-1], group))
    return max(ends)


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
