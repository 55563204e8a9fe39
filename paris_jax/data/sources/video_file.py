"""Video files and folders of frames, cut into clips."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from paris_jax.config.sections import CurationSettings
from paris_jax.data import video
from paris_jax.data.decoding import footage
from paris_jax.data.decoding.cutting import Cutter, Window
from paris_jax.data.decoding.display import BadVideo, Rules
from paris_jax.data.decoding.footage import Frame
from paris_jax.data.sources.clip import OFF, Clip, Dropped

VIDEOS = (".mp4", ".webm", ".gif", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp")  # fmt: skip  # noqa: E501
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How videos become clips: frames per clip, size and rate, and the rules of their colours."""

    num_frames: int
    height: int
    width: int
    fps: float
    rules: Rules = Rules()

    @classmethod
    def of(cls, data: Any) -> "Cutting":
        """The cutting that the `data` section of a config asks for."""
        rules = Rules(data.hdr, tuple(data.alpha_background))
        return cls(data.num_frames, data.height, data.width, data.fps, rules)

    @property
    def seconds(self) -> float:
        """Length of a clip."""
        return self.num_frames / self.fps

    def cutter(self, first: int, curation: CurationSettings) -> Cutter:
        """Cuts a video's frames, from clip `first` on."""
        is_cut = None
        if curation.scene_cuts:
            from paris_jax.data.decoding.scenes import SceneCuts

            is_cut = SceneCuts(curation.scene_threshold)
        return Cutter(self.num_frames, self.fps, curation.stride_frames, first, is_cut)

    def size(self, rows: float, columns: float) -> tuple[int, int]:
        """The size that a displayed frame is scaled to before it is cropped."""
        return video.cover(rows, columns, self.height, self.width)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some bytes of a file: a video inside of an archive; `owner` keeps the file as long as this is needed."""

    path: str
    start: int
    size: int
    owner: Any = None


@contextlib.contextmanager
def _opened(file: str | Part) -> Iterator[BinaryIO]:
    with open(file if isinstance(file, str) else file.path, "rb", buffering=0) as whole:
        yield whole if isinstance(file, str) else io.BufferedReader(_Window(whole, file))


class _Window(io.RawIOBase):
    """Reads a part of an open file as if it were a file."""

    def __init__(self, file: Any, part: Part):
        self.file, self.part, self.place = file, part, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, offset + (0, self.place, self.part.size)[whence])
        return self.place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.part.size - self.place))
        self.file.seek(self.part.start + self.place)
        data = self.file.read(count)
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """A video file, or a part of one."""

    id: str
    file: str | Part
    caption: str
    cutting: Cutting
    attributes: dict[str, str] = dataclasses.field(default_factory=dict)

    def clips(self, first: int = 0, curation: CurationSettings = OFF) -> Iterator[tuple[int, Clip | Dropped]]:
        """Decodes the clips in one pass; a fault ends the video with its reason."""
        cutting, number, end = self.cutting, first, 0.0
        with _opened(self.file) as file:
            if left_out := _left_out(file, self.id, curation):
                yield 0, left_out
                return
            file.seek(0)
            cutter = cutting.cutter(first, curation)

            def frames() -> Iterator[Frame]:
                nonlocal end
                start = cutter.instant / cutting.fps
                for frame in footage.decode(file, start, cutting.size, cutting.rules, self.id, threads=1):
                    end = frame.seconds + frame.duration
                    yield frame

            try:
                for window in cutter.cut(frames(), cutting.height, cutting.width):
                    yield window.number, _item(self, window)
                    number = window.number + 1
                file.seek(0)
                promised = footage.promised_seconds(file)
            except BadVideo as error:
                name = self.id if not number else clip_id(self.id, number)
                yield number, Dropped(name, "decode", error.reason, error.detail)
                return
        if promised - end > max(0.5, 0.02 * promised) and promised >= cutting.seconds:
            name = self.id if not number else clip_id(self.id, number)
            yield number, Dropped(name, "decode", "breaks off", f"at {end:.2f} of {promised:.2f} s")
        elif not number and end < cutting.seconds:
            yield 0, Dropped(self.id, "decode", "is shorter than one clip", f"{end:.2f} s of {cutting.seconds:.2f} s")
        elif not number:
            yield 0, Dropped(self.id, "curate", "has no scene as long as a clip", f"{cutting.seconds:.2f} s")


def _left_out(file: BinaryIO, name: str, curation: CurationSettings) -> Dropped | None:
    """The config's settings for videos, before they are decoded."""
    if not (curation.min_side or curation.min_seconds):
        return None
    try:
        found = footage.probe(file)
    except BadVideo as error:
        return Dropped(name, "decode", error.reason, error.detail)
    if min(found.height, found.width) < curation.min_side:
        return Dropped(name, "curate", "is too small", f"{found.width} x {found.height} of {curation.min_side}")
    if found.duration < curation.min_seconds - 1e-3:
        detail = f"{found.duration:.2f} s of {curation.min_seconds:g} s"
        return Dropped(name, "curate", "is shorter than curation.min_seconds", detail)
    return None


def _item(source: "VideoFile | FrameFolder", window: Window) -> Clip | Dropped:
    name = clip_id(source.id, window.number)
    if window.frames is None:
        return Dropped(name, "decode", window.fault)
    return Clip(name, window.frames, source.cutting.fps, source.caption, source.attributes)


@dataclasses.dataclass(frozen=True)
class FrameFolder:
    """A folder of frames; it has no frame rate of its own and is assumed to be at that of the clips."""

    id: str
    path: str
    caption: str
    cutting: Cutting
    attributes: dict[str, str] = dataclasses.field(default_factory=dict)

    def clips(self, first: int = 0, curation: CurationSettings = OFF) -> Iterator[tuple[int, Clip | Dropped]]:
        names = pictures(Path(self.path))
        cutter = self.cutting.cutter(first, curation)
        broken: dict[int, BadVideo] = {}

        def frames() -> Iterator[Frame]:
            for position in range(cutter.instant, len(names)):
                try:
                    image = self._frame(names[position])
                except BadVideo as error:
                    broken[position], image = error, np.zeros((self.cutting.height, self.cutting.width, 3), np.uint8)
                yield Frame(position / self.cutting.fps, 1 / self.cutting.fps, image, position in broken)

        for window in cutter.cut(frames(), self.cutting.height, self.cutting.width):
            item = _item(self, window)
            if isinstance(item, Dropped) and broken:
                error = broken[max(broken)]
                item = Dropped(item.id, "decode", "has a frame that " + error.reason, error.detail)
            yield window.number, item
        if len(names) < self.cutting.num_frames:
            detail = f"{len(names)} frames of {self.cutting.num_frames}"
            yield 0, Dropped(self.id, "decode", "is shorter than one clip", detail)

    def _frame(self, name: str) -> np.ndarray:
        image = footage.read_image(Path(self.path) / name, self.cutting.rules, name)
        return video.fit(image, self.cutting.height, self.cutting.width)


def clip_id(video_id: str, number: int) -> str:
    return f"{video_id}#{number:04d}"


def is_hidden(name: str) -> bool:
    """Whether a file is not the user's: hidden, of macOS's archives (._a.mp4), or of a folder's own index."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "System Volume Information")


def pictures(folder: Any) -> list[str]:
    """Returns the names of the images in a folder, in natural order: 9.png before 10.png."""
    names = (e.name for e in folder.iterdir() if e.suffix.lower() in PICTURES and not is_hidden(e.name))
    return sorted(names, key=_in_order)


def _in_order(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", name)  # text and digits alternate
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name
