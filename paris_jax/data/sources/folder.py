"""Real video as a source of clips: a directory of video files or folders of frames, with captions.

Captions come from tables (`sources.captions`), or from a .txt file of the same name beside each video.
"""

import dataclasses
import hashlib
import os
import stat
import types
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from paris_jax.artifacts import safe_files
from paris_jax.artifacts.schemas import SourceItem
from paris_jax.data.sources import captions
from paris_jax.data.sources.clip import Dropped, Video
from paris_jax.data.sources.source import Source
from paris_jax.data.sources.video_file import VIDEOS, Cutting, FrameFolder, VideoFile, is_hidden, pictures
from paris_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FolderSource(Source):
    """Consecutive clips of every video of a directory, in order of name.

    Videos are resampled to the clips' frame rate (the frame displayed at each instant), scaled to cover height x width
    and cropped to the centre.

    Attributes:
      root: the directory.
      names: paths of the videos, relative to it, with forward slashes.
      captions: by name, from tables; the other videos may have a text file beside them.
    """

    root: str
    names: tuple[str, ...]
    captions: dict[str, str]
    cutting: Cutting = Cutting(1, 1, 1, 1.0)
    dropped: tuple[Dropped, ...] = ()

    items_per_shard = 64  # videos, of which each gives several clips

    @classmethod
    def open(cls, data: Any) -> "FolderSource":
        """Lists the videos of `data.path` and reads the caption tables; opens no video.

        Raises:
          UserError: not a directory, no video in it, or a caption table that cannot be read.
        """
        root = Path(data.path)
        if not safe_files.is_local(data.path):
            raise UserError(f"data.path={data.path}: must be a local directory; copy the videos to this machine first")
        if not root.is_dir():
            raise UserError(f"data.path={root}: is not a directory; give the directory that holds the videos")
        listing = Listing(root)
        names = listing.names()
        if not names and not listing.dropped:
            raise UserError(
                f"data.path={root}: holds no video; put {', '.join(VIDEOS[:3])} files or folders of frames there, "
                "with captions in captions.csv"
            )
        found, faults = _read_captions(root, names, listing.aliases, data)
        return cls(str(root), tuple(names), found, Cutting.of(data), (*listing.dropped, *faults))

    def __len__(self) -> int:
        return len(self.names)

    def videos(self, index: int) -> Iterator[Video | Dropped]:
        name = self.names[index]
        path = Path(self.root, name)
        try:
            caption = self.caption_of(name)
        except UserError as error:
            yield Dropped(name, "list", "has a caption that cannot be read", str(error))
            return
        if not caption:
            yield Dropped(name, "list", "has no caption")
        elif path.is_dir():
            yield FrameFolder(name, str(path), caption, self.cutting)
        else:
            yield VideoFile(name, str(path), caption, self.cutting)

    def caption(self, index: int) -> str | None:
        try:
            return self.caption_of(self.names[index])
        except (UserError, OSError):
            return None

    def caption_of(self, name: str) -> str:
        """The caption of a video, "" for none; raises UserError for a text file that is not UTF-8."""
        text = self.captions.get(name)
        beside = _beside(Path(self.root, name))
        if text is None and beside.is_file():
            text = captions.read_text(beside)
        return " ".join((text or "").split())

    def item(self, index: int) -> SourceItem:
        name = self.names[index]
        try:
            states = [(path.name, found.st_size, found.st_mtime_ns) for path, found in self._files(name)]
        except OSError as error:
            return SourceItem(name, f"cannot be read: {error.strerror}")
        state = states[0][1:] if len(states) == 1 else hashlib.sha256(repr(states).encode()).hexdigest()
        return SourceItem(name, str(state), hashlib.sha256((self.caption(index) or "").encode()).hexdigest()[:32])

    def content(self, index: int) -> str:
        digest = hashlib.sha256()
        try:
            for path, _ in self._files(self.names[index]):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            return ""
        return digest.hexdigest()

    def _files(self, name: str) -> list[tuple[Path, os.stat_result]]:
        """The files of a video, or of a folder of frames, with their states."""
        path = Path(self.root, name)
        return [(each, each.stat()) for each in (map(path.joinpath, pictures(path)) if path.is_dir() else [path])]

    def identity(self) -> dict[str, Any]:
        return {"name": "folder"}

    def describe(self) -> dict[str, Any]:
        return {"name": "folder", "videos": len(self.names)}


def _beside(path: Path) -> Path:
    """The text file of a video."""
    return path.with_suffix(".txt") if path.suffix.lower() in VIDEOS else path.with_name(f"{path.name}.txt")


