#!/usr/bin/env python3
"""Runs every stage of one experiment on this server: the roles side by side on disjoint devices, or in turn.

    .venv/bin/python launch/local.py --config=configs/shapes.py:small --workdir=runs/shapes --experts=3 [--dry_run]

More flags `--config.a.b=value` go to every command that reads the config. A role that is preempted (exit code 75)
starts again; one that is refused or dies stops the others, which save and go on when this command runs again.
Needs only the standard library.
"""

import argparse
import collections
import dataclasses
import glob
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

DONE, REFUSED, PREEMPTED = 0, 1, 75
RESTART_PAUSE = 1.0  # seconds

# How libtpu names the chips of one process: x, y, z extents for each count that tiles a host.
TPU_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in self.environment.items()), shlex.join(self.command)])


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices this launcher may give out: kind "gpu", "tpu" or "cpu" and their numbers."""

    kind: str
    numbers: tuple[str, ...] = ()

    def groups(self, num_roles: int) -> list["Devices"]:
        """Disjoint groups, at most one for each role; of one size, a power of two, so that it divides a batch."""
        if self.kind == "cpu" or not self.numbers:
            return [self]
        size = 1
        while size * 2 * num_roles <= len(self.numbers) and size < max(TPU_BOUNDS):
            size *= 2
        count = min(num_roles, len(self.numbers) // size)
        return [dataclasses.replace(self, numbers=self.numbers[i * size : (i + 1) * size]) for i in range(count)]

    def environment(self) -> dict[str, str]:
        """What makes a process see these devices only."""
        if self.kind == "gpu":
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.numbers)}
        if self.kind == "tpu":
            return {
                "TPU_VISIBLE_CHIPS": ",".join(self.numbers),
                "TPU_CHIPS_PER_PROCESS_BOUNDS": TPU_BOUNDS[len(self.numbers)],
                "TPU_PROCESS_BOUNDS": "1,1,1",
            }
        return {}


def find_devices(asked: str) -> Devices:
    """Reads `--devices`: "auto", "cpu", "gpu:0,1" or "tpu:0,1,2,3"."""
    kind, _, numbers = asked.partition(":")
    if kind in ("gpu", "tpu") and numbers:
        chosen = tuple(numbers.split(","))
        if not all(n.isdigit() for n in chosen) or len(set(chosen)) < len(chosen):
            refuse(f"--devices={asked}: must name different devices by number, as in {kind}:0,1")
        return Devices(kind, chosen)
    if asked == "cpu":
        return Devices("cpu")
    if asked != "auto":
        refuse(f"--devices={asked}: must be auto, cpu, gpu:0,1 or tpu:0,1,2,3")
    if shutil.which("nvidia-smi"):
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = sum(line.startswith("GPU ") for line in listing.splitlines())
        numbers = [n for n in visible.split(",") if n] if visible is not None else [str(i) for i in range(count)]
        if count and numbers:
            return Devices("gpu", tuple(numbers))
    chips = glob.glob("/dev/accel[0-9]*") or (
        glob.glob("/dev/vfio/[0-9]*") if os.environ.get("TPU_ACCELERATOR_TYPE") else []
    )
    return Devices("tpu", tuple(str(i) for i in range(len(chips)))) if chips else Devices("cpu")


def plan(
    arguments: argparse.Namespace, overrides: Sequence[str], program: str
) -> tuple[list[Job], list[Job], list[Job]]:
    """Returns the jobs before the roles, one job for each role, and the jobs after them."""
    workdir = f"--workdir={arguments.workdir}"
    config = (f"--config={arguments.config}", *overrides, workdir)
    roles = [(f"expert {k}", ("--role=expert", f"--cluster={k}")) for k in range(arguments.experts)]
    roles += [("router", ("--role=router",)), ("monolith", ("--role=monolith",))]
    return (
        [Job(stage, (program, stage, *config)) for stage in ("prepare", "cluster")],
        [Job(name, (program, "train", *config, *flags)) for name, flags in roles],
        [Job("assemble", (program, "assemble", workdir)), Job("evaluate", (program, "evaluate", *config))],
    )


def in_order(roles: Sequence[Job], groups: Sequence[Devices]) -> list[Job]:
    """Side by side, the monolith (last) goes first: it takes as many steps as all experts together."""
    return [roles[-1], *roles[:-1]] if len(groups) > 1 else list(roles)


class Launcher:
    """Starts jobs, starts the preempted ones again, and stops all when one fails or when it is told to stop itself."""

    def __init__(self, report: Callable[[str], None]):
        self.report = report
        self.lock = threading.Lock()
        self.running: set[subprocess.Popen] = set()
        self.code = DONE  # of the launcher; the first job that ends badly decides it

    def stop(self, code: int) -> None:
        with self.lock:
            self.code = self.code or code
            for process in self.running:
                process.send_signal(signal.SIGTERM)  # a training job saves on it and exits with 75

    def run(self, job: Job, prefixed: bool) -> None:
        while True:
            with self.lock:
                if self.code:
                    return
                self.report(f"{job.name}: {job}")
                process = subprocess.Popen(
                    job.command,
                    env={**os.environ, "PYTHONUNBUFFERED": "1", **job.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if prefixed else None,
                    stderr=subprocess.STDOUT if prefixed else None,
                    text=True,
                    errors="replace",
                    start_new_session=True,  # Ctrl-C reaches this launcher only, which asks the jobs to save and stop
                )
                self.running.add(process)
            for line in process.stdout or ():
                print(f"[{job.name}] {line}", end="", flush=True)
            code = process.wait()
            with self.lock:
                self.running.discard(process)
                if self.code or code == DONE:
                    return
            if code != PREEMPTED:
                self.report(f"{job.name} ended with exit code {code}; stopping. Mend it, then run this command again")
                return self.stop(REFUSED)
            self.report(f"{job.name} was preempted; starting it again")
            time.sleep(RESTART_PAUSE)

    def run_roles(self, roles: Sequence[Job], groups: Sequence[Devices]) -> None:
        """Gives each role the first group of devices that is free."""
        waiting = collections.deque(in_order(roles, groups))

        def work(devices: Devices) -> None:
            while True:
                with self.lock:
                    if not waiting:
                        return
                    job = waiting.popleft()
                self.run(dataclasses.replace(job, environment=devices.environment()), prefixed=len(groups) > 1)

        threads = [threading.Thread(target=work, args=(devices,)) for devices in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def refuse(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(REFUSED)


def find_program() -> str:
    """paris-jax of the environment whose Python runs this file, or else the one on PATH."""
    beside = Path(sys.executable).parent / "paris-jax"
    return str(beside) if beside.exists() else shutil.which("paris-jax") or ""


def read_flags(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config file, with its variant: configs/shapes.py:small")
    parser.add_argument("--workdir", required=True, help="run folder")
    parser.add_argument("--experts", type=int, required=True, help="partition.num_clusters of the config")
    parser.add_argument("--devices", default="auto", help="auto, cpu, gpu:0,1 or tpu:0,1,2,3 (default: all there are)")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and the devices, run nothing")
    arguments, rest = parser.parse_known_args(argv)
    unknown = [flag for flag in rest if not (flag.startswith("--config.") and "=" in flag)]
    if unknown:
        refuse(f"{unknown[0]} is unknown; see launch/local.py --help")
    if arguments.experts < 1:
        refuse(f"--experts={arguments.experts}: must be at least 1")
    return arguments, rest


def main(argv: Sequence[str] | None = None) -> int:
    arguments, overrides = read_flags(argv)
    program = "paris-jax" if arguments.dry_run else find_program()
    if not program:
        refuse("paris-jax is not installed here; run ./launch/quickstart.sh once, or activate its environment")
    devices = find_devices(arguments.devices)
    before, roles, after = plan(arguments, overrides, program)
    groups = devices.groups(len(roles))
    if arguments.dry_run:
        order = in_order(roles, groups)
        placed = [dataclasses.replace(j, environment=g.environment()) for j, g in zip(order, groups, strict=False)]
        print(*before, "", f"# {len(groups)} at a time:", *placed, sep="\n")
        if waiting := order[len(groups) :]:
            print("# then, on the devices of the first that is done:", *waiting, sep="\n")
        print("", *after, sep="\n")
        return DONE

    launcher = Launcher(report=lambda line: print(f"== {line}", file=sys.stderr, flush=True))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # In a thread, because the signal may arrive while the main thread holds the lock.
        signal.signal(number, lambda *_: threading.Thread(target=launcher.stop, args=(PREEMPTED,)).start())
    for job in before:
        launcher.run(job, prefixed=False)
    launcher.run_roles(roles, groups)
    for job in after:
        launcher.run(job, prefixed=False)
    return launcher.code


if __name__ == "__main__":
    sys.exit(main())
