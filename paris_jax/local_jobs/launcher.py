"""Commands as processes of their own, side by side on disjoint devices: nothing is exchanged between them.

A job that is preempted (exit code 75) starts again; one that is refused or dies stops the others, which save.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from paris_jax.local_jobs.devices import Devices

DONE, PREEMPTED = 0, 75
RESTART_PAUSE = 1.0  # seconds
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclasses.dataclass(frozen=True)
class LocalJob:
    """One `paris-jax` command; `log` is the file its output is added to, instead of this terminal."""

    name: str
    arguments: tuple[str, ...]
    log: Path | None = None

    def __str__(self) -> str:
        return shlex.join(("paris-jax", *self.arguments))


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failed job, and its exit code (negative: the signal that killed it)."""

    job: LocalJob
    code: int

    def __str__(self) -> str:
        """The last error of the job, or its exit code."""
        if self.code < 0:
            hint = "; often there is not enough memory" if self.code == -9 else ""
            return f"{self.job.name} was killed by signal {-self.code}{hint}"
        said = last_words(self.job.log).removeprefix("error: ") if self.job.log else ""
        return f"{self.job.name}: {said or f'ended with exit code {self.code}'}"


class Launcher:
    """Starts jobs, restarts preempted ones, and stops all when one fails or on request."""

    def __init__(self, program: Sequence[str], report: Callable[[str], None]):
        """`program` precedes a job's arguments; `report` is called with messages, from any thread."""
        self.program = tuple(program)
        self.report = report
        self.failure: Failure | None = None
        self.stopped_by = 0  # the signal that stopped everything
        self.began: dict[str, float] = {}  # when each job was first started, in seconds of time.perf_counter()
        self.seconds: dict[str, float] = {}  # how long each job took that is done
        self._lock = threading.Lock()
        self._running: dict[subprocess.Popen[bytes], LocalJob] = {}

    @property
    def stopping(self) -> bool:
        return self.failure is not None or self.stopped_by != 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While this is open, signals ask all jobs to save and stop. For the main thread."""

        def heard(number: int, _: object) -> None:
            # In a thread, because the signal may arrive while the main thread holds the lock.
            threading.Thread(target=self.stop, args=(number,)).start()

        previous = {number: signal.signal(number, heard) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self, number: int) -> None:
        """Asks every job to stop, and starts no other."""
        with self._lock:
            first, self.stopped_by = not self.stopping, self.stopped_by or number
            asked = self._stop_all()
        if first and asked:
            self.report(f"stopping; saving first: {', '.join(asked)}")

    def run(self, job: LocalJob, devices: Devices) -> None:
        """Runs a job to its end, restarting it when preempted; sets `failure` or `stopped_by` on failure."""
        while True:
            with self._lock:
                if self.stopping:
                    return
                self.began.setdefault(job.name, time.perf_counter())
                process = self._start(job, devices)
                self._running[process] = job
            code = process.wait()
            with self._lock:
                del self._running[process]
                if code == DONE:
                    self.seconds[job.name] = time.perf_counter() - self.began[job.name]
                    return
                if self.stopping:
                    return
                if code != PREEMPTED:
                    self.failure = Failure(job, code)
                    self._stop_all()
                    return
            self.report(f"{job.name} was preempted; starting it again")
            time.sleep(RESTART_PAUSE)

    def run_side_by_side(
        self, jobs: Sequence[LocalJob], groups: Sequence[Devices], watch: Callable[[], None], every: float = 1.0
    ) -> None:
        """Gives each job, in their order, the first group of devices that is free, and calls `watch` meanwhile."""
        waiting = collections.deque(jobs)

        def work(devices: Devices) -> None:
            devices.pin()
            while waiting and not self.stopping:
                with contextlib.suppress(IndexError):  # another group took the last one
                    self.run(waiting.popleft(), devices)

        with concurrent.futures.ThreadPoolExecutor(len(groups)) as pool:
            workers = [pool.submit(work, devices) for devices in groups]
            try:
                while concurrent.futures.wait(workers, every, concurrent.futures.FIRST_EXCEPTION).not_done:
                    watch()
                    for worker in workers:
                        if worker.done():
                            worker.result()
            except BaseException:
                self.stop(signal.SIGTERM)
                raise
            for worker in workers:
                worker.result()
        watch()

    def _start(self, job: LocalJob, devices: Devices) -> "subprocess.Popen[bytes]":
        own = {"PYTHONUNBUFFERED": "1", "PARIS_JAX_JOIN_HOSTS": "0"}  # every job is one process
        with contextlib.ExitStack() as stack:
            log = None
            if job.log:
                own["COLUMNS"] = "120"  # of the lines in the log
                job.log.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(job.log.open("ab"))
                log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {devices} {job}\n".encode())
                log.flush()
            return subprocess.Popen(
                [*self.program, *job.arguments],
                env={**os.environ, **own, **devices.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                start_new_session=True,  # Ctrl-C reaches this launcher only, which asks the jobs to save and stop
            )

    def _stop_all(self) -> list[str]:
        for process in self._running:
            process.send_signal(signal.SIGTERM)  # a training job saves on it and exits with 75
        return [job.name for job in self._running.values()]


def last_words(log: Path) -> str:
    """The last error in a log or, without one, its last line; "" for an empty log."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 14)))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    said: list[str] = []
    for line in filter(None, lines):
        said = [] if line.startswith("== ") else [*said, line]
    errors = [line for line in said if line.startswith("error: ")]
    return ["", *said, *errors][-1]
