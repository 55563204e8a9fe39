"""Locks of outputs: of several commands on one machine, one at a time writes a folder or file."""

import contextlib
import glob
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
from etils import epath

from paris_jax.artifacts import safe_files
from paris_jax.errors import UserError, printable

SUFFIX = ".lock"


@contextlib.contextmanager
def only_writer(output: epath.PathLike, lock: epath.PathLike | None = None, wait: bool = False) -> Iterator[None]:
    """Keeps other commands from writing `output`, a folder or file, until this one ends or dies.

    The system releases the lock of a process that dies. Partial files that such a process left are deleted. Outputs
    that cannot be locked (gs://, read-only folders, some network disks) are not protected: there, whoever starts jobs
    has to keep them apart.

    Args:
      output: the file or folder that is written.
      lock: the lock file, by default `.NAME.lock` beside the output, which is removed in the end.
      wait: wait for another process, instead of raising an error.

    Raises:
      UserError: another process holds the lock; the error names it.
    """
    path, output = Path(lock) if lock else lock_path(output), Path(output)
    if not safe_files.is_local(output):
        yield
        return
    held = filelock.FileLock(path)
    absent = [folder for folder in path.parents if not folder.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(blocking=wait)
    except filelock.Timeout:
        raise UserError(
            f"{output} is being written by {_owner(path)}; wait for it, or stop it with 'kill', and run the same "
            "command again"
        ) from None
    except OSError:  # the command itself reports the folder that cannot be written
        pass
    if not held.is_locked:
        yield
        return
    try:
        with contextlib.suppress(OSError):
            path.write_text(f"process {os.getpid()} (paris-jax {_command()}, since {time.strftime('%H:%M:%S')})")
        delete_partial_files(output)
        yield
    finally:
        try:
            if not lock:
                with contextlib.suppress(OSError):
                    path.unlink()  # while it is held: a waiting process notices, and takes the next one
        finally:
            held.release()
        with contextlib.suppress(OSError):  # a command that failed at once has written nothing
            for folder in absent:
                folder.rmdir()


def lock_path(output: epath.PathLike) -> Path:
    """The lock file of an output."""
    output = Path(output)
    return output.parent / f".{output.name}{SUFFIX}"


def _command() -> str:
    return sys.argv[1] if len(sys.argv) > 1 and sys.argv[1].isalpha() else "from Python"


def _owner(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return printable(path.read_text()[:200]) or "another process"
    return "another process"


def delete_partial_files(output: epath.PathLike) -> None:
    """Deletes files that `manifest.write_atomically` and its like began in an output, and did not finish."""
    if not safe_files.is_local(output):
        return
    output = Path(output)
    inside, beside = ".*.partial", f".{glob.escape(output.name)}.*.partial"
    for partial in [*(output.rglob(inside) if output.is_dir() else output.parent.glob(beside))]:
        with contextlib.suppress(OSError):
            partial.unlink()
