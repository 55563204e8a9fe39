"""Previews: a few small clips of each shard, so that pages show prepared clips without decoding latents."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import safetensors.numpy
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.data import index, video
from paris_jax.data.sources.clip import Clip

ENDING = ".previews.safetensors"
PER_SHARD = 16
FRAMES = 8
SIDE = 64  # pixels of the longer side


@dataclasses.dataclass
class Previews:
    """Keeps previews of some of the clips that pass, chosen by hashes of their ids.

    Attributes:
      kept: hash of the id -> (T, H, W, 3) uint8.
    """

    kept: dict[bytes, np.ndarray] = dataclasses.field(default_factory=dict)

    def watch(self, clips: Iterable[Clip]) -> Iterator[Clip]:
        """Passes clips on."""
        for clip in clips:
            key = _key(clip.id)
            if len(self.kept) < PER_SHARD or key < max(self.kept):
                self.kept[key] = small(clip.video)
                if len(self.kept) > PER_SHARD:
                    del self.kept[max(self.kept)]
            yield clip


def _key(clip_id: str) -> bytes:
    return index.digests([clip_id]).astype(">u8").tobytes()


def small(frames: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 with at most FRAMES frames, evenly spaced, of at most SIDE pixels."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)]
    height, width = frames.shape[1:3]
    scale = min(1.0, SIDE / max(height, width))
    if scale == 1.0:
        return chosen
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return np.stack([video.fit(frame, rows, columns) for frame in chosen])


def file_of(shard: str) -> str:
    """The name of the previews that belong to a shard of records."""
    return shard.rpartition(".")[0] + ENDING


def write(path: epath.PathLike, previews: Previews, clip_ids: Iterable[str]) -> None:
    """Writes the previews of one shard, by row; `clip_ids` are those of its records, in order."""
    kept = ((row, previews.kept.get(_key(clip_id))) for row, clip_id in enumerate(clip_ids))
    arrays = {f"{row:05d}": np.ascontiguousarray(frames) for row, frames in kept if frames is not None}
    manifest.write_atomically(path, safetensors.numpy.save(arrays))


def read(path: epath.PathLike) -> dict[int, np.ndarray]:
    """The previews of one shard: row -> (T, H, W, 3) uint8."""
    arrays = safetensors.numpy.load(epath.Path(path).read_bytes())
    return {int(name): arrays[name] for name in sorted(arrays)}


def keep(path: epath.PathLike, rows: Sequence[int]) -> None:
    """Leaves the previews of some records of a shard, which are numbered anew."""
    found = read(path)
    arrays = {f"{new:05d}": found[row] for new, row in enumerate(rows) if row in found}
    manifest.write_atomically(path, safetensors.numpy.save(arrays))
