"""Processes of one job: joining them, agreeing on a step, stopping on SIGTERM, detecting lost devices."""

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from paris_jax.errors import Preempted, UserError
from paris_jax.interrupts import STOP_SIGNALS

logger = logging.getLogger(__name__)
SWITCH = "PARIS_JAX_JOIN_HOSTS"  # "1": always join; "0": never; not set: see `join_reason`
TIMEOUT = 300  # seconds
FLAGS = {"coordinator": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
# Error messages of a lost process of the job, and of a lost device.
GONE = re.compile(r"Gloo|NCCL|[Bb]arrier|[Hh]eartbeat|^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)")
LOST = re.compile(r"^(UNAVAILABLE|DATA_LOSS)|CUDA_ERROR(?!_OUT_OF_MEMORY)|device lost|NCCL")


def join_reason(environment: Mapping[str, str]) -> str:
    """The setting by which this process is one of several of its job, or ""."""
    switch = environment.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise UserError(f"{SWITCH}={switch}: must be 1 (join the other processes), 0 (do not) or not set")
    if switch:
        return f"{SWITCH}=1" if switch == "1" else ""
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        return f"JAX_COORDINATOR_ADDRESS={address}"
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if (tasks := _number(environment, name) or 1) > 1:
            return f"{name}={tasks}"
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]
    return f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts" if len(hosts) > 1 else ""


def with_flags(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment, overridden by the flags `coordinator`, `num_processes` and `process_id`."""
    given = {name: flags[flag] for flag, name in FLAGS.items() if flags[flag] is not None}
    missing = [f"--{flag}" for flag, name in FLAGS.items() if name not in given]
    if given and missing:
        raise UserError(f"{' and '.join(missing)} must be given, too: the three flags go together")
    return {**environment, **{name: str(value) for name, value in given.items()}}


def join_processes(environment: Mapping[str, str] = os.environ, timeout: int = TIMEOUT) -> None:
    """Joins the other processes of this job through jax.distributed where there are several; otherwise does nothing.

    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID identify this process. On
    SLURM, Cloud TPU and Open MPI 4 JAX finds all three; Open MPI 5 sets all but the address.

    Args:
      environment: variables of this process.
      timeout: seconds to wait for the coordinator, and then for the other processes.

    Raises:
      UserError: the coordinator does not answer, not all processes join, or this process cannot be identified.
    """
    why = join_reason(environment)
    if not why:
        return
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    count, number = (_number(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    own_devices = None
    if address and count is None and number is None and environment.get("OMPI_COMM_WORLD_SIZE"):
        ranks = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
        count, number, own_devices = (_number(environment, name) for name in ranks)  # one process per device
    where = address or "the address that JAX finds"
    logger.info("joining the other processes at %s, for up to %d seconds (because of %s)", where, timeout, why)
    if not address:
        logging.getLogger("jax._src.distributed").setLevel(logging.INFO)  # logs the address
    if address and number:
        _wait_for_coordinator(address, timeout)
    import jax

    until = time.monotonic() + timeout

    def join() -> None:  # JAX's own timeout ends the process with a stack trace, so ours comes first
        jax.distributed.initialize(address, count, number, own_devices, initialization_timeout=timeout + 60)

    def check_stop() -> None:
        if time.monotonic() > until:
            there = address or "the address that JAX found (above)"
            raise UserError(
                f"Not all{f' {count}' if count else ''} processes of this job came to {there} within {timeout} "
                f"seconds; start those that are missing, see that their hosts can reach it, or set {SWITCH}=0 to run "
                "this process alone"
            )

    try:
        interruptible("joining", join, check_stop)
    except (RuntimeError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"The processes of this job cannot be joined at {where} (asked for by {why}): {said}; set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or give --coordinator, --num_processes and "
            f"--process_id), or {SWITCH}=0 to run this process alone"
        ) from error
    logger.info("process %d of %d", jax.process_index(), jax.process_count())


def is_device_lost(error: BaseException) -> bool:
    """Whether an error reports the loss of a device or, in a job of several processes, of one of them."""
    import jax

    said = str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(said):
        return True
    return jax.process_count() > 1 and getattr(error, "filename", None) is None and bool(GONE.search(said))


def minimum_over_processes(value: int) -> int:
    """The minimum of a value over all processes of this job; each has to call it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).min())


