"""The hosts of one job's slice, joined before the first use of a device."""

import logging
import os
import socket
import time
from collections.abc import Mapping

from paris_jax.errors import Refused

logger = logging.getLogger(__name__)

SWITCH = "PARIS_JAX_JOIN_HOSTS"  # "1": join whatever else is set; "0": never; not set: as `why_join` finds
TIMEOUT = 300  # seconds


def why_join(environment: Mapping[str, str]) -> str:
    """What says that this process is one of several of its job, or "" where nothing does."""
    switch = environment.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise Refused(f"{SWITCH}={switch}: must be 1 (join the other processes), 0 (do not) or not set")
    if switch:
        return f"{SWITCH}=1" if switch == "1" else ""
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        return f"JAX_COORDINATOR_ADDRESS={address}"
    if (tasks := _number(environment, "SLURM_NTASKS") or 1) > 1:
        return f"SLURM_NTASKS={tasks}"
    hosts = [name for name in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if name.strip()]
    return f"TPU_WORKER_HOSTNAMES names {len(hosts)} hosts" if len(hosts) > 1 else ""


def join_hosts(environment: Mapping[str, str] = os.environ, timeout: int = TIMEOUT) -> None:
    """Joins the other processes of this job through jax.distributed where there are several; otherwise does nothing.

    With JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say which one this is;
    on SLURM and Cloud TPU JAX finds all three.

    Args:
      timeout: seconds to wait for the coordinator and the other processes.

    Raises:
      Refused: the coordinator does not answer, or what is set does not say which process this is.
    """
    why = why_join(environment)
    if not why:
        return
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    count, number = (_number(environment, name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    # Where the others do not come in time, JAX ends the process itself, with a stack trace: so this is said before.
    where = address or "the address that JAX finds"
    logger.info("joining the other processes at %s, for up to %d seconds (because of %s)", where, timeout, why)
    if address and number:
        _wait_for(address, timeout)
    import jax

    try:
        jax.distributed.initialize(address, count, number, initialization_timeout=timeout)
    except (RuntimeError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        raise Refused(
            f"The processes of this job cannot be joined at {where} (asked for by {why}): {said}; set "
            f"JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or {SWITCH}=0 to run this process alone"
        ) from error
    logger.info("process %d of %d", jax.process_index(), jax.process_count())


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
