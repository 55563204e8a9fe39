"""Errors that end a command: a user's mistake (exit code 1) and preemption (exit code 75)."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A user's mistake in one sentence: what, where, what is allowed, what to do."""


class Preempted(Exception):
    """The job was asked to stop, saved its state, and goes on when the same command runs again."""


class DeviceLost(Preempted):
    """A device or another process of the job is gone: what was saved is kept, and nobody may be waited for."""


class DeviceLostAgain(DeviceLost):
    """A device that is lost again and again at one place: to run the same command again would not help."""


def first_line(error: BaseException) -> str:
    """What an error says first; its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the allowed name closest to `name`, or ''."""
    matches = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
