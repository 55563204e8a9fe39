"""What JAX does without listening to anybody: done in a thread of its own, while this one hears signals."""

import threading
from collections.abc import Callable
from typing import Any

LOOK_EVERY = 0.2  # seconds
_AWAY = "paris_jax, not interruptible: "


def result_of(what: str, work: Callable[[], Any], look: Callable[[], None]) -> Any:
    """What `work()` returns or raises; handlers of signals run meanwhile, and `look()` every fifth of a second.

    What these raise leaves the work where it is, in its thread: it goes on until the process ends.
    """
    made: list[Any] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name=_AWAY + what, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_EVERY)
        if thread.is_alive():
            look()
    if failed:
        raise failed[0]
    return made[0]


def somebody_at_work() -> bool:
    """Whether work was left: the end of the process would wait for it, or take its memory from it."""
    return any(thread.name.startswith(_AWAY) for thread in threading.enumerate())
