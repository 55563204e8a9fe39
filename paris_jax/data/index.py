"""The index of prepared clips: id, features, caption and attributes of each clip, without its latent.

Beside each shard of records stands a small safetensors file, so that clustering millions of clips reads megabytes where
the latents are terabytes. Clips are numbered as their records are.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator

import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.config import hashing
from paris_jax.errors import UserError, first_line

ENDING = ".index.safetensors"


class Entry(msgspec.Struct, frozen=True):
    """The text of one clip."""

    id: str
    caption: str
    attributes: dict[str, str]


class Block:
    """Consecutive clips of an index: features (n, F) float32, digests (n, 2) uint64, and their entries."""

    def __init__(self, start: int, arrays: dict[str, np.ndarray]):
        self.start = start
        self.features, self.digests = arrays["features"], arrays["digests"]
        self._text, self._ends = arrays["text"], arrays["ends"]

    def __len__(self) -> int:
        return len(self.features)

    def entry(self, row: int) -> Entry:
        begin = int(self._ends[row - 1]) if row else 0
        return msgspec.json.decode(self._text[begin : int(self._ends[row])].tobytes(), type=Entry)

    def entries(self) -> Iterator[Entry]:
        return (self.entry(row) for row in range(len(self)))


def digests(ids: Iterable[str]) -> np.ndarray:
    """Returns (N, 2) uint64, 128 bits of a hash of each id: the ids of millions of clips in 16 bytes each."""
    data = b"".join(hashlib.blake2b(name.encode(), digest_size=16).digest() for name in ids)
    return np.frombuffer(data, ">u8").reshape(-1, 2).astype(np.uint64)


def order(digests_N2: np.ndarray) -> np.ndarray:
    """Returns the permutation (N,) int64 that sorts digests: clips in random order, the same on every machine."""
    return np.lexsort((digests_N2[:, 1], digests_N2[:, 0]))


def file_of(shard: str) -> str:
    """The name of the index file that belongs to a shard of records."""
    return shard.rpartition(".")[0] + ENDING


class Writer:
    """Collects the clips of one shard and writes their index; equal clips give equal bytes."""

    def __init__(self) -> None:
        self.features: list[np.ndarray] = []
        self.entries: list[Entry] = []

    def add(self, feature: np.ndarray, entry: Entry) -> None:
        self.features.append(feature)
        self.entries.append(entry)

    def write(self, path: epath.PathLike) -> None:
        lines = [hashing.canonical_json(msgspec.to_builtins(entry)).encode() for entry in self.entries]
        arrays = {
            "features": np.stack(self.features).astype(np.float32) if lines else np.zeros((0, 0), np.float32),
            "digests": digests(entry.id for entry in self.entries),
            "text": np.frombuffer(b"".join(lines), np.uint8),
            "ends": np.cumsum([len(line) for line in lines], dtype=np.int64),
        }
        manifest.write_atomically(path, safetensors.numpy.save(arrays))


class ClipIndex:
    """The clips of a data folder, by number; only the block that was read last is in memory."""

    def __init__(self, folder: epath.PathLike, files: Iterable[str]):
        self.folder = epath.Path(folder)
        self.files = sorted(name for name in files if name.endswith(ENDING))
        if not self.files:
            raise UserError(
                f"{self.folder} has no index of its clips, because an earlier version made it; delete it and prepare "
                "the clips again"
            )
        self._starts: list[int] = [0]  # of the blocks that were read, and of the next one
        self._read = functools.lru_cache(maxsize=2)(self._read_uncached)

    def blocks(self) -> Iterator[Block]:
        """All clips in order of their numbers, a block for each shard."""
        start = 0
        for number in range(len(self.files)):
            block = Block(start, self._read_uncached(number))
            start += len(block)
            if number + 1 == len(self._starts):
                self._starts.append(start)
            if len(block):  # all clips of a shard may have been dropped
                yield block

    def block(self, number: int) -> Block:
        """The clips of one shard; the numbers of its clips are known after a pass over all `blocks`."""
        return Block(self._starts[number], self._read(number))

    def entry(self, number: int) -> Entry:
        """The text of one clip; fast for neighbours, and after a pass over all `blocks`."""
        if len(self._starts) <= len(self.files):
            for _ in self.blocks():
                pass
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        start = self._starts[shard]
        return Block(start, self._read(shard)).entry(number - start)

    def _read_uncached(self, number: int) -> dict[str, np.ndarray]:
        path = self.folder / self.files[number]
        try:
            return safetensors.numpy.load(path.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{path} cannot be read ({first_line(error)}); copy it again from its origin, or prepare the clips "
                "again"
            ) from error
