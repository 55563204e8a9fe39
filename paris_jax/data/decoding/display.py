"""Displays decoded frames: upright, at their aspect, cropped, without a comb or transparency, in SDR colours."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import av
import av.filter
import av.video.reformatter
import numpy as np
from av.sidedata.sidedata import Type as SideData

from paris_jax.data import video
from paris_jax.data.decoding import cropping, hdr
from paris_jax.errors import UserError

MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}  # of a frame's colours -> PyAV's Colorspace
HDR = {16: "PQ", 18: "HLG"}  # transfer functions
Scale = Callable[[float, float], tuple[int, int]]


class BadVideo(UserError):
    """A video that cannot be used.

    Attributes:
      reason: the kind of fault, the same words for every file.
      detail: the finding in this file.
    """

    def __init__(self, path: object, reason: str, detail: str = ""):
        more = f" ({detail})" if detail else ""
        super().__init__(f"{path} {reason}{more}; replace or remove the file, then run the same command again")
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Rules:
    """Choices of how frames become SDR pixels.

    Attributes:
      hdr: "drop" refuses PQ and HLG, "tonemap" brings them to SDR.
      background: colour (R, G, B) below transparent pixels.
    """

    hdr: str = "drop"
    background: tuple[int, int, int] = (0, 0, 0)


class Header(NamedTuple):
    """Properties of a file that FFmpeg's libraries do not report: its cropping, and the orientation of a photograph."""

    crop: cropping.Crop | None = None
    exif: int = 1


