"""Cropping that a container asks for: the clean aperture of MP4 and QuickTime, the pixel crop of Matroska.

FFmpeg's libraries hand frames over uncropped, and leave this to players.
"""

import dataclasses
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

MOST = 64 << 20  # bytes of a header that are searched
INSIDE = {b"moov", b"trak", b"mdia", b"minf", b"stbl"}
SAMPLE_ENTRY = 86  # bytes of a visual sample entry before its boxes: 8 header, 78 fields
SEGMENT, TRACKS, TRACK, VIDEO, CLUSTER = 0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675
PIXEL_CROP = {0x54BB: "top", 0x54AA: "bottom", 0x54CC: "left", 0x54DD: "right"}


@dataclasses.dataclass(frozen=True)
class Crop:
    """Rows and columns that are not shown."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def box(self, rows: int, columns: int, share: float = 1.0) -> tuple[int, int, int, int]:
        """(top, bottom, left, right) of the shown part; all where it would be empty. `share` of the rows is there."""
        top, bottom = round(self.top * share), rows - round(self.bottom * share)
        left, right = self.left, columns - self.right
        inside = 0 <= top < bottom <= rows and 0 <= left < right <= columns
        return (top, bottom, left, right) if inside else (0, rows, 0, columns)


def read(file: BinaryIO, format_name: str) -> Crop | None:
    """The crop of the first video track; None where there is none, or the header cannot be read."""
    try:
        if "mp4" in format_name:
            return _clean_aperture(file, 0, file.seek(0, os.SEEK_END))
        if "matroska" in format_name:
            found = _pixel_crop(file, 0, file.seek(0, os.SEEK_END))
            return Crop(**found) if found and any(found.values()) else None
    except (OSError, struct.error, ValueError, IndexError):  # FFmpeg's own reader reports the fault of the file
        return None
    return None


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, start, end) of the contents of each box."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            size, header = struct.unpack(">Q", file.read(8))[0], 16
        size = size or end - start
        if size < header:
            return
        yield kind, start + header, min(start + size, end)
        start += size


def _clean_aperture(file: BinaryIO, start: int, end: int) -> Crop | None:
    for kind, first, last in _boxes(file, start, end):
        found = None
        if kind in INSIDE:
            found = _clean_aperture(file, first, last)
        elif kind == b"stsd":
            entry = next(_boxes(file, first + 8, last), None)
            if entry is None:
                continue
            file.seek(entry[1] + 24)
            width, height = struct.unpack(">HH", file.read(4))
            for inner, place, until in _boxes(file, entry[1] + SAMPLE_ENTRY - 8, entry[2]):
                if inner == b"clap" and until - place >= 32:
                    file.seek(place)
                    found = _centred(struct.unpack(">IIIIiIiI", file.read(32)), width, height)
        if found:
            return found
    return None


def _centred(values: tuple[int, ...], width: int, height: int) -> Crop | None:
    """The crop of a clean aperture: its size, and its centre relative to that of the frame, as fractions."""
    if not all(values[1::2]):
        return None
    columns, rows, right, down = (n / d for n, d in zip(values[::2], values[1::2], strict=True))
    left, top = (width - columns) / 2 + right, (height - rows) / 2 + down
    crop = Crop(round(top), round(height - rows - top), round(left), round(width - columns - left))
    sides = dataclasses.astuple(crop)
    return crop if min(sides) >= 0 and any(sides) else None


def _vint(file: BinaryIO, keep_marker: bool) -> int:
    """A number of variable length of EBML; -1 for an unknown size."""
    first = file.read(1)[0]
    length = 9 - first.bit_length() if first else 9
    if length > 8:
        raise ValueError("no EBML")
    value = first if keep_marker else first & ((1 << (8 - length)) - 1)
    rest = file.read(length - 1)
    whole = int.from_bytes(bytes([value]) + rest, "big")
    return -1 if not keep_marker and whole == (1 << (7 * length)) - 1 else whole


def _pixel_crop(file: BinaryIO, start: int, end: int) -> dict[str, int] | None:
    """The crop of the first track with video, by side."""
    while start < min(end, MOST):
        file.seek(start)
        element, size = _vint(file, True), _vint(file, False)
        first = file.tell()
        last = end if size < 0 else min(first + size, end)
        if element == CLUSTER:  # the header ends here
            return None
        if element == VIDEO:
            return dict(_sides(file, first, last))
        if element in (SEGMENT, TRACKS, TRACK):
            found = _pixel_crop(file, first, last)
            if found is not None:
                return found
        start = last
    return None


def _sides(file: BinaryIO, start: int, end: int) -> Iterator[tuple[str, int]]:
    while start < end:
        file.seek(start)
        element, size = _vint(file, True), _vint(file, False)
        start = file.tell() + max(size, 0)
        if element in PIXEL_CROP and 0 < size <= 8:
            yield PIXEL_CROP[element], int.from_bytes(file.read(size), "big")
