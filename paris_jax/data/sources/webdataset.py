"""Tar shards in WebDataset's layout as a source of clips: members with one key are one sample.

A sample is a video (mp4, webm, gif and others) with a .txt or .json of its caption. Local shards are read in place;
shards on gs:// are copied, one after another, to the temporary folder while their clips are decoded. Broken members
are dropped, and the shard is read on behind them.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from etils import epath

from paris_jax.artifacts import safe_files
from paris_jax.artifacts.schemas import SourceItem
from paris_jax.data.sources.captions import CAPTION_COLUMNS
from paris_jax.data.sources.clip import Dropped, Video
from paris_jax.data.sources.source import Source
from paris_jax.data.sources.video_file import VIDEOS, Cutting, Part, VideoFile, is_hidden
from paris_jax.errors import UserError, first_line

ENDINGS = (".tar", ".tar.gz", ".tgz")
CAPTIONS = (".txt", ".caption", ".text")
MOST_BYTES = 16 << 20  # of a caption's member
BLOCK = tarfile.BLOCKSIZE


@dataclasses.dataclass(frozen=True)
class WebDatasetSource(Source):
    """The videos of tar shards, in order of the shards' names and of their members.

    Attributes:
      root: the common beginning of all shards' paths.
      names: the rest of their paths.
      caption_column: field of .json members; "" for the usual ones.
    """

    root: str
    names: tuple[str, ...]
    caption_column: str
    cutting: Cutting

    items_per_shard = 1  # tar shards, of which each holds many clips

    @classmethod
    def open(cls, data: Any) -> "WebDatasetSource":
        """Lists the shards of `data.path`: a directory, a pattern with * or {000..099}, or one file.

        Raises:
          UserError: no shard is there.
        """
        paths = sorted({str(path) for pattern in expand(data.path) for path in _match(pattern)})
        if not paths:
            raise UserError(
                f"data.path={data.path}: holds no tar shard; give a directory, a file, or a pattern such as "
                "gs://bucket/clips-{{000..099}}.tar"
            )
        root = _common_folder(paths)
        names = tuple(path.removeprefix(root) for path in paths)
        return cls(root, names, data.caption_column, Cutting.of(data))

    def __len__(self) -> int:
        return len(self.names)

    def item(self, index: int) -> SourceItem:
        path, name = self.root + self.names[index], self.names[index]
        try:
            if safe_files.is_local(path):
                found = os.stat(path)
                return SourceItem(name, str((found.st_size, found.st_mtime_ns)))
            remote = epath.Path(path).stat()
            return SourceItem(name, str((remote.length, remote.mtime)))
        except OSError as error:
            return SourceItem(name, f"cannot be read: {error.strerror or error}")

    def content(self, index: int) -> str:
        path = self.root + self.names[index]
        if not safe_files.is_local(path):
            return ""
        try:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return ""

    def identity(self) -> dict[str, Any]:
        return {"name": "webdataset"}

    def describe(self) -> dict[str, Any]:
        return {"name": "webdataset", "shards": len(self.names)}

    def videos(self, index: int) -> Iterator[Video | Dropped]:
        name = self.names[index]
        try:
            shard = Staged.of(self.root + name)
            with open(shard.path, "rb") as file:
                yield from self._samples(name, shard, file)
        except (OSError, EOFError, gzip.BadGzipFile) as error:
            yield Dropped(name, "read", "cannot be opened", first_line(error)[:300])

    def _samples(self, shard: str, staged: "Staged", file: BinaryIO) -> Iterator[Video | Dropped]:
        seen = set[str]()
        members = _named(read_members(file, shard))
        for key, group in itertools.groupby(members, key=lambda found: found[0]):
            parts = dict[str, tarfile.TarInfo]()
            for _, ending, member in group:
                if isinstance(member, Dropped):
                    yield member
                else:
                    parts.setdefault(ending, member)
            if not parts:
                continue
            name = f"{shard}/{key}"
            if key in seen:
                yield Dropped(name, "read", "repeats the key of another sample")
                continue
            seen.add(key)
            yield self._sample(name, parts, staged, file)

    def _sample(
        self, name: str, parts: dict[str, tarfile.TarInfo], staged: "Staged", file: BinaryIO
    ) -> Video | Dropped:
        video = next((ending for ending in parts if ending in VIDEOS), None)
        if video is None:
            return Dropped(name, "read", "holds no video", "only " + ", ".join(sorted(parts)))
        try:
            caption = " ".join(self._caption(parts, file).split())
        except ValueError as error:
            return Dropped(name, "read", "has a caption that cannot be read", first_line(error)[:300])
        if not caption:
            return Dropped(name, "read", "has no caption")
        member = parts[video]
        return VideoFile(name, Part(staged.path, member.offset_data, member.size, staged), caption, self.cutting)

    def _caption(self, parts: dict[str, tarfile.TarInfo], file: BinaryIO) -> str:
        """The caption of a sample, "" for none; raises ValueError for one that cannot be read."""
        for ending in CAPTIONS:
            if ending in parts:
                return _read(file, parts[ending]).decode("utf-8-sig")
        if ".json" not in parts:
            return ""
        fields = msgspec.json.decode(_read(file, parts[".json"]))
        if isinstance(fields, str):
            return fields
        names = (self.caption_column,) if self.caption_column else CAPTION_COLUMNS
        texts = [fields[name] for name in names if isinstance(fields, dict) and isinstance(fields.get(name), str)]
        return texts[0] if texts else ""


def _read(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if member.size > MOST_BYTES:
        raise ValueError(f"{member.name} has {member.size:,} bytes")
    file.seek(member.offset_data)
    return file.read(member.size)


def _named(members: Iterator[tarfile.TarInfo | Dropped]) -> Iterator[tuple[str, str, tarfile.TarInfo | Dropped]]:
    """Key and ending of each member: the name up to the first dot behind the last slash, and the rest in small."""
    for member in members:
        if isinstance(member, Dropped):
            yield member.id, "", member
            continue
        folder, _, base = member.name.removeprefix("./").rpartition("/")
        if is_hidden(base) or is_hidden(folder.partition("/")[0]):
            continue
        stem, _, ending = base.partition(".")
        yield (f"{folder}/{stem}" if folder else stem), f".{ending.lower()}", member


def read_members(file: BinaryIO, shard: str) -> Iterator[tarfile.TarInfo | Dropped]:
    """Yields the regular members of a tar file; where a header is damaged, goes on at the next one."""
    size = file.seek(0, os.SEEK_END)
    start = 0
    while start < size:
        file.seek(start)
        try:
            archive = tarfile.TarFile("", fileobj=file)
        except (tarfile.TarError, OSError) as error:
            following = _next_header(file, start, size)
            yield Dropped(f"{shard}, byte {start}", "read", "is no tar file here", first_line(error)[:200])
            start = following
            continue
        with archive:
            yield from _regular(archive, shard, size)
            end = archive.offset
        start = size if _is_end(file, end, size) else end
        if start < size:
            following = _next_header(file, start, size)
            yield Dropped(f"{shard}, byte {start}", "read", "has a damaged header", f"read on at byte {following}")
            start = following


def _regular(archive: tarfile.TarFile, shard: str, size: int) -> Iterator[tarfile.TarInfo | Dropped]:
    with contextlib.suppress(tarfile.TarError, EOFError, OSError):  # the search continues behind it
        while (member := archive.next()) is not None:
            setattr(archive, "members", [])  # tarfile keeps all that it has read  # noqa: B010
            if member.isdir():
                continue
            name = f"{shard}/{member.name}"
            if not member.isreg() or member.issparse():
                yield Dropped(name, "read", "is no regular member")
            elif member.offset_data + member.size > size:
                yield Dropped(name, "read", "breaks off", f"{size - member.offset_data} of {member.size} bytes")
            else:
                yield member


def _is_end(file: BinaryIO, place: int, size: int) -> bool:
    """Whether a tar file ends at a place: nothing, or zeros, follow."""
    if place >= size:
        return True
    file.seek(place)
    block = file.read(BLOCK)
    return not block.strip(b"\0")


def _next_header(file: BinaryIO, start: int, size: int) -> int:
    """The place of the next block that is a header; the size of the file if there is none."""
    place = start - start % BLOCK + BLOCK
    while place < size:
        file.seek(place)
        chunk = file.read(BLOCK * 2048)
        for offset in range(0, len(chunk) - BLOCK + 1, BLOCK):
            block = chunk[offset : offset + BLOCK]
            if block[257:262] == b"ustar":
                with contextlib.suppress(tarfile.HeaderError):
                    tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                    return place + offset
        place += len(chunk) if len(chunk) % BLOCK == 0 and chunk else size
    return size


@dataclasses.dataclass(eq=False)
class Staged:
    """A shard as a local file: itself, or a copy that is deleted once nothing refers to it."""

    path: str
    is_copy: bool = False

    @classmethod
    def of(cls, path: str) -> "Staged":
        """Copies a shard that is not local, or compressed."""
        if safe_files.is_local(path):
            with open(path, "rb") as file:
                if file.read(2) != b"\x1f\x8b":
                    return cls(path)
        handle, copy = tempfile.mkstemp(prefix="paris_jax-", suffix=".tar")
        staged = cls(copy, True)
        with os.fdopen(handle, "wb") as out, epath.Path(path).open("rb") as source:
            first = source.read(2)
            source.seek(0)
            shutil.copyfileobj(gzip.GzipFile(fileobj=source) if first == b"\x1f\x8b" else source, out, 1 << 20)
        return staged

    def __del__(self):
        if self.is_copy:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    def __reduce__(self):  # a worker process must not delete the copy
        return Staged, (self.path,)


def _common_folder(paths: list[str]) -> str:
    """The common beginning of the folders of all paths, with its slash; "" for files of the working directory."""
    folders = [path.split("/")[:-1] for path in paths]
    shared = list(itertools.takewhile(lambda names: len(set(names)) == 1, zip(*folders)))
    return "".join(f"{names[0]}/" for names in shared)


def expand(pattern: str) -> list[str]:
    """Patterns of shards: "a-{000..002}.tar" and "{a,b}.tar" are several."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        low, high = int(span[1]), int(span[2])
        if high - low > 1_000_000 or high < low:
            raise UserError(f"data.path={pattern}: {{{match[1]}}} must be a range of up to a million shards")
        choices = [f"{number:0{len(span[1])}d}" for number in range(low, high + 1)]
    else:
        choices = match[1].split(",")
    return [each for choice in choices for each in expand(pattern[: match.start()] + choice + pattern[match.end() :])]


def _match(pattern: str) -> list[epath.Path]:
    """The tar files that a pattern without braces means."""
    path = epath.Path(pattern)
    if "*" in pattern or "?" in pattern:
        base = Path(re.split(r"[*?]", pattern)[0]).parent if "://" not in pattern else None
        root = str(base) if base is not None else re.split(r"[*?]", pattern)[0].rsplit("/", 1)[0]
        found = epath.Path(root).glob(pattern[len(root) :].lstrip("/"))
    elif path.is_dir():
        found = path.iterdir()
    else:
        return [path] if path.exists() else []
    return [each for each in found if each.name.endswith(ENDINGS) and not is_hidden(each.name)]