def _wait_for_coordinator(address: str, timeout: int) -> None:
    """Waits until something listens at the coordinator's address."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: must be host:port of process 0, such as 10.0.0.1:1234")
    until = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(1.0, until - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"The coordinator at {address} did not answer within {timeout} seconds "
                    f"({error.strerror or error}); start process 0 there, see that this host can reach it, or set "
                    f"{SWITCH}=0 to run this process alone"
                ) from error
        time.sleep(min(1.0, timeout / 10))


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    if not text:
        return None
    if not text.isdigit():
        raise UserError(f"{name}={text}: must be a whole number")
    return int(text)


class StopRequest:
    """A request to stop by SIGTERM, SIGHUP or Ctrl-C: finish the step, save, end.

    Processes of one job agree on the step.
    Exit codes are 75, and 130 after Ctrl-C. A second Ctrl-C ends the job at once.
    """

    def __init__(self, name: str):
        """`name` is the job's, for messages."""
        self._name = name
        self._signal = 0  # the first that asked to stop
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            joined = jax.process_count() > 1
            # In joined processes jax.distributed handles SIGTERM from the moment it is initialised.
            for number in STOP_SIGNALS:
                ignored = signal.getsignal(number) is signal.SIG_IGN  # as under nohup
                if not ignored and not (joined and number == signal.SIGTERM):
                    self._previous[number] = signal.signal(number, self._forward if joined else self._ask)
        return self

    def _ask(self, number: int, _: Any) -> None:
        if number == signal.SIGINT == self._signal:
            raise KeyboardInterrupt("interrupted again, without saving; run the same command again to resume")
        if number == signal.SIGINT:
            logger.info("%s stops after this step and saves; Ctrl-C again ends it at once", self._name)
        self._signal = self._signal or number

    def _forward(self, number: int, _: Any) -> None:
        """Processes of one job agree on a step through jax.distributed, which hears SIGTERM only."""
        self._signal = self._signal or number
        os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Whether to stop before update `step`; has to be called at every step."""
        alone = self._signal and jax.process_count() == 1
        return bool(alone) or multihost_utils.reached_preemption_sync_point(step)

    def stopped(self, where: str) -> BaseException:
        """The exception that ends the job: KeyboardInterrupt after Ctrl-C, otherwise `Preempted`."""
        if self._signal == signal.SIGINT:
            return KeyboardInterrupt(f"interrupted: {self._name} {where}; run the same command again to resume")
        return Preempted(f"{self._name} was asked to stop and {where}")

    def wait_for(self, what: str, work: Callable[[], Any]) -> Any:
        """The result of `work()`, which takes long without returning to Python, and changes nothing on disk.

        Raises:
          Preempted, KeyboardInterrupt: a request to stop came meanwhile. The work's thread runs on until the process
            ends. Processes of one job agree on a step once all are ready.
        """

        def check_stop() -> None:
            if self._signal and jax.process_count() == 1:
                raise self.stopped(f"was {what}, with nothing new to save")

        check_stop()
        result = interruptible(what, work, check_stop)
        check_stop()
        return result

    def compiled(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Compiles the step of a job, which takes minutes for a large network; see `wait_for`."""
        began = time.perf_counter()
        logger.info("%s: compiling its step", self._name)
        compiled = self.wait_for("compiling", lowered.compile)
        logger.info("%s: compiled in %.1f s", self._name, time.perf_counter() - began)
        return compiled

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


POLL_SECONDS = 0.2  # seconds
_ABANDONED = "paris_jax, not interruptible: "


def interruptible(what: str, work: Callable[[], Any], check_stop: Callable[[], None]) -> Any:
    """Runs `work()` in a thread, so that signal handlers run meanwhile, and calls `check_stop()` every `POLL_SECONDS`.

    An exception of either abandons the work: its thread runs on until the process ends.
    """
    made: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=_ABANDONED + what, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if thread.is_alive():
            check_stop()
    if failed:
        raise failed[0]
    return made[0]


def has_abandoned_work() -> bool:
    """Whether an abandoned call is still running, for which the end of the process would wait."""
    return any(thread.name.startswith(_ABANDONED) for thread in threading.enumerate())
