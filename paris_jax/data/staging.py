"""Local copies of shards in a bucket, which ArrayRecord cannot read in place; the disk they take is bounded.

Copies lie in PARIS_JAX_CACHE (by default paris_jax in the temporary folder), one folder for each data folder. Together
they take at most PARIS_JAX_CACHE_GB, by default 80 % of what the disk had free: folders that no process uses make room,
those that were used longest ago first.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.errors import UserError

CACHE, BOUND = "PARIS_JAX_CACHE", "PARIS_JAX_CACHE_GB"
SHARE = 0.8  # of the free disk, where no bound is set
IN_USE = ".in-use"  # locked by every process that reads a copy
_held: dict[str, IO[bytes]] = {}  # these locks, until this process ends


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE) or os.path.join(tempfile.gettempdir(), "paris_jax"))


def stage(folder: epath.Path, files: Mapping[str, int]) -> list[str]:
    """Copies files of a folder, name -> bytes, to this machine's disk unless they are there; returns their paths.

    The copies belong to the contents of the folder's manifest: a folder that was made again is copied again.

    Raises:
      UserError: the files do not fit into the bound, or the disk is full.
    """
    digest = hashlib.sha256(str(folder).encode() + (folder / manifest.FILE_NAME).read_bytes()).hexdigest()
    cache = cache_folder()
    copy = cache / digest[:16]
    copy.mkdir(parents=True, exist_ok=True)
    _hold(copy)
    missing = {name: size for name, size in files.items() if not (copy / name).exists()}
    if missing:
        _make_room(cache, copy, sum(missing.values()), folder)
    for name in missing:
        partial = copy / f".{name}.{os.getpid()}.partial"  # other jobs on this machine may copy it, too
        try:
            (folder / name).copy(partial, overwrite=True)
            partial.replace(copy / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f"Cannot copy {folder / name} to {copy} ({error.strerror or error}); free some space, or set {CACHE} "
                "to a folder of a larger disk"
            ) from error
    os.utime(copy)
    return [str(copy / name) for name in files]


def _hold(copy: Path) -> None:
    """Keeps other processes from deleting a copy as long as this one lives."""
    if str(copy) not in _held:
        file = open(copy / IN_USE, "wb")  # noqa: SIM115 - open until the process ends
        fcntl.flock(file, fcntl.LOCK_SH)
        _held[str(copy)] = file


def _make_room(cache: Path, own: Path, needed: int, folder: epath.Path) -> None:
    """Deletes copies that nobody uses until `needed` more bytes are within the bound."""
    others = sorted((path for path in cache.iterdir() if path.is_dir() and path != own), key=os.path.getmtime)
    held = {path: _size(path) for path in [*others, own]}
    bound = _bound(cache, sum(held.values()))
    for path in others:
        if sum(held.values()) + needed <= bound:
            return
        if _delete(path):
            held[path] = 0
    if sum(held.values()) + needed > bound:
        raise UserError(
            f"{folder} takes {needed / 1e9:.1f} GB here, and copies in {cache} may take {bound / 1e9:.1f} GB, of which "
            f"{sum(held.values()) / 1e9:.1f} are in use; set {CACHE} to a folder of a larger disk or {BOUND} to a "
            "larger bound, or mount the bucket (gcsfuse) and give its path as --workdir"
        )


def _bound(cache: Path, held: int) -> float:
    given = os.environ.get(BOUND)
    if not given:
        return SHARE * (shutil.disk_usage(cache).free + held)
    try:
        return float(given) * 1e9
    except ValueError:
        raise UserError(f"{BOUND}={given}: must be a number of gigabytes") from None


def _size(copy: Path) -> int:
    return sum(path.stat().st_size for path in copy.iterdir())


def _delete(copy: Path) -> bool:
    """Deletes a copy unless a process uses it; returns whether it is gone."""
    try:
        with open(copy / IN_USE, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(copy)
    except OSError:
        return False
    return True
