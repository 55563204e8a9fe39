"""Worker processes that decode videos, with limits of time and memory for each clip.

A decoder that crashes, hangs or eats memory costs its process and one clip; the next process goes on with the clip
after it. Clips arrive in the order of the videos, whatever the number of processes.
"""

import contextlib
import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np

from paris_jax.config.sections import CurationSettings
from paris_jax.data.sources.clip import OFF, Clip, Dropped, Video

AHEAD = 4  # clips of one video that wait for the encoder
RECYCLED = 500  # videos after which a process is replaced: decoders leak
STARTING = 300.0  # seconds that a process may take to import its modules
READY = b"ready"
LARGEST = 1 << 32  # bytes of a message from a process
LIMITED = "took more time than allowed", "needs more memory than allowed"  # reasons that other limits may lift


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of decoding one clip."""

    seconds: float = 120.0
    megabytes: int = 4096


class Header(msgspec.Struct, frozen=True):
    """A message of a worker, before the bytes of the frames: one clip, or one that was dropped, or the end."""

    kind: str
    number: int = 0
    id: str = ""
    fps: float = 1.0
    caption: str = ""
    attributes: dict[str, str] = {}
    shape: tuple[int, ...] = ()
    stage: str = ""
    reason: str = ""
    detail: str = ""


class Decoders:
    """A pool of decoding processes; a context manager, which ends them."""

    def __init__(self, count: int, limits: Limits, curation: CurationSettings = OFF):
        self.count = max(1, count)
        self._workers = [_Worker(limits, curation) for _ in range(self.count)]

    def __enter__(self) -> "Decoders":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def clips(self, videos: Iterable[Video | Dropped]) -> Iterator[Clip | Dropped]:
        """Yields the clips of all videos, in order, while the workers decode the next ones."""
        job = _Job(iter(videos), 2 * self.count)
        threads = [threading.Thread(target=job.serve, args=(worker,), daemon=True) for worker in self._workers]
        for thread in threads:
            thread.start()
        try:
            yield from job.results()
        finally:
            job.stopped.set()
            for worker in self._workers if not job.finished else ():
                worker.cancel()
            for thread in threads:
                thread.join()


class _Job:
    """One call of `Decoders.clips`: videos are handed out in order, and so are their clips."""

    def __init__(self, videos: Iterator[Video | Dropped], ahead: int):
        self.videos = videos
        self.lock = threading.Lock()  # of the videos and of the order
        self.order: queue.Queue[queue.Queue | None] = queue.Queue(ahead)
        self.stopped = threading.Event()
        self.finished = False

    def results(self) -> Iterator[Clip | Dropped]:
        while (clips := self.order.get()) is not None:
            while (item := clips.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item

    def serve(self, worker: "_Worker") -> None:
        """Decodes one video after another, until there are no more."""
        while not self.stopped.is_set():
            taken = self._take()
            if taken is None:
                return
            video, clips = taken
            try:
                for item in [video] if isinstance(video, Dropped | BaseException) else worker.decode(video):
                    if not self._put(clips, item):
                        worker.end()  # in the middle of a video
                        return
            except Exception as error:  # must not end this thread in silence
                self._put(clips, error)
            self._put(clips, None)

    def _take(self) -> "tuple[Any, queue.Queue] | None":
        with self.lock:
            if self.finished:
                return None
            try:
                video: Any = next(self.videos)
            except StopIteration:
                self.finished = True
                self._put(self.order, None)
                return None
            except Exception as error:
                self.finished, video = True, error
            clips: queue.Queue = queue.Queue(AHEAD)
            self._put(self.order, clips)
            return video, clips

    def _put(self, where: queue.Queue, item: Any) -> bool:
        """Waits for room; False where nobody will make room."""
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Full):
                where.put(item, timeout=0.2)
                return True
        return False


class _Worker:
    """One decoding process, started when it is first needed and again after its death."""

    def __init__(self, limits: Limits, curation: CurationSettings):
        self.limits, self.curation = limits, curation
        self.process: subprocess.Popen | None = None
        self.connection: Any = None
        self.videos = 0
        self.cancelled = False

    def cancel(self) -> None:
        """Ends the decoding of a video from another thread."""
        self.cancelled = True
        if (process := self.process) is not None:
            process.kill()

    def decode(self, video: Video) -> Iterator[Clip | Dropped]:
        """Yields the clips of a video; goes on behind a clip that takes the process down, once in a row."""
        first, decoded = 0, False
        lost: Dropped | None = None  # the clip that took the last process down
        while not self.cancelled:
            self._start()
            self.videos += 1
            try:
                self.connection.send((video, first, self.curation))
                while (received := self._receive()) is not None:
                    number, item = received
                    first, decoded = number + 1, True
                    yield from filter(None, [lost])
                    lost = None
                    yield item
                yield from filter(None, [lost])
                return
            except (_Died, OSError) as death:
                self.end()
                if lost is not None:  # the clip after it takes its process down, too
                    rest = dataclasses.replace(lost, detail="and so do the clips after it")
                    yield rest if decoded else dataclasses.replace(lost, id=video.id)
                    return
                lost = Dropped(f"{video.id}#{first:04d}", "decode", str(death))
                first += 1

    def _receive(self) -> tuple[int, Clip | Dropped] | None:
        """The next clip, or None at the end of a video.

        Raises:
          _Died: there is none, because the process died or had to be killed.
        """
        try:
            self.connection.send_bytes(b"next")
            if not self.connection.poll(self.limits.seconds):
                raise _Died(LIMITED[0])
            header = msgspec.msgpack.decode(self.connection.recv_bytes(LARGEST), type=Header)
            if header.kind == "end":
                return None
            if header.kind == "dropped":
                return header.number, Dropped(header.id, header.stage, header.reason, header.detail)
            data = self.connection.recv_bytes(LARGEST)
        except (EOFError, OSError, msgspec.DecodeError) as error:
            raise _Died(self._death()) from error
        frames = np.frombuffer(data, np.uint8).reshape(header.shape)
        return header.number, Clip(header.id, frames, header.fps, header.caption, header.attributes)

    def _death(self) -> str:
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.process.wait(5)
            if code < 0:
                return f"crashes the decoder ({signal.Signals(-code).name})"
        return "crashes the decoder"

    def _start(self) -> None:
        if self.videos >= RECYCLED:
            self.end()
        if self.process is not None and self.process.poll() is None:
            return
        self.end()
        ours, theirs = socket.socketpair()
        with theirs:
            limits = [str(self.limits.seconds), str(self.limits.megabytes)]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "paris_jax.data.decoding.worker", str(theirs.fileno()), *limits],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1",
                                  "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.connection = Connection(ours.detach())
        self.videos = 0
        try:
            ready = self.connection.poll(STARTING) and self.connection.recv_bytes() == READY
        except (EOFError, OSError):
            ready = False
        if not ready and not self.cancelled:
            self.end()
            raise RuntimeError("a decoding process does not start: see its output above")

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.connection.close()
        self.process = self.connection = None


class _Died(Exception):
    """A worker process is gone; says why."""