class Display:
    """Turns decoded frames of one stream into displayed images, (H, W, 3) uint8."""

    def __init__(self, stream: av.VideoStream, header: Header, scale: Scale | None, rules: Rules, name: object):
        self.stream, self.header, self.scale, self.rules, self.name = stream, header, scale, rules, name
        self.reformatter = av.video.reformatter.VideoReformatter()
        self.field: Any = None  # the graph that takes one field of interlaced frames

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        transfer = HDR.get(int(frame.color_trc), "")
        if not transfer and int(frame.color_trc) == 2 and _side_data(frame, SideData.DOVI_METADATA) is not None:
            raise BadVideo(self.name, "is Dolby Vision without a layer for other screens")
        if transfer and self.rules.hdr != "tonemap":
            raise BadVideo(self.name, "is HDR", f"{transfer}; data.hdr=tonemap brings it to SDR")
        turn = EXIF[self.header.exif] if self.header.exif != 1 else orientation(frame, self.name)
        aspect = _pixel_aspect(self.stream)
        if frame.interlaced_frame:
            frame, aspect = self._one_field(frame), aspect / 2
        rows, columns = frame.height, frame.width
        if self.header.crop:  # in rows of whole frames
            box = self.header.crop.box(rows, columns, rows / max(self.stream.height or rows, 1))
            rows, columns = box[1] - box[0], box[3] - box[2]
        else:
            box = None
        shown = (float(rows), columns * float(aspect)) if aspect >= 1 else (rows / float(aspect), float(columns))
        shown = shown[::-1] if turn.transpose else shown
        size = self.scale(*shown) if self.scale else (max(1, round(shown[0])), max(1, round(shown[1])))
        if turn.transpose:
            size = size[1], size[0]
        image = self._pixels(frame, size, box, transfer)
        return turn(image)

    def _one_field(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The first of two fields that were taken at different times and would show as a comb."""
        key = (frame.format.name, frame.width, frame.height)
        if self.field is None or self.field[0] != key:
            graph = av.filter.Graph()
            source = graph.add_buffer(
                width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 1000)
            )
            field, sink = graph.add("field", "type=top"), graph.add("buffersink")
            source.link_to(field)
            field.link_to(sink)
            graph.configure()
            self.field = key, graph
        graph = self.field[1]
        graph.push(frame)
        return graph.pull()

    def _pixels(
        self, frame: av.VideoFrame, size: tuple[int, int], box: tuple[int, int, int, int] | None, transfer: str
    ) -> np.ndarray:
        """Converts to RGB at `size`; composites, crops and tone-maps where the frame asks for it."""
        if transfer:
            image = self._to(frame, "rgb48le", None if box else size)
            sdr = hdr.to_sdr(_cut(image, box), transfer)
            return sdr if not box else self._resize(sdr, size)
        if _has_alpha(frame):
            image = _cut(self._to(frame, "rgba", None), box).astype(np.uint16)
            over, alpha = image[..., :3], image[..., 3:]
            background = np.asarray(self.rules.background, np.uint16)
            flat = ((over * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)
            return self._resize(flat, size)
        if box:
            return self._resize(_cut(self._to(frame, "rgb24", None), box), size)
        return self._to(frame, "rgb24", size)

    def _to(self, frame: av.VideoFrame, format: str, size: tuple[int, int] | None) -> np.ndarray:
        height, width = size or (frame.height, frame.width)
        colours: dict[str, Any] = {}
        if not frame.format.is_rgb and not frame.format.has_palette:
            # An unspecified matrix follows the size, as in players: BT.709 for HD, BT.601 below.
            unsaid = 1 if frame.height >= 720 else 5
            colours = {
                "src_colorspace": MATRICES.get(int(frame.colorspace), unsaid),
                "src_color_range": int(frame.color_range),
                "dst_color_range": 2,
            }
        scaled = self.reformatter.reformat(frame, width, height, format, interpolation="AREA", threads=1, **colours)
        return scaled.to_ndarray()

    def _resize(self, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return video.resize(image, *size)


def _cut(image: np.ndarray, box: tuple[int, int, int, int] | None) -> np.ndarray:
    return image if box is None else image[box[0] : box[1], box[2] : box[3]]


def _has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width of a pixel divided by its height; 1 where it is not said, or absurd."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    return Fraction(aspect) if Fraction(1, 16) <= aspect <= 16 else Fraction(1)


def _side_data(frame: Any, kind: SideData) -> Any:
    try:
        return frame.side_data.get(kind)
    except ValueError:  # PyAV refuses all of it where FFmpeg has a kind that PyAV does not know
        return None


@dataclasses.dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay out an image: transposed or not, then columns and rows reversed or not."""

    transpose: bool = False
    mirror: bool = False
    upside_down: bool = False

    def __call__(self, image: np.ndarray) -> np.ndarray:
        if self.transpose:
            image = image.swapaxes(0, 1)
        if self.mirror:
            image = image[:, ::-1]
        if self.upside_down:
            image = image[::-1]
        return np.ascontiguousarray(image)


TURNS = {90: Orientation(True, False, True), 180: Orientation(False, True, True), 270: Orientation(True, True, False)}
EXIF = (
    Orientation(),
    *(Orientation(), Orientation(mirror=True), TURNS[180], Orientation(upside_down=True)),
    *(Orientation(True), TURNS[270], Orientation(True, True, True), TURNS[90]),
)  # by EXIF's number, 1 to 8


def orientation(frame: av.VideoFrame, name: object = "the video") -> Orientation:
    """The orientation that a frame's display matrix asks for: x' = a x + c y, y' = b x + d y.

    Raises:
      BadVideo: the matrix turns by another angle than a multiple of 90 degrees, or shears.
    """
    data = _side_data(frame, SideData.DISPLAYMATRIX)
    if data is None:
        return TURNS.get(round(frame.rotation) % 360, Orientation())
    a, b, _, c, d = (float(value) for value in np.frombuffer(bytes(data), np.int32)[:5])
    largest = max(map(abs, (a, b, c, d)))
    if not largest:
        return Orientation()
    tilt = 0.02 * largest  # no player shows less
    if abs(b) <= tilt and abs(c) <= tilt and min(abs(a), abs(d)) > tilt:
        return Orientation(False, a < 0, d < 0)
    if abs(a) <= tilt and abs(d) <= tilt and min(abs(b), abs(c)) > tilt:
        return Orientation(True, c < 0, b < 0)
    raise BadVideo(name, "is tilted", "its display matrix turns by no multiple of 90 degrees, or shears")
