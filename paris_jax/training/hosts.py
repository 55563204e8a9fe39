"""The hosts of one job's slice, joined before the first use of a device."""

import logging
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from paris_jax.errors import Refused
from paris_jax.training import waiting

logger = logging.getLogger(__name__)

SWITCH = "PARIS_JAX_JOIN_HOSTS"  # "1": join whatever else is set; "0": never; not set: as `why_join` finds
TIMEOUT = 300  # seconds
FLAGS = {"coordinator": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
# What is said when another process of the job is gone, and what XLA says of a device that is.
GONE = re.compile(r"Gloo|NCCL|[Bb]arrier|[Hh]eartbeat|^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED)")
LOST = re.compile(r"^(UNAVAILABLE|DATA_LOSS)|CUDA_ERROR(?!_OUT_OF_MEMORY)|device lost|NCCL")


def why_join(environment: Mapping[str, str]) -> str:
    """What says that this process is one of several of its job, or "" where nothing does."""
    switch = environment.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise Refused(f"{SWITCH}={switch}: must be 1 (join the other processes), 0 (do not) or not set")
    if switch:
        return f"{SWITCH}=1" if switch == "1" else ""
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        return f"JAX_COORDINATOR_ADDRESS={address}"
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if (tasks := _number(environment, name) or 1) > 1:
            return f"{name}={tasks}"
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]
    return f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts" if len(hosts) > 1 else ""


def told_by(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment, with what the flags `coordinator`, `num_processes` and `process_id` say put in its place."""
    given = {name: flags[flag] for flag, name in FLAGS.items() if flags[flag] is not None}
    missing = [f"--{flag}" for flag, name in FLAGS.items() if name not in given]
    if given and missing:
        raise Refused(f"{' and '.join(missing)} must be given, too: the three flags together say who is in this job")
    return {**environment, **{name: str(value) for name, value in given.items()}}


def join_hosts(environment: Mapping[str, str] = os.environ, timeout: int = TIMEOUT) -> None:
    """Joins the other processes of this job through jax.distributed where there are several; otherwise does nothing.

    With JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say which one this is;
    on SLURM, Cloud TPU and Open MPI 4 JAX finds all three. Open MPI 5 says all but the address.

    Args:
      environment: of this process, or what stands in for it.
      timeout: seconds to wait for the coordinator, and then for the other processes.

    Raises:
      Refused: the coordinator does not answer, not all processes come to it, or what is set does not say which
        process this is.
    """
    why = why_join(environment)
    if not why:
        return
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    count, number = (_number(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    own_devices = None
    if address and count is None and number is None and environment.get("OMPI_COMM_WORLD_SIZE"):
        ranks = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"
        count, number, own_devices = (_number(environment, name) for name in ranks)  # a process a device
    where = address or "the address that JAX finds"
    logger.info("joining the other processes at %s, for up to %d seconds (because of %s)", where, timeout, why)
    if not address:
        logging.getLogger("jax._src.distributed").setLevel(logging.INFO)  # names it
    if address and number:
        _wait_for(address, timeout)
    import jax

    until = time.monotonic() + timeout

    def join() -> None:  # when its own time is over, JAX ends the process with a stack trace: ours is over before
        jax.distributed.initialize(address, count, number, own_devices, initialization_timeout=timeout + 60)

    def look() -> None:
        if time.monotonic() > until:
            there = address or "the address that JAX found (above)"
            raise Refused(
                f"Not all{f' {count}' if count else ''} processes of this job came to {there} within {timeout} "
                f"seconds; start those that are missing, see that their hosts can reach it, or set {SWITCH}=0 to run "
                "this process alone"
            )

    try:
        waiting.result_of("joining", join, look)
    except (RuntimeError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise Refused(
            f"The processes of this job cannot be joined at {where} (asked for by {why}): {said}; set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or give --coordinator, --num_processes and "
            f"--process_id), or {SWITCH}=0 to run this process alone"
        ) from error
    logger.info("process %d of %d", jax.process_index(), jax.process_count())


def lost(error: BaseException) -> bool:
    """Whether an error says that a device is gone or, in a job of several processes, that one of them is."""
    import jax

    said = str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(said):
        return True
    return jax.process_count() > 1 and getattr(error, "filename", None) is None and bool(GONE.search(said))


def least(value: int) -> int:
    """The smallest value that any process of this job has, which all of them call this to learn."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).min())


def _wait_for(address: str, timeout: int) -> None:
    """Waits until something listens at the coordinator's address."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise Refused(f"JAX_COORDINATOR_ADDRESS={address}: must be host:port of process 0, such as 10.0.0.1:1234")
    until = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=max(1.0, until - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise Refused(
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
        raise Refused(f"{name}={text}: must be a whole number")
    return int(text)
