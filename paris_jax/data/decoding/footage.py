"""Reads video files as a player shows them: every frame upright, at its aspect, in SDR colours, at its time.

Decoders leave to their callers what the container and the stream say about a frame: rotation and flips, the aspect of
its pixels, cropping, fields of interlaced video, transparency, the transfer function of HDR. `decode` applies all of
it, and raises `BadVideo` for a video it cannot show.
"""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import av
import av.container
import av.error
import numpy as np
from av.stream import Disposition

from paris_jax.data.decoding import cropping, exif
from paris_jax.data.decoding.display import BadVideo, Display, Header, Rules, Scale
from paris_jax.errors import first_line

# Demuxers that read one file. Playlists and scripts of concatenation would open whatever they name.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,asf,flv,mpeg,mpegts,mpegvideo,m4v,h264,hevc,ivf,ogg,y4m,yuv4mpegpipe,dv,mxf,nut,rawvideo,wtv,apng,png_pipe,jpeg_pipe,webp_pipe,webp,bmp_pipe,tiff_pipe"  # fmt: skip  # noqa: E501
MOST_ERRORS = 20  # packets that cannot be decoded, after which the rest of a video is given up
DECODING_VERSION = 2  # of the rules by which a file becomes frames: raise it where they change
SHOWN = Rules(hdr="tonemap")  # for videos that are shown or evaluated

Source = str | os.PathLike | bytes | BinaryIO


class Frame(NamedTuple):
    """A displayed frame.

    seconds: from the start of the video. duration: in seconds, 0 where unknown. image: (H, W, 3) uint8. damaged: the
    decoder concealed errors.
    """

    seconds: float
    duration: float
    image: np.ndarray
    damaged: bool


@dataclasses.dataclass(frozen=True)
class Footage:
    """Metadata of a video file.

    Attributes:
      times: presentation time of each frame, (N,) float64, seconds from the start, ascending.
      duration: seconds from the start to the end of the last frame.
      height, width: of the displayed frame, in pixels.
    """

    times: np.ndarray
    duration: float
    height: int
    width: int


@contextlib.contextmanager
def opened(source: Source, name: object = "") -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a video file, or its bytes, and its video stream.

    Raises:
      BadVideo: no file, or one that is empty, no video, of an unknown codec, or that breaks inside the `with`.
    """
    name = name or (source if isinstance(source, str | os.PathLike) else "the video")
    try:
        with contextlib.ExitStack() as stack:
            # Opened here, because FFmpeg would read "12:30.mp4" as a protocol and "%d.png" as a pattern.
            file = stack.enter_context(_binary(source))
            if not file.seek(0, os.SEEK_END):
                raise BadVideo(name, "is empty")
            file.seek(0)
            options = {"format_whitelist": DEMUXERS}
            container: Any = av.open(
                _Unnamed(file), "r", options=options, metadata_errors="replace", buffer_size=1 << 18
            )
            stack.enter_context(container)
            yield container, _video_stream(container, name)
    except (av.error.MemoryError, MemoryError) as error:
        raise BadVideo(name, "needs more memory than allowed", first_line(error)) from error
    except (av.error.FFmpegError, EOFError) as error:
        raise BadVideo(name, "cannot be read as video", _said(error)) from error
    except OSError as error:
        raise BadVideo(name, "cannot be opened", error.strerror or first_line(error)) from error


class _Unnamed:
    """A file whose name FFmpeg does not see: it would take "%d.png" for a pattern, and choose formats by endings."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


@contextlib.contextmanager
def _binary(source: Source) -> Iterator[BinaryIO]:
    """A source as an open file; closes it only if it opened it."""
    if isinstance(source, str | os.PathLike):
        with open(source, "rb", buffering=0) as file:
            yield file
    else:
        yield io.BytesIO(source) if isinstance(source, bytes) else source


def _said(error: BaseException) -> str:
    """An error of FFmpeg without the name of the file and its number, so that equal faults read alike."""
    return re.sub(r"^\[Errno -?\d+\] |: '.*$| returned -?\d+", "", first_line(error), flags=re.DOTALL)[:200]


def _video_stream(container: av.container.InputContainer, name: object) -> av.VideoStream:
    """The first stream of moving pictures: not the cover of a recording."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise BadVideo(name, "holds no video stream", "only sound" if container.streams.audio else "")
    if getattr(streams[0], "codec_context", None) is None:
        raise BadVideo(name, "holds a video of an unknown codec")
    return streams[0]


def origin(stream: av.VideoStream) -> float:
    """The timestamp of a stream's start in seconds: recordings and cuts do not always start at 0."""
    return float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0


def probe(path: Source) -> Footage:
    """Reads duration and size, decoding only the first frame; raises BadVideo for anything but a readable video."""
    with opened(path) as (container, stream):
        base = stream.time_base
        assert base is not None
        packets = sorted(
            (p.pts, p.duration or 0) for p in container.demux(stream) if p.pts is not None and not p.is_discard
        )
        start = origin(stream)
    if not packets:
        raise BadVideo(path, "holds no frames")
    shape = next(decode(path)).image.shape
    times = np.asarray([float(pts * base) - start for pts, _ in packets])
    last = float(packets[-1][1] * base) or (float(np.median(np.diff(times))) if len(times) > 1 else 0.0)
    return Footage(times, float(times[-1]) + last, shape[0], shape[1])


