"""Real video as a source of clips: a directory of video files or folders of frames, with captions.

Captions are read from captions.csv or captions.jsonl (columns `file` and `caption`, paths relative to the directory),
or from a .txt file of the same name beside each video.
"""

import csv
import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
from etils import epath

from paris_jax.data import video
from paris_jax.data.sources.clip import Clip
from paris_jax.errors import UserError

VIDEOS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi", ".m4v")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Cut:
    """Time span of one clip within its video, and the size to decode it at.

    Attributes:
      number: index of the clip within its video.
      start: start of the clip, in seconds from the start of the video.
      size: (rows, columns) to scale to before cropping.
      last: presentation time of the clip's last frame, in seconds.
      slack: tolerance for rounded frame times, in seconds.
    """

    number: int
    start: float
    size: tuple[int, int]
    last: float
    slack: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """One clip of the directory: the relative path of its video (forward slashes), its caption and its cut."""

    name: str
    caption: str
    cut: Cut


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Source of consecutive clips cut from every video of a directory, in order of name.

    Videos are resampled to `fps` (the frame displayed at each instant), scaled to cover height x width and cropped to
    the centre. A folder of frames has no frame rate of its own and is assumed to be at `fps`.
    """

    path: str
    frames: int
    height: int
    width: int
    fps: float
    scenes: tuple[Scene, ...]

    @classmethod
    def open(cls, path: epath.PathLike, frames: int, height: int, width: int, fps: float) -> "FolderSource":
        """Finds all videos and captions of a directory and plans the cuts.

        Raises:
          UserError: a file is missing, broken, too short, or without a UTF-8 caption; the message names the first.
        """
        root = epath.Path(path)
        if "://" in str(root):
            raise UserError(f"data.path={root}: must be a local directory; copy the videos to this machine first")
        if not root.is_dir():
            raise UserError(f"data.path={root}: is not a directory; give the directory that holds the videos")
        names = find(root)
        if not names:
            raise UserError(
                f"data.path={root}: holds no video; put {', '.join(VIDEOS[:3])} files or folders of frames there, "
                "with captions in captions.csv"
            )
        captions = read_captions(root, names)
        scenes = []
        for name in names:
            path = root / name
            cuts = cut_pictures(path, frames, fps) if path.is_dir() else cut_video(path, frames, height, width, fps)
            scenes += [Scene(name, captions[name], cut) for cut in cuts]
        return cls(str(root), frames, height, width, fps, tuple(scenes))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < len(self.scenes):
            raise IndexError(f"clip {index} of {len(self.scenes)}")
        scene = self.scenes[index]
        path = epath.Path(self.path) / scene.name
        read = self._read_pictures if path.is_dir() else self._read_video
        return Clip(f"{scene.name}#{scene.cut.number:04d}", read(path, scene.cut), self.fps, scene.caption)

    def __iter__(self) -> Iterator[Clip]:
        return (self[index] for index in range(len(self)))

    def first(self, count: int) -> "FolderSource":
        """Returns a source of the first `count` clips."""
        return dataclasses.replace(self, scenes=self.scenes[:count])

    def describe(self) -> dict[str, Any]:
        """Returns the number of videos and a digest of all cuts and captions, which detects a changed directory."""
        digest = hashlib.sha256(repr(self.scenes).encode()).hexdigest()
        return {"name": "folder", "videos": len({scene.name for scene in self.scenes}), "digest": digest}

    def _read_video(self, path: epath.Path, cut: Cut) -> np.ndarray:
        wanted = cut.start + np.arange(self.frames) / self.fps
        chosen: list[np.ndarray] = []
        shown, seconds = None, -np.inf  # the displayed frame and its time
        for next_seconds, image in video.decode(path, cut.start, cut.size):
            while shown is not None and len(chosen) < self.frames and wanted[len(chosen)] < next_seconds - cut.slack:
                chosen.append(shown)
            if len(chosen) == self.frames:
                return np.stack(chosen)
            shown, seconds = video.crop(image, self.height, self.width), next_seconds
        if shown is None or seconds < cut.last - cut.slack:
            raise UserError(
                f"{path} breaks off at {max(seconds, 0.0):.2f} s while decoding; "
                "replace or remove the file, then run the same command again"
            )
        return np.stack(chosen + [shown] * (self.frames - len(chosen)))

    def _read_pictures(self, path: epath.Path, cut: Cut) -> np.ndarray:
        names = pictures(path)[cut.number * self.frames :][: self.frames]
        return np.stack([video.fit(video.read_image(path / name), self.height, self.width) for name in names])


def find(root: epath.Path, folder: str = "") -> list[str]:
    """Returns the relative names of all videos and folders of frames under a directory, sorted."""
    names = []
    for entry in sorted((root / folder).iterdir(), key=lambda entry: entry.name):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            inside = find(root, name)  # images beside videos are thumbnails, not frames
            names += inside or ([name] if pictures(entry) else [])
        elif entry.suffix.lower() in VIDEOS:
            names.append(name)
    return names


def pictures(folder: epath.Path) -> list[str]:
    """Returns the names of the images in a folder, in natural order: 9.png before 10.png."""
    names = (entry.name for entry in folder.iterdir() if entry.suffix.lower() in PICTURES)
    return sorted(names, key=_in_order)


def _in_order(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", name)  # text and digits alternate
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def cut_video(path: epath.Path, frames: int, height: int, width: int, fps: float) -> list[Cut]:
    """Cuts a video into consecutive clips; raises UserError if it is shorter than one clip."""
    footage = video.probe(path)
    length = frames / fps
    count = int((footage.duration + 1e-3) / length)
    if not count:
        raise UserError(
            f"{path} is {footage.duration:.2f} s long, shorter than one clip of {length:.2f} s "
            f"(data.num_frames={frames} at data.fps={fps:g}); lower data.num_frames, raise data.fps, or remove the file"
        )
    size = video.cover(footage.height, footage.width, height, width)
    slack = 0.25 * float(np.min(np.diff(footage.times), initial=1 / fps))
    cuts = []
    for number in range(count):
        start = number * length
        last = np.searchsorted(footage.times - slack, start + (frames - 1) / fps, side="right") - 1
        cuts.append(Cut(number, start, size, float(footage.times[max(last, 0)]), slack))
    return cuts


def cut_pictures(path: epath.Path, frames: int, fps: float) -> list[Cut]:
    """Cuts a folder of frames into consecutive clips; raises UserError if it holds fewer frames than one clip."""
    count = len(pictures(path))
    if count < frames:
        raise UserError(
            f"{path} holds {count} frames, fewer than one clip of data.num_frames={frames}; lower it or remove the "
            "folder"
        )
    return [Cut(number, number * frames / fps, (0, 0), 0.0, 0.0) for number in range(count // frames)]


def read_captions(root: epath.Path, names: list[str]) -> dict[str, str]:
    """Returns the caption of every video.

    Raises:
      UserError: a video has no caption, or a table cannot be read or names a file that does not exist.
    """
    captions: dict[str, str] = {}
    for table in TABLES:
        if (root / table).exists():
            rows = TABLES[table](root / table)
            unknown = sorted(rows.keys() - set(names))
            if unknown:
                raise UserError(
                    f"{root / table} names {unknown[0]!r}, which is not there; correct the name or remove the line"
                )
            captions |= rows
    for name in names:
        beside = (root / name).with_suffix(".txt") if (root / name).suffix.lower() in VIDEOS else root / f"{name}.txt"
        if name not in captions and beside.exists():
            captions[name] = _text(beside)
        captions[name] = " ".join(captions.get(name, "").split())
        if not captions[name]:
            raise UserError(
                f"{root / name} has no caption; add a line to {root / 'captions.csv'} or write it in {beside}"
            )
    return captions


def _text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from error


def _read_csv(path: epath.Path) -> dict[str, str]:
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    return _pairs(path, ((rows.line_num, row) for row in rows))


def _read_jsonl(path: epath.Path) -> dict[str, str]:
    def rows() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(_text(path).splitlines(), 1):
            try:
                if line.strip():
                    yield number, msgspec.json.decode(line)
            except (msgspec.DecodeError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: is not JSON ({error}); correct the line") from error

    return _pairs(path, rows())


def _pairs(path: epath.Path, rows: Iterator[tuple[int, Any]]) -> dict[str, str]:
    """Returns the captions by file from rows with the columns `file` and `caption`.

    Raises:
      UserError: a row lacks a column or repeats a file; the message names its line.
    """
    captions: dict[str, str] = {}
    for number, row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file", "caption")):
            raise UserError(f"{path}, line {number}: needs the columns file and caption; add the missing one")
        if row["file"] in captions:
            raise UserError(f"{path}, line {number}: names {row['file']!r} a second time; keep one line for each file")
        captions[row["file"]] = row["caption"]
    return captions


TABLES: dict[str, Callable[[epath.Path], dict[str, str]]] = {"captions.csv": _read_csv, "captions.jsonl": _read_jsonl}
