"""Requests to stop a command: SIGTERM, SIGHUP and Ctrl-C, heard from its first moment and while compiled code runs.

Python runs signal handlers in the main thread, between two of its own instructions. XLA compiles for minutes without
returning to one, so a thread listens, too: the interpreter writes the number of each signal to a pipe as it arrives.

Training replaces the handlers by ones that save first (`training.distributed.StopRequest`), and so does the launcher.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from paris_jax.errors import Preempted

ERROR, PREEMPTED, INTERRUPTED, PIPE_CLOSED = 1, 75, 130, 141  # exit codes
GRACE = 10.0  # seconds for an orderly end after SIGTERM or SIGHUP
TERMINATIONS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
STOP_SIGNALS = [*TERMINATIONS, signal.SIGINT]


def listen() -> None:
    """Starts to listen; for the main thread of a command, as the first thing it does."""
    for number in TERMINATIONS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    sys.unraisablehook = _unraisable
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), daemon=True, name="paris_jax, signals").start()


def stop(*_: Any) -> NoReturn:
    """The handler of a command that has nothing to save: finished work is on disk."""
    raise Preempted("finished work is kept")


def _unraisable(error: Any) -> None:
    """Sends a signal again whose exception was lost: the handler ran inside a callback of the garbage collector."""
    number = {Preempted: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(error.exc_type)
    if number is None:
        sys.__unraisablehook__(error)
        return
    if number == signal.SIGINT:
        _sent_again.append(number)
    threading.Thread(target=_send_again, args=(number, threading.get_ident()), daemon=True).start()


def _send_again(number: int, thread: int) -> None:
    """Sends a signal to this process once a thread has left `_unraisable`, where its exception would be lost again."""
    while True:
        frame = sys._current_frames().get(thread)
        while frame is not None and frame.f_code is not _unraisable.__code__:
            frame = frame.f_back
        if frame is None:
            break
        time.sleep(0.01)
    os.kill(os.getpid(), number)


_sent_again: list[int] = []  # interrupts that the watching thread must not count


def _watch(read: int) -> None:
    """Ends the process at a second Ctrl-C, or where a termination did not end it in time."""
    interrupts = 0
    while True:
        for number in os.read(read, 64):
            if number == signal.SIGINT and _sent_again:
                _sent_again.pop()
            elif number == signal.SIGINT:
                interrupts += 1
                if interrupts > 1:
                    exit_now(INTERRUPTED, "interrupted again; ended at once")
            elif number in TERMINATIONS and signal.getsignal(number) is stop:
                late = threading.Timer(GRACE, exit_now, (PREEMPTED, "preempted; run the same command again"))
                late.daemon = True
                with contextlib.suppress(RuntimeError):  # the process is ending already
                    late.start()


def is_output_closed() -> bool:
    """Whether the reader of this process's output has gone, as `head` does."""
    if not hasattr(select, "poll"):
        return True
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in outputs.poll(0))


def exit_now(code: int, message: str = "") -> NoReturn:
    """Ends this process and its children without waiting for threads, or for compiled code to return."""
    for child in sys.modules["multiprocessing"].active_children() if "multiprocessing" in sys.modules else []:
        child.terminate()
    if message:
        os.write(2, f"{message}\n".encode())
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