def promised_seconds(file: BinaryIO) -> float:
    """Seconds of video that the header of a file promises; 0 where it promises nothing."""
    with opened(file) as (container, stream):
        if stream.duration and stream.time_base and "mp4" in container.format.name:
            return float(stream.duration * stream.time_base)
        if "matroska" in container.format.name and len(container.streams) == 1 and container.duration:
            return container.duration / av.time_base
    return 0.0


def decode(
    source: Source,
    start: float = 0.0,
    scale: Scale | None = None,
    rules: Rules = SHOWN,
    name: object = "",
    threads: int = 0,
) -> Iterator[Frame]:
    """Yields the displayed frames in order, from the key frame at or before `start`.

    Args:
      source: the file, its bytes, or an open file.
      start: seconds from the start of the video.
      scale: (rows, columns) to scale to (area average), from those of the displayed frame; None keeps them.
      rules: how frames become SDR pixels.
      name: of the video, in errors.
      threads: of the decoder; 0 for as many as it likes.

    Raises:
      BadVideo: not a readable video, or one that cannot be shown; also after some frames, where the file breaks.
    """
    name = name or (source if isinstance(source, str | os.PathLike) else "the video")
    with opened(source, name) as (container, stream):
        decoder = _decoder(stream)
        decoder.thread_count = threads
        decoder.thread_type = "AUTO" if threads != 1 else "SLICE"
        begin = origin(stream)
        if start > 0 and stream.time_base and container.format.name != "gif":  # a GIF is decoded from its start
            container.seek(int((start + begin) / stream.time_base), stream=stream, backward=True)
        show = Display(stream, _header(source, container.format.name), scale, rules, name)
        rate = stream.average_rate or stream.guessed_rate
        step = float(1 / rate) if rate else 0.0
        seconds = -np.inf
        for frame, failed in _frames(container, stream, decoder, name, start > 0):
            if frame is None:
                continue
            if frame.time is None and (not step or start > 0):
                raise BadVideo(name, "has frames without times")
            now = frame.time - begin if frame.time is not None else (seconds + step if seconds > -np.inf else 0.0)
            if now <= seconds:  # a second frame at one time is never shown
                continue
            seconds = now
            duration = float((frame.duration or 0) * frame.time_base) if frame.time_base else 0.0
            yield Frame(seconds, duration or step, show(frame), failed or frame.is_corrupt)


def _decoder(stream: av.VideoStream) -> Any:
    """The decoder of a stream; for VP8 and VP9 with transparency libvpx, because FFmpeg's own leaves it out."""
    context = stream.codec_context
    library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(context.name, "")
    has_alpha = any(name.lower() == "alpha_mode" and value == "1" for name, value in stream.metadata.items())
    if has_alpha and library in av.codecs_available:
        decoder = av.CodecContext.create(library, "r")
        decoder.extradata = context.extradata
        return decoder
    return context


def _frames(
    container: Any, stream: Any, decoder: Any, name: object, may_be_empty: bool
) -> Iterator[tuple[av.VideoFrame | None, bool]]:
    """Decodes all packets: (frame, whether packets before it failed); gives up after MOST_ERRORS."""
    errors, failed, clean = 0, False, 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode() if decoder is stream.codec_context else decoder.decode(packet)
        except av.error.MemoryError:
            raise
        except (av.error.FFmpegError, EOFError) as error:
            if isinstance(error, av.error.EOFError):
                return
            errors, failed = errors + 1, True
            if errors > MOST_ERRORS or not (clean or packet.size):
                raise BadVideo(name, "cannot be decoded", _said(error)) from error
            continue
        for frame in frames:
            frame.time_base = frame.time_base or stream.time_base
            yield frame, failed
            failed, clean = False, clean + 1
    if not clean and not may_be_empty:
        raise BadVideo(name, "holds no frames")


def _header(source: Source, format_name: str) -> Header:
    with _binary(source) as file:
        place = file.tell()
        try:
            is_picture = format_name.endswith("_pipe") or format_name.startswith("webp")
            return Header(cropping.read(file, format_name), exif.orientation(file) if is_picture else 1)
        finally:
            file.seek(place)


def read_image(path: Source, rules: Rules = SHOWN, name: object = "") -> np.ndarray:
    """Reads an image (or a video's first frame) as (H, W, 3) uint8; raises BadVideo if it cannot be read."""
    for frame in decode(path, rules=rules, name=name, threads=1):
        return frame.image
    raise BadVideo(name or path, "holds no image")


def at_rate(path: Source, fps: float) -> Iterator[np.ndarray]:
    """Resamples a video: yields the frame (H, W, 3) uint8 displayed at each multiple of 1 / fps seconds."""
    shown, instant, duration = None, 0, probe(path).duration
    for frame in decode(path):
        while shown is not None and instant / fps < frame.seconds - 1e-6:
            yield shown
            instant += 1
        shown = frame.image
    while shown is not None and instant / fps < duration - 1e-6:
        yield shown
        instant += 1
