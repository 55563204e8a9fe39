"""Writes videos with every kind of fault and oddity, each with what is expected of it.

The picture: red in the top left quarter, green in the top right, blue in the bottom left, white in the bottom right,
so that a frame shows how it was turned. Displayed upright it is 48 rows x 64 columns, for two seconds.
"""

import os
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

ROWS, COLUMNS, RATE, FRAMES = 48, 64, 10, 20
RED, GREEN, BLUE, WHITE = (220, 20, 20), (20, 200, 20), (20, 20, 220), (240, 240, 240)


def picture(rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    image = np.empty((rows, columns, 3), np.uint8)
    image[: rows // 2, : columns // 2], image[: rows // 2, columns // 2 :] = RED, GREEN
    image[rows // 2 :, : columns // 2], image[rows // 2 :, columns // 2 :] = BLUE, WHITE
    return image


def write(
    path: Path,
    images: list[np.ndarray] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
    aspect: Fraction | None = None,
    matrix: list[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    tags: tuple[int, int, int] | None = None,
    source_format: str = "rgb24",
    audio: bool = False,
    video: bool = True,
    rate: int = RATE,
    metadata: dict[str, str] | None = None,
) -> None:
    images = [picture()] * FRAMES if images is None else images
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as file:
        sound = file.add_stream("aac", rate=44100, layout="mono") if audio else None
        if video:
            stream = file.add_stream(codec, rate=rate, options=options or {})
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix_fmt
            context = stream.codec_context
            if aspect:
                context.sample_aspect_ratio = aspect
            if tags:
                context.color_primaries, context.color_trc, context.colorspace = tags
            if matrix:
                stream.set_display_matrix(matrix)
            for name, value in (metadata or {}).items():
                stream.metadata[name] = value
            for number, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=source_format)
                if pix_fmt != source_format and tags:
                    frame = frame.reformat(format=pix_fmt, dst_colorspace={6: 5}.get(tags[2], tags[2]))
                frame.pts, frame.time_base = times[number] if times else number, Fraction(1, rate)
                if tags:
                    frame.colorspace, frame.color_trc = tags[2], tags[1]
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts, silence.time_base = 44100, 0, Fraction(1, 44100)
            file.mux(sound.encode(silence))
            file.mux(sound.encode(None))


def matrix(a: float, b: float, c: float, d: float) -> list[int]:
    """x' = a x + c y, y' = b x + d y, as FFmpeg has it: 16.16 fixed point."""
    return [round(v * 65536) for v in (a, b, 0, c, d, 0)] + [0, 0, 1 << 30]


# A display matrix, and how to lay out pixels so that the display is upright.
TURNS: dict[str, tuple[list[int], Callable[[np.ndarray], np.ndarray]]] = {
    "clockwise": (matrix(0, 1, -1, 0), lambda image: np.rot90(image)),
    "counterclockwise": (matrix(0, -1, 1, 0), lambda image: np.rot90(image, -1)),
    "half": (matrix(-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "mirrored": (matrix(-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "flipped": (matrix(1, 0, 0, -1), lambda image: image[::-1]),
    "transposed": (matrix(0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    "transversed": (matrix(0, -1, -1, 0), lambda image: image[::-1, ::-1].swapaxes(0, 1)),
}


def clean_aperture(path: Path, rows: int, columns: int) -> None:
    """Adds a clean aperture of this size, in the middle, to the video of an mp4 file whose header is at its end."""
    data = bytearray(path.read_bytes())
    clap = struct.pack(">I4sIIIIiIiI", 40, b"clap", columns, 1, rows, 1, 0, 1, 0, 1)
    entry = data.index(b"avc1", data.index(b"stsd")) - 4
    end = entry + struct.unpack(">I", data[entry : entry + 4])[0]
    data[end:end] = clap
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        place = (data.index(name, data.index(b"moov")) if name != b"avc1" else entry + 4) - 4
        size = struct.unpack(">I", data[place : place + 4])[0]
        data[place : place + 4] = struct.pack(">I", size + len(clap))
    path.write_bytes(data)


def pixel_crop(path: Path, top: int, bottom: int, left: int, right: int) -> None:
    """Adds crops to the video track of a Matroska file."""
    data = bytearray(path.read_bytes())
    crops = b"".join(
        struct.pack(">HBB", element, 0x81, value)
        for element, value in ((0x54BB, top), (0x54AA, bottom), (0x54CC, left), (0x54DD, right))
    )
    segment, inside, _ = _element(data, "18538067", 0, len(data))
    tracks, inside, end = _element(data, "1654AE6B", inside, len(data))
    track, inside, end = _element(data, "AE", inside, end)
    video, _, end = _element(data, "E0", inside, end)
    for size in (video, track, tracks, segment):
        _grow(data, size, len(crops))
    data[end:end] = crops
    path.write_bytes(data)


def _element(data: bytearray, identifier: str, start: int, end: int) -> tuple[int, int, int]:
    """The first element of EBML with this identifier between two places: where its size, content and end are."""
    while start < end:
        size = start + 9 - data[start].bit_length()
        _, length, value = _vint(data, size)
        content = size + length
        if data[start:size].hex().upper() == identifier:
            return size, content, content + value
        start = content + value
    raise ValueError(f"no element {identifier}")


def _vint(data: bytearray, place: int) -> tuple[int, int, int]:
    length = 9 - data[place].bit_length()
    value = int.from_bytes(data[place : place + length], "big") & ((1 << (7 * length)) - 1)
    return place, length, value


def _grow(data: bytearray, place: int, more: int) -> None:
    """Adds to a size of EBML, which must have room in its bytes."""
    _, length, value = _vint(data, place)
    if value == (1 << (7 * length)) - 1:  # unknown
        return
    assert value + more < (1 << (7 * length)) - 1
    data[place : place + length] = ((1 << (7 * length)) | (value + more)).to_bytes(length, "big")


def combed() -> np.ndarray:
    """A frame whose lower field is black where the upper is white, as at a fast motion: even rows 230, odd rows 20."""
    image = np.full((ROWS, COLUMNS, 3), 20, np.uint8)
    image[::2] = 230
    return image


def noise(seed: int) -> np.ndarray:
    """A frame that does not compress."""
    return np.random.default_rng(seed).integers(0, 255, (ROWS, COLUMNS, 3)).astype(np.uint8)


def write_all(root: Path) -> dict[str, str]:
    """Writes a folder of all kinds of faults; returns the reason of each file that cannot be used."""
    write(root / "fine.mp4")
    write(root / "sound.mp4", audio=True)
    whole = (root / "fine.mp4").read_bytes()
    (root / "zero.mp4").write_bytes(b"")
    (root / "junk.mp4").write_bytes(b"this is not a video" * 100)
    (root / "list.mp4").write_text("ffconcat version 1.0\nfile fine.mp4\n")  # would open another file
    write(root / "only_sound.mp4", audio=True, video=False)
    write(root / "one_frame.mp4", [picture()])
    (root / "no_header.mp4").write_bytes(whole[: len(whole) // 2])  # the header is at the end
    write(root / "cut_off.mp4", [noise(i) for i in range(40)], container={"movflags": "faststart"})
    data = (root / "cut_off.mp4").read_bytes()
    (root / "cut_off.mp4").write_bytes(data[: len(data) * 7 // 10])  # the header is at the start
    for name, transfer in (("pq.mp4", 16), ("hlg.mp4", 18)):
        tags, options = (9, transfer, 9), {"x265-params": "log-level=none"}
        write(root / name, codec="libx265", pix_fmt="yuv420p10le", tags=tags, options=options)
    write(root / "tilted.mp4", matrix=matrix(0.7, 0.7, -0.7, 0.7))
    for name in (".hidden.mp4", "._fine.mp4", "__MACOSX/fine.mp4"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not the user's")
    for name in NAMES:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(whole)
    (root / "link.mp4").symlink_to("fine.mp4")
    (root / "gone.mp4").symlink_to("nowhere.mp4")
    (root / "linked").symlink_to("sub", target_is_directory=True)
    (root / "sub" / "parent").symlink_to("..", target_is_directory=True)
    (root / "above").symlink_to(root.parent, target_is_directory=True)
    os.mkfifo(root / "pipe.mp4")
    return {
        "zero.mp4": "is empty",
        "junk.mp4": "cannot be read as video",
        "list.mp4": "cannot be read as video",
        "only_sound.mp4": "holds no video stream",
        "one_frame.mp4": "is shorter than one clip",
        "no_header.mp4": "cannot be read as video",
        "cut_off.mp4#0002": "breaks off",
        "pq.mp4": "is HDR",
        "hlg.mp4": "is HDR",
        "tilted.mp4": "is tilted",
        "gone.mp4": "is a link to a file that is not there",
        "pipe.mp4": "is not a regular file",
        "above": "is a link to a folder above the directory",
    }


NAMES = (
    *("with space.mp4", "quote'\".mp4", "new\nline.mp4", "12:30.mp4", "100%d.mp4", "a#0001.mp4", "{x}*?[1].mp4"),
    *("é.mp4", "e\u0301.mp4", "视频.mp4", "🎬.mp4", "\u202egnp.mp4", "UPPER.MP4", "sub/fine.mp4", "-rf.mp4"),
)
