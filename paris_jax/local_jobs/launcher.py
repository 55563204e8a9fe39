"""Runs commands as separate processes, in parallel on disjoint devices, without communication between them.

A preempted job (exit code 75) is restarted; if a job fails in any other way, the others save and stop.
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

from paris_jax.interrupts import PREEMPTED, STOP_SIGNALS
from paris_jax.local_jobs.devices import Devices

DONE = 0  # exit code
RESTART_PAUSE = 1.0  # seconds


@dataclasses.dataclass(frozen=True)
class LocalJob:
    """One `paris-jax` command; its output is appended to the file `log`, or goes to this terminal without one."""

    name: str
    arguments: tuple[str, ...]
    log: Path | None = None
    preflight: bool = False  # the command takes --preflight, and checks its devices

    def __str__(self) -> str:
        return shlex.join(("paris-jax", *self.arguments))

    def arguments_on(self, devices: Devices) -> tuple[str, ...]:
        """The arguments of the command where it runs on these devices."""
        return (*self.arguments, *((f"--preflight={devices.expectation}",) if self.preflight else ()))

    def command_on(self, devices: Devices) -> str:
        """The command with the variables that restrict it to these devices, as for a shell."""
        return f"{devices} {shlex.join(('paris-jax', *self.arguments_on(devices)))}"


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failed job and its exit code; a negative code is the signal that killed it."""

    job: LocalJob
    code: int

    def __str__(self) -> str:
        """The last error of the job, or its exit code."""
        if self.code < 0:
            hint = "; often there is not enough memory" if self.code == -9 else ""
            return f"{self.job.name} was killed by signal {-self.code}{hint}"
        error = last_words(self.job.log).removeprefix("error: ") if self.job.log else ""
        return f"{self.job.name}: {error or f'ended with exit code {self.code}'}"


class Launcher:
    """Starts jobs, restarts preempted ones, and stops all jobs when one fails or on request."""

    def __init__(self, program: Sequence[str], report: Callable[[str], None]):
        """`program` precedes a job's arguments; `report` is called with messages, from any thread."""
        self.program = tuple(program)
        self.report = report
        self.failure: Failure | None = None
        self.stopped_by = 0  # the signal that stopped everything
        self.began: dict[str, float] = {}  # first start of each job, from time.perf_counter()
        self.seconds: dict[str, float] = {}  # duration of each completed job
        self._lock = threading.Lock()
        self._running: dict[subprocess.Popen[bytes], LocalJob] = {}

    @property
    def stopping(self) -> bool:
        return self.failure is not None or self.stopped_by != 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handles SIGINT, SIGTERM and SIGHUP by making all jobs save and stop; must be entered on the main thread."""

        def handle(number: int, _: object) -> None:
            # In a thread, because the signal may arrive while the main thread holds the lock.
            threading.Thread(target=self.stop, args=(number,)).start()

        previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def stop(self, number: int) -> None:
        """Makes every job save and stop because of signal `number`, and starts no more jobs."""
        with self._lock:
            first, self.stopped_by = not self.stopping, self.stopped_by or number
            names = self._stop_all()
        if first and names:
            self.report(f"stopping; saving first: {', '.join(names)}")

    def run(self, job: LocalJob, devices: Devices) -> None:
        """Runs a job to completion and restarts it when preempted; if it fails, sets `failure` and stops the others."""
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
        """Runs each job, in order, on the next free group of devices, and calls `watch` every `every` seconds."""
        first, waiting = jobs[: len(groups)], collections.deque(jobs[len(groups) :])

        def work(devices: Devices, job: LocalJob) -> None:
            devices.pin()
            self.run(job, devices)
            while waiting and not self.stopping:
                with contextlib.suppress(IndexError):  # another thread took the last job
                    self.run(waiting.popleft(), devices)

        with concurrent.futures.ThreadPoolExecutor(len(groups)) as pool:
            workers = [pool.submit(work, devices, job) for devices, job in zip(groups, first, strict=False)]
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
        variables = {"PYTHONUNBUFFERED": "1", "PARIS_JAX_JOIN_HOSTS": "0"}  # every job is one process
        with contextlib.ExitStack() as stack:
            log = None
            if job.log:
                variables["COLUMNS"] = "120"  # width of lines in the log
                job.log.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(job.log.open("ab"))
                log.write(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {job.command_on(devices)}\n".encode())
                log.flush()
            return subprocess.Popen(
                [*self.program, *job.arguments_on(devices)],
                env={**os.environ, **variables, **devices.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT if log else None,
                start_new_session=True,  # Ctrl-C reaches only this launcher, which makes the jobs save and stop
            )

    def _stop_all(self) -> list[str]:
        for process in self._running:
            process.send_signal(signal.SIGTERM)  # on SIGTERM, a training job saves and exits with 75
        return [job.name for job in self._running.values()]


def last_words(log: Path) -> str:
    """Returns the last error of the latest start in a log or, without one, its last line; "" for an empty log."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (1 << 14)))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    latest: list[str] = []
    for line in filter(None, lines):
        latest = [] if line.startswith("== ") else [*latest, line]
    errors = [line for line in latest if line.startswith("error: ")]
    return ["", *latest, *errors][-1]
