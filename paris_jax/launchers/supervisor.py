"""Runs one command of a job and decides, once it has ended, whether it has to run again.

    python -m paris_jax.launchers.supervisor exit|loop|slurm [PREFIX ... --] train --workdir=... --role=...

`loop` runs the command again here, `slurm` puts the job back into its queue, `exit` leaves it to the scheduler:
exit code 75 means again, every other code does not. PREFIX is a program that starts the command, such as srun with its
flags.

A command is run again after a preemption (75), and after one of its processes was lost (killed by 6, 9 or 15), which
leaves a checkpoint. It is not run again where the host ran out of memory, where it was lost within its first minutes,
or where it was lost three times without a new checkpoint in between: the same would happen again.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.errors import UserError
from paris_jax.interrupts import ERROR, PREEMPTED

LOST = (128 + signal.SIGABRT, 128 + signal.SIGKILL, 128 + signal.SIGTERM)  # exit codes of a shell
LOST_AFTER = "PARIS_JAX_LOST_AFTER"  # seconds; a command that is lost earlier would be lost again
MAX_LOSSES = 3  # without a new checkpoint in between
PAUSE = 5.0  # seconds before a command runs again
PROGRAM = (sys.executable, "-m", "paris_jax")
KILLS = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")  # files with the number of processes killed for memory


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The exit code of a command as seen by a shell, its run time in seconds, and whether memory ran out meanwhile."""

    code: int
    seconds: float
    out_of_memory: bool = False


def is_again(outcome: Outcome, role: Any | None) -> bool:
    """Whether a command that ended so has to run again.

    Args:
      role: the folder of the role that was trained; None for other commands, which are not repeated after a loss.

    Raises:
      UserError: it was lost and must not be repeated; the message says why.
    """
    if outcome.code == PREEMPTED:
        return True
    if outcome.code not in LOST:
        return False
    if outcome.out_of_memory:
        raise UserError(
            "The host ran out of memory and the system killed the command, which would happen again; give the job more "
            "host memory, or lower training.global_batch_size, data workers or the number of roles on this host"
        )
    earliest = float(os.environ.get(LOST_AFTER, "300"))
    if role is None or outcome.seconds < earliest:
        return False
    times = _count_losses(role)
    if times >= MAX_LOSSES:
        raise UserError(
            f"{role} was lost {times} times without a new checkpoint in between; look at the logs of all its hosts, or "
            "save more often (training.checkpoint_every_steps), then run the same command again"
        )
    return True


def _count_losses(role: Any) -> int:
    """Losses since the newest checkpoint, this one included; the count is kept in the role's folder."""
    path, checkpoints = role / "lost_processes.json", role / "checkpoints"
    steps = [int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()] if checkpoints.exists() else []
    newest, times = max(steps, default=-1), 1
    with contextlib.suppress(UserError, KeyError):  # a damaged count starts again
        before = manifest.read_json(path, dict[str, int]) if path.exists() else {}
        times += before["times"] if before and before["step"] == newest else 0
    if times >= MAX_LOSSES:
        path.unlink(missing_ok=True)  # the next start counts from zero
    else:
        role.mkdir(parents=True, exist_ok=True)
        manifest.write_json(path, {"step": newest, "times": times})
    return times


def count_memory_kills(files: Sequence[str] = KILLS) -> int:
    """Processes of this container, or of this host, that were killed for lack of memory; 0 where nobody counts."""
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in Path(file).read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return 0


def role_folder(command: Sequence[str]) -> Any | None:
    """The folder of the role that a command trains; None for other commands."""
    flags = dict(argument[2:].split("=", 1) for argument in command if argument.startswith("--") and "=" in argument)
    if command[0] != "train" or not {"workdir", "role"} <= flags.keys():
        return None
    cluster = int(flags["cluster"]) if "cluster" in flags else None
    return RunFolder(flags["workdir"]).role(Role(flags["role"], cluster))


class Supervisor:
    """Runs a command and passes SIGTERM, SIGHUP and SIGINT on to it; after one of these, it is not run again."""

    def __init__(self, command: Sequence[str]):
        self.command = tuple(command)
        self.stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def _forward(self, number: int, _: object) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(number)

    def run(self) -> Outcome:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, self._forward)
        began, killed = time.monotonic(), count_memory_kills()
        self._process = subprocess.Popen(self.command)
        if self.stopped:  # by a signal that came before there was a process
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        code = 128 - code if code < 0 else code
        return Outcome(code, time.monotonic() - began, count_memory_kills() > killed)


def supervise(
    how: str, command: Sequence[str], prefix: Sequence[str] = (), pause: Callable[[float], None] = time.sleep
) -> int:
    """Runs `command`, again where that helps, and returns its exit code."""
    role, supervisor = role_folder(command), Supervisor([*prefix, *PROGRAM, *command])
    while True:
        outcome = supervisor.run()
        try:
            again = is_again(outcome, role)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return ERROR
        if not again or (how == "loop" and supervisor.stopped):
            return outcome.code
        if how == "loop":
            print(f"{command[0]} ended with {outcome.code}; running it again", flush=True)
            pause(PAUSE)
        elif how == "slurm":
            job = os.environ["SLURM_JOB_ID"]
            print(f"{command[0]} ended with {outcome.code}; job {job} goes back into the queue", flush=True)
            subprocess.run(["scontrol", "requeue", job], check=False)
            return outcome.code
        else:
            return PREEMPTED


def main() -> None:
    how, *rest = sys.argv[1:]
    prefix, command = (rest[: rest.index("--")], rest[rest.index("--") + 1 :]) if "--" in rest else ([], rest)
    try:
        sys.exit(supervise(how, command, prefix))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(ERROR)


if __name__ == "__main__":
    main()
