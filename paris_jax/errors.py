"""Errors that end a command: a user's mistake (exit code 1) and preemption (exit code 75)."""

import difflib
import errno
import os
import unicodedata
from collections.abc import Iterable

_MAKE_ROOM = "make room or choose {place}, then run the same command again"
_NOT_ALLOWED = "allow writing there or choose {place}, then run the same command again"
_CANNOT_BE_MADE = "name a folder or file that can be made there"
REMEDIES = {  # of errors of the operating system
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EFBIG: _MAKE_ROOM,
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.EEXIST: _CANNOT_BE_MADE,
    errno.ENOTDIR: _CANNOT_BE_MADE,
    errno.EISDIR: _CANNOT_BE_MADE,
    errno.ENAMETOOLONG: _CANNOT_BE_MADE,
    errno.ELOOP: _CANNOT_BE_MADE,
    errno.EMFILE: "raise the number of open files (ulimit -n), then run the same command again",
    errno.ENFILE: "raise the number of open files of this machine, then run the same command again",
    errno.EIO: "look at the disk, then run the same command again",
    errno.ESTALE: "look at the network disk, then run the same command again",
    errno.ETIMEDOUT: "look at the network, then run the same command again",
}


class UserError(Exception):
    """A user's mistake in one sentence: the fault, its place, the allowed values, the remedy."""


class Preempted(BaseException):
    """A command was asked to stop, saved its state, and resumes when it runs again.

    As KeyboardInterrupt, it is no Exception: handlers of errors must not take it for one.
    """


class DeviceLost(Preempted):
    """A device or another process of the job is gone: saved files are kept, and no process may be waited for."""


class DeviceLostAgain(DeviceLost):
    """A device that is lost again and again at one place: to run the same command again would not help."""


def printable(text: str) -> str:
    """Text with escapes for the control characters of strangers, which could rewrite the screen of a terminal."""
    return "".join(c.encode("unicode_escape").decode() if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    """Whether a character moves the cursor, starts an escape sequence, turns the direction, or cannot be encoded."""
    if character in "\n\t":
        return False
    turns = unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return turns or unicodedata.category(character) in ("Cc", "Cs")


def errno_of(error: BaseException) -> int | None:
    """The number of an error of the operating system, also where a library reports it as text; None for another."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    return next((number for number in REMEDIES if os.strerror(number) in str(error)), None)


def first_line(error: BaseException) -> str:
    """The first line of an error; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the allowed name closest to `name`, or ''."""
    matches = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