class Listing:
    """Finds the videos below a directory: each file and folder once, however many links lead to it."""

    def __init__(self, root: Path):
        self.root = root
        self.dropped: list[Dropped] = []
        self.aliases: dict[str, str] = {}  # name of a link -> name that is kept
        self._found: dict[str, list[tuple[bool, str]]] = {}  # real path -> (is reached through a link, name)
        self._visited: set[str] = set()  # real paths of folders
        self._links: list[tuple[Path, str]] = []  # to folders, followed after the folders themselves

    def names(self) -> list[str]:
        """The relative names of all videos and folders of frames, sorted; a file's own name before those of links."""
        self._walk(self.root, "", False)
        for link, name in self._links:  # grows while links are followed
            if self._leads_above(link):
                self.dropped.append(Dropped(_printable(name), "list", "is a link to a folder above the directory"))
            else:
                self._walk(link, name, True)
        kept = []
        for candidates in self._found.values():
            first, *others = [name for _, name in sorted(candidates)]
            kept.append(first)
            self.aliases |= dict.fromkeys(others, first)
        return sorted(kept)

    def _leads_above(self, link: Path) -> bool:
        target, root = os.path.realpath(link), os.path.realpath(self.root)
        return target != root and os.path.commonpath([target, root]) == target

    def _walk(self, folder: Path, prefix: str, linked: bool) -> bool:
        """Lists one folder; returns whether it, or one below, holds a video."""
        real = os.path.realpath(folder)
        if real in self._visited:
            return False
        self._visited.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self.dropped.append(Dropped(_printable(prefix or "."), "list", "cannot be opened", error.strerror or ""))
            return False
        found = False
        for entry in entries:
            if is_hidden(entry.name):
                continue
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir() and entry.is_symlink():
                self._links.append((Path(entry.path), name))
            elif entry.is_dir():
                found |= self._walk(Path(entry.path), name, linked)
            elif Path(entry.name).suffix.lower() in VIDEOS:
                found |= self._is_usable(entry, name) and self._keep(entry.path, name, linked or entry.is_symlink())
        if not found and prefix and self._holds_pictures(folder):
            found = self._is_named_in_utf8(prefix) and self._keep(str(folder), prefix, linked)
        return found

    def _holds_pictures(self, path: Path) -> bool:
        try:
            return bool(pictures(path))  # images beside videos are thumbnails, not frames
        except OSError:
            return False

    def _keep(self, path: str, name: str, linked: bool) -> bool:
        self._found.setdefault(os.path.realpath(path), []).append((linked, name))
        return True

    def _is_usable(self, entry: os.DirEntry, name: str) -> bool:
        fault = ""
        try:
            if not stat.S_ISREG(entry.stat().st_mode):
                fault = "is not a regular file"
        except FileNotFoundError:
            fault = "is a link to a file that is not there"
        except OSError as error:
            fault = f"cannot be opened: {error.strerror}"
        if fault:
            self.dropped.append(Dropped(_printable(name), "list", fault))
        return not fault and self._is_named_in_utf8(name)

    def _is_named_in_utf8(self, name: str) -> bool:
        try:
            name.encode()
        except UnicodeEncodeError:
            self.dropped.append(Dropped(_printable(name), "list", "has a name that is not UTF-8"))
            return False
        return True


def _printable(name: str) -> str:
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _read_captions(
    root: Path, names: list[str], aliases: dict[str, str], data: Any
) -> tuple[dict[str, str], list[Dropped]]:
    """Captions by name from all tables, and the lines that are not used."""
    known = dict.fromkeys(names)
    lookup = _Lookup(root, known.keys() | aliases.keys())
    found: dict[str, str] = {}
    dropped: list[Dropped] = []
    tables = captions.find_tables(root, data.captions)
    rows: list[Iterator[tuple[str, str, str] | Dropped]] = [
        captions.read_table(path, data.video_column, data.caption_column) for path in tables
    ]
    for row in (row for each in (*rows, captions.read_lists(root) if not data.captions else ()) for row in each):
        if isinstance(row, Dropped):
            dropped.append(row)
            continue
        file, caption, place = row
        name = lookup.find(file)
        if name is None:
            dropped.append(Dropped(place, "list", "names a file that is not there", file))
            continue
        name = aliases.get(name, name)
        if name in found:
            dropped.append(Dropped(place, "curate", "is a further caption of a video", name))
        else:
            found[name] = caption
    return found, dropped


class _Lookup:
    """Finds the video that a table means: by its path from the directory, however it is written."""

    def __init__(self, root: Path, names: Any):
        self.root, self.names = root, names
        self.composed: dict[str, str] = {}  # names in Unicode's composed form, where they are not written so
        for name in names:
            if not name.isascii():
                self.composed[unicodedata.normalize("NFC", name)] = name

    def find(self, file: str) -> str | None:
        for written in (file, file.strip(), file.replace("\\", "/")):
            for path in (written, self._inside(written)):
                if path in self.names:
                    return path
                composed = unicodedata.normalize("NFC", path)
                if composed in self.composed:
                    return self.composed[composed]
        return next((file + ending for ending in VIDEOS if file + ending in self.names), None)

    def _inside(self, file: str) -> str:
        path = os.path.normpath(file)
        if os.path.isabs(path):
            path = os.path.relpath(path, os.path.abspath(self.root))
        return path.replace(os.sep, "/")


def read_captions(root: epath.PathLike) -> dict[str, str]:
    """Returns the caption of every video under a directory; raises UserError for a video without one."""
    listing = Listing(Path(root))
    names = listing.names()
    settings = types.SimpleNamespace(captions="", video_column="", caption_column="")
    source = FolderSource(str(root), tuple(names), _read_captions(Path(root), names, listing.aliases, settings)[0])
    found = {name: source.caption_of(name) for name in names}
    if missing := [name for name in names if not found[name]]:
        raise UserError(
            f"{Path(root, missing[0])} has no caption; add a line to {Path(root, 'captions.csv')} or write it in "
            f"{_beside(Path(root, missing[0]))}"
        )
    return found


def find(root: epath.PathLike) -> list[str]:
    """Returns the relative names of all videos and folders of frames under a directory, sorted."""
    return Listing(Path(root)).names()
