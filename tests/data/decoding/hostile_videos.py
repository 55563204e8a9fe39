"""Videos whose decoder misbehaves, as those of damaged or hostile files do."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator

import numpy as np

from paris_jax.data.sources.clip import Clip, Dropped


@dataclasses.dataclass(frozen=True)
class Hostile:
    """A video of `count` clips; decoding clip `at` does what `deed` names, and so do `repeated` clips after it."""

    id: str
    deed: str = ""
    at: int = 1
    count: int = 4
    repeated: int = 0

    def clips(self, first: int = 0, curation: object = None) -> Iterator[tuple[int, Clip | Dropped]]:
        for number in range(first, self.count):
            if self.deed and self.at <= number <= self.at + self.repeated:
                getattr(self, self.deed)()
            frames = np.full((2, 4, 4, 3), number, np.uint8)
            yield number, Clip(f"{self.id}#{number:04d}", frames, 8.0, "x")

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(self) -> None:
        while True:
            time.sleep(1)

    def spin(self) -> None:
        while True:
            pass

    def eat(self) -> None:
        eaten = []
        while True:
            eaten.append(np.ones(16 << 20, np.uint8))

    def fail(self) -> None:
        raise ValueError("a decoder's own error")

    def slow(self) -> None:
        time.sleep(0.05)
