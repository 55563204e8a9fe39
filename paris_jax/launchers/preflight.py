"""Preflight: checks before a job's work: devices, folder, disk, versions and clock.

A job that would train on the CPU in silence, or whose hosts run different code, costs hours before somebody notices.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from paris_jax.artifacts import safe_files
from paris_jax.errors import UserError

KINDS = ("cpu", "gpu", "tpu")
MIN_FREE = 2**30  # bytes
MAX_SKEW = 120.0  # seconds
MAX_MESSAGE = 4096  # bytes of one process's report
PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain", "numpy", "paris-jax")


def parse(expected: str) -> tuple[str, int | None]:
    """Parses `--preflight`: "gpu:8", or a kind without a number."""
    kind, colon, number = expected.partition(":")
    if kind not in KINDS or (colon and not (number.isascii() and number.isdigit() and int(number))):
        raise UserError(
            f"--preflight={expected}: must be cpu, gpu:8 or tpu:16: the devices of all processes of the job"
        )
    return kind, int(number) if colon else None


def preflight(expected: str, output: epath.PathLike, arguments: Sequence[str]) -> None:
    """Checks this process, and that all processes of its job agree.

    Args:
      expected: kind and number of the devices of the whole job, such as "gpu:8".
      output: the folder that the command writes, which is created where it is missing.
      arguments: the command line, which must be the same in all processes but for --process_id.

    Raises:
      UserError: names everything that is wrong, in every process of the job.
    """
    import jax

    _check_devices(expected, jax.default_backend(), jax.device_count())
    index = jax.process_index()
    report = {"problems": list(storage_problems(output, index)), **_versions(arguments)}
    reports = _gather(report)
    clocks = _gather({"time": time.time()})  # after the first exchange, for which all have waited
    problems = [
        *(f"process {k}: {p}" if len(reports) > 1 else p for k, r in enumerate(reports) for p in r["problems"]),
        *disagreements(reports),
        *clock_problems([each["time"] for each in clocks]),
    ]
    if problems:
        raise UserError(f"The preflight failed: {'; '.join(problems)}")


def _check_devices(expected: str, backend: str, found: int) -> None:
    kind, number = parse(expected)
    backend = {"cuda": "gpu", "rocm": "gpu"}.get(backend, backend)
    if backend != kind:
        raise UserError(
            f"--preflight={expected}: JAX found {found} {backend} device(s) instead; look at the driver, install the "
            "extra for the accelerator (./launch/install.sh cuda12, or tpu), or unset JAX_PLATFORMS"
        )
    if number is not None and number != found:
        raise UserError(
            f"--preflight={expected}: JAX found {found} {kind} device(s); start as many processes as the job has hosts "
            "(or GPUs), or correct the number"
        )


def storage_problems(output: epath.PathLike, index: int = 0) -> Iterator[str]:
    """Sentences about a folder that cannot be written, a full disk, and a clock unlike that of the storage."""
    folder, now = epath.Path(output), time.time()
    probe = folder / f".preflight-{index}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text(str(now))
        if probe.read_text() != str(now):
            yield f"{folder} does not return the bytes that were written; look at its mount or bucket"
        # etils looks for the owner's name, which a user of a container need not have.
        made = os.stat(probe).st_mtime if safe_files.is_local(probe) else float(probe.stat().mtime)
        skew = now - made
        probe.unlink()
        if abs(skew) > MAX_SKEW:
            yield f"the clock of this host is {skew:.0f} s apart from that of {folder}; synchronise it (NTP)"
    except Exception as error:  # whatever a file system or a bucket's client raises
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield f"{folder} cannot be written ({said}); give this job the right to write it"
        return
    for place in {tempfile.gettempdir(), *([str(folder)] if safe_files.is_local(folder) else [])}:
        free = shutil.disk_usage(place).free
        if free < MIN_FREE:
            yield f"{place} has {free / 2**30:.2f} GiB left and needs {MIN_FREE / 2**30:.0f} GiB; make room"


def _versions(arguments: Sequence[str]) -> dict[str, Any]:
    """Versions of Python and packages, and a hash of the command, which all processes must have in common."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    own = [argument for argument in arguments if not argument.startswith("--process_id")]
    return {"versions": versions, "code": _code_hash(), "command": hashlib.sha256(repr(own).encode()).hexdigest()}


def _code_hash() -> str:
    """Hash of the package's source files: two hosts of one version may still run different code."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def disagreements(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Sentences about versions, code and commands that differ between processes."""
    first = reports[0]
    for k, report in enumerate(reports):
        for name, version in report["versions"].items():
            if version != first["versions"][name]:
                yield f"process {k} has {name} {version}, process 0 has {first['versions'][name]}; install the same"
        if report["code"] != first["code"]:
            yield f"process {k} runs another source of paris_jax than process 0; install the same commit"
        if report["command"] != first["command"]:
            yield f"process {k} was started with another command than process 0; start all with the same flags"


def clock_problems(times: Sequence[float]) -> Iterator[str]:
    """A sentence about clocks of hosts that are apart."""
    if max(times) - min(times) > MAX_SKEW:
        first, last = int(np.argmin(times)), int(np.argmax(times))
        apart = max(times) - min(times)
        yield f"the clocks of processes {first} and {last} are {apart:.0f} s apart; synchronise them (NTP)"


def _gather(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The reports of all processes of this job."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [report]
    text = json.dumps(report).encode()
    if len(text) > MAX_MESSAGE:  # only sentences can be long
        text = json.dumps({**report, "problems": [" ".join(report["problems"])[:1000]]}).encode()
    padded = np.frombuffer(text.ljust(MAX_MESSAGE), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row.tobytes()) for row in gathered]
