"""Pictures for the page of a partition: contact sheets, and a two-dimensional map of the clips' features."""

import dataclasses

import numpy as np
from etils import epath

from paris_jax.clustering.clips import Clips
from paris_jax.clustering.clusters import Clustering
from paris_jax.clustering.heldout import TRAIN
from paris_jax.clustering.rows import Rows
from paris_jax.data import index, previews

SHARDS = 64  # that previews are taken from, evenly spaced
NEAREST, OTHERS = 6, 6  # clips of a sheet: nearest to the centroid, and any
COLUMNS = 4
CELL = 64  # pixels of the longer side of a clip on its sheet, at least
ALIGNED = 64
GROUND = 40  # grey level between clips
POINTS = 1500  # clips on the map


@dataclasses.dataclass(frozen=True)
class Shown:
    """A clip with a preview.

    Attributes:
      number: of its record. caption: text. video: (T, H, W, 3) uint8. distance: to the centroid of its cluster.
      position: (2,) on the map.
    """

    number: int
    caption: str
    video: np.ndarray
    distance: float
    position: np.ndarray


@dataclasses.dataclass(frozen=True)
class Map:
    """A projection to the two main axes of the features: axes (F, 2), positions (N, 2) and labels (N,) of a sample."""

    axes: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    explained: float  # share of the variance

    def project(self, rows: np.ndarray) -> np.ndarray:
        return rows @ self.axes


def make_map(partition: Clustering, clips: Clips, labels: np.ndarray) -> Map:
    """Projects a random sample of the training clips to the two main axes of their standardised features."""
    numbers = clips.of_split(TRAIN)
    rows = Rows(clips.features, numbers, partition.mean, partition.spread)[:POINTS].astype(np.float64)
    values, vectors = np.linalg.eigh(rows.T @ rows)
    axes = np.zeros((rows.shape[1], 2))
    count = min(2, rows.shape[1])
    axes[:, :count] = vectors[:, ::-1][:, :count]
    # Eigenvectors have no sign of their own.
    axes *= np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    explained = float(values[::-1][:2].sum() / max(values.sum(), 1e-12))
    return Map(axes, rows @ axes, labels[numbers[:POINTS]], explained)


def clips_with_previews(
    partition: Clustering, clips: Clips, labels: np.ndarray, projection: Map, folder: epath.Path
) -> list[list[Shown]]:
    """For each cluster the clips of its sheet: those nearest to the centroid, then others by hashes of their ids."""
    files = clips.index.files
    chosen = np.unique(np.linspace(0, len(files) - 1, min(SHARDS, len(files))).round().astype(int))
    found: list[list[tuple[bytes, Shown]]] = [[] for _ in partition.centroids]
    for shard in chosen:
        name = files[shard].removesuffix(index.ENDING) + previews.ENDING
        videos = previews.read(folder / name)
        if not videos:
            continue
        block = clips.index.block(int(shard))
        rows = np.array(list(videos))
        distances = partition.distances(block.features[rows])
        positions = projection.project(partition.standardise(block.features[rows]))
        for i, row in enumerate(rows.tolist()):
            number = block.start + row
            if clips.splits[number] == TRAIN:
                k = int(labels[number])
                shown = Shown(number, block.entry(row).caption, videos[row], float(distances[i, k]), positions[i])
                found[k].append((block.digests[row].astype(">u8").tobytes(), shown))
    return [_choose(candidates) for candidates in found]


def _choose(candidates: list[tuple[bytes, Shown]]) -> list[Shown]:
    by_hash = [shown for _, shown in sorted(candidates, key=lambda pair: pair[0])]
    nearest = sorted(by_hash, key=lambda shown: shown.distance)[:NEAREST]
    taken = {shown.number for shown in nearest}
    return nearest + [shown for shown in by_hash if shown.number not in taken][:OTHERS]


def contact_sheet(shown: list[Shown]) -> np.ndarray:
    """Tiles previews into one video (T, H, W, 3) uint8, in rows of COLUMNS; shorter ones rest on their last frame.

    Sides are multiples of ALIGNED pixels: beyond the last column, FFmpeg's conversion reads memory that nobody wrote,
    and equal clips would give other bytes each time.
    """
    videos = [clip.video for clip in shown]
    frames, height, width = (max(v.shape[axis] for v in videos) for axis in range(3))
    columns = min(COLUMNS, len(videos))
    gap = max(1, min(height, width) // 16)
    rows = -(-len(videos) // columns)
    scale = max(1, -(-CELL // max(height, width)))
    sheet = np.full((frames, rows * (height + gap) + gap, columns * (width + gap) + gap, 3), GROUND, np.uint8)
    for i, video in enumerate(videos):
        padded = np.pad(video, ((0, frames - len(video)), (0, 0), (0, 0), (0, 0)), mode="edge")
        top = gap + i // columns * (height + gap) + (height - video.shape[1]) // 2
        left = gap + i % columns * (width + gap) + (width - video.shape[2]) // 2
        sheet[:, top : top + video.shape[1], left : left + video.shape[2]] = padded
    sheet = sheet.repeat(scale, axis=1).repeat(scale, axis=2)
    padding = [(0, -side % ALIGNED) for side in sheet.shape[1:3]]
    return np.pad(sheet, ((0, 0), *padding, (0, 0)), constant_values=GROUND)
