"""Errors that end a command: a user's mistake (exit code 1) and preemption (exit code 75)."""

import difflib
import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake in one sentence: what, where, what is allowed, what to do."""


class Preempted(BaseException):
    """A command was asked to stop, saved its state, and resumes when it runs again.

    As KeyboardInterrupt, it is no Exception: handlers of errors must not take it for one.
    """


class DeviceLost(Preempted):
    """A device or another process of the job is gone: what was saved is kept, and nobody may be waited for."""


class DeviceLostAgain(DeviceLost):
    """A device that is lost again and again at one place: to run the same command again would not help."""


def printable(text: str) -> str:
    """Text with escapes for the control characters of strangers, which could rewrite what a terminal shows."""
    return "".join(c.encode("unicode_escape").decode() if _is_control(c) else c for c in text)


def _is_control(character: str) -> bool:
    """Whether a character moves the cursor, starts an escape sequence, turns the direction, or cannot be encoded."""
    if character in "\n\t":
        return False
    turns = unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return turns or unicodedata.category(character) in ("Cc", "Cs")


def first_line(error: BaseException) -> str:
    """What an error says first; its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the allowed name closest to `name`, or ''."""
    matches = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
