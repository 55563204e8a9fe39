"""The orientation that a camera wrote into a picture (EXIF), for JPEG, PNG and WebP."""

import struct
from typing import BinaryIO

HEADER = 1 << 18  # bytes that are searched
ORIENTATION = 0x0112


def orientation(file: BinaryIO) -> int:
    """Returns EXIF's orientation, 1 to 8; 1 (upright) where there is none."""
    place = file.tell()
    file.seek(0)
    data = file.read(HEADER)
    file.seek(place)
    for start, skip in ((data.find(b"Exif\0\0"), 6), (data.find(b"eXIf"), 4), (data.find(b"EXIF"), 8)):
        if start >= 0:
            try:
                return _tag(data[start + skip :])
            except struct.error:
                return 1
    return 1


def _tag(tiff: bytes) -> int:
    """The tag of the orientation in the first directory of a TIFF header."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (place,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, place)
    for number in range(count):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, place + 2 + 12 * number)
        if tag == ORIENTATION and kind == 3 and 1 <= value <= 8:
            return value
    return 1
