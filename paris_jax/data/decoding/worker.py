"""A decoding process: `python -m paris_jax.data.decoding.worker DESCRIPTOR SECONDS MEGABYTES`.

It receives videos from the process that started it as multiprocessing sends objects. That process decodes no object in
return: clips travel as a header in MessagePack and the bytes of their frames.
"""

import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import av.logging
import msgspec
import numpy as np

from paris_jax.config.sections import CurationSettings
from paris_jax.data import curation
from paris_jax.data.decoding.decoders import LIMITED, READY, Header
from paris_jax.data.sources.clip import Clip, Dropped
from paris_jax.errors import first_line

SPARE = 30  # seconds beyond the limit, after which a process ends itself: nobody is left to do it


def serve(connection: Any, seconds: float) -> None:
    """Decodes videos until the connection closes."""
    while True:
        try:
            video, first, settings = connection.recv()
        except EOFError:
            return
        items = _items(video, first, settings)
        while True:
            signal.alarm(0)
            if connection.recv_bytes() != b"next":
                raise RuntimeError("the protocol of the decoding process is broken")
            signal.alarm(int(seconds) + SPARE)
            found = next(items, None)
            if found is None:
                connection.send_bytes(msgspec.msgpack.encode(Header("end")))
                break
            _send(connection, *found)
        signal.alarm(0)


def _items(video: Any, first: int, settings: CurationSettings) -> Iterator[tuple[int, Clip | Dropped]]:
    """The clips of a video; whatever a file makes a decoder raise drops the rest of it."""
    number = first
    try:
        for found, item in curation.clips(video, first, settings):
            number = found + 1
            yield found, item
    except MemoryError:
        yield number, Dropped(video.id, "decode", LIMITED[1])
    except Exception as error:
        yield number, Dropped(video.id, "decode", "cannot be decoded", f"{type(error).__name__}: {first_line(error)}")


def _send(connection: Any, number: int, item: Clip | Dropped) -> None:
    if isinstance(item, Dropped):
        header = Header("dropped", number, item.id, stage=item.stage, reason=item.reason, detail=item.detail[:1000])
        connection.send_bytes(msgspec.msgpack.encode(header))
        return
    header = Header("clip", number, item.id, item.fps, item.caption, item.attributes, item.video.shape)
    connection.send_bytes(msgspec.msgpack.encode(header))
    connection.send_bytes(np.ascontiguousarray(item.video).data.cast("B"))


def limit_memory(megabytes: int) -> None:
    """Limits this process's further memory, where the system can enforce a limit."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[5])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    except (ImportError, OSError, ValueError):
        pass


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    limit_memory(int(sys.argv[3]))
    av.logging.set_level(None)
    to_parent = Connection(int(sys.argv[1]))
    to_parent.send_bytes(READY)
    serve(to_parent, float(sys.argv[2]))
