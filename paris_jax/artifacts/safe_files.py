"""Files that strangers wrote: plain relative names, regular files, bounded sizes; all checked before reading."""

import os
import re
import stat
from pathlib import Path, PurePosixPath

from etils import epath

from paris_jax.errors import UserError

JSON_BYTES = 64 << 20  # the largest JSON file that is read; a vocabulary of a million words takes 12 MB
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,200}(/[A-Za-z0-9_][A-Za-z0-9_.=+-]{0,200}){0,8}")
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def is_plain(name: str) -> bool:
    """Whether a name is a relative path of plain file names: no "..", root, scheme, hidden file or odd character."""
    return bool(_PLAIN.fullmatch(name))


def inside(folder: epath.Path, name: str, within: epath.Path | None = None) -> epath.Path:
    """The path that a file in `folder` names, relative to it.

    Args:
      folder: where the name was read.
      name: a plain relative path below `folder`, or, with `within`, one that leaves `folder` through leading "..".
      within: the folder that the path must not leave; by default `folder`.

    Raises:
      UserError: another kind of name, or a symbolic link below the folder that must not be left.
    """
    root, steps = within or folder, PurePosixPath(name).parts
    ups = next((i for i, step in enumerate(steps) if step != ".."), len(steps))
    start = folder
    for _ in range(ups if within else 0):
        start = start.parent
    rest = "/".join(steps[ups:]) if within else name
    if not is_plain(rest) or (start != root and root not in start.parents):
        raise UserError(
            f"{folder} names {name[:100]!r}: must be a plain relative path below {root}; get the folder again from "
            "its origin, or make it again"
        )
    path = start
    for step in PurePosixPath(rest).parts:
        path = path / step
        if is_local(path) and os.path.islink(path) and not _is_hub_blob(path):
            raise UserError(
                f"{path} is a symbolic link, which could lead anywhere; copy {folder} with its links resolved (cp -rL)"
            )
    return path


def check_regular(path: epath.Path, limit: int | None = None, follow_links: bool = False) -> int:
    """The size of a file in bytes; on a bucket, as its listing has it.

    Raises:
      UserError: a link, folder, pipe or device, or a file of more than `limit` bytes.
      FileNotFoundError: no file.
    """
    if is_local(path):
        found = os.stat(path, follow_symlinks=follow_links or _is_hub_blob(path))
        if not stat.S_ISREG(found.st_mode):
            kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "a device")
            advice = "; copy its folder with links resolved (cp -rL)" if stat.S_ISLNK(found.st_mode) else ""
            raise UserError(f"{path} is {kind}; must be a regular file{advice}")
        size = found.st_size
    else:
        size = path.stat().length
    if limit is not None and size > limit:
        raise UserError(f"{path} has more than the {limit:,} bytes that such a file may have; get it again")
    return size


def _is_hub_blob(path: epath.PathLike) -> bool:
    """Whether a path is a link of a Hugging Face hub cache, snapshots/REVISION/NAME -> blobs/HASH of one repository."""
    path = Path(path)
    snapshots = next((folder for folder in path.parents if folder.name == "snapshots"), None)
    if snapshots is None or not path.is_symlink():
        return False
    target = Path(os.path.normpath(path.parent / os.readlink(path)))
    return target.parent == snapshots.parent / "blobs" and not target.is_symlink()


def read_bytes(path: epath.PathLike, limit: int = JSON_BYTES, follow_links: bool = False) -> bytes:
    """The contents of a regular file of at most `limit` bytes; links are followed only in folders that users name.

    Raises:
      UserError: another kind of file, or a larger one, even one that grows while it is read.
    """
    path = epath.Path(path)
    size = check_regular(path, limit, follow_links)
    with path.open("rb") as file:
        data = file.read(size + 1)  # not limit + 1: that much would be allocated
        if len(data) > size:
            data += file.read(limit + 1 - len(data))
    if len(data) > limit:
        raise UserError(f"{path} has more than the {limit:,} bytes that such a file may have; get it again")
    return data


def is_local(path: epath.PathLike) -> bool:
    return "://" not in os.fspath(path)
