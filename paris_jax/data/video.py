"""Scales, crops and encodes videos and images with PyAV, and lays out contact sheets."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import av.filter
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.data import lettering
from paris_jax.errors import UserError

READABLE = 160  # pixels: smallest shorter side of written videos; smaller ones are enlarged by repeating pixels
CODECS = {
    "mp4": ("libx264", "yuv420p", {"crf": "12", "preset": "medium"}),
    "webm": ("libvpx-vp9", "yuv420p", {"crf": "14", "b": "0", "row-mt": "1"}),
}
FORMATS = (*CODECS, "gif", "png")


def fit(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales (area average) to cover height x width and crops the centre: (h, w, 3) to (height, width, 3) uint8."""
    rows, columns = cover(image.shape[0], image.shape[1], height, width)
    return crop(resize(image, rows, columns), height, width)


def resize(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Scales (area average) (h, w, 3) to (rows, columns, 3) uint8."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return frame.reformat(width=columns, height=rows, format="rgb24", interpolation="AREA").to_ndarray()


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales (area average) into height x width, with black bars around: (h, w, 3) to (height, width, 3) uint8."""
    scale = min(height / image.shape[0], width / image.shape[1])
    rows, columns = (max(1, round(side * scale)) for side in image.shape[:2])
    boxed = np.zeros((height, width, 3), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    boxed[top : top + rows, left : left + columns] = fit(image, rows, columns)
    return boxed


def cover(rows: float, columns: float, height: int, width: int) -> tuple[int, int]:
    """Returns the smallest (rows, columns) with the aspect ratio of rows x columns that covers height x width."""
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Crops the central height x width out of (h, w, 3)."""
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def enlarge(video: np.ndarray, scale: int | None = None) -> np.ndarray:
    """Enlarges a video by repeating pixels, and pads odd sides, which H.264 does not support.

    Args:
      video: (..., H, W, 3) uint8.
      scale: integer factor; None chooses the smallest whose result has a shorter side of at least READABLE pixels.
    """
    height, width = video.shape[-3:-1]
    times: int = scale or -(-READABLE // min(height, width))
    larger = video.repeat(times, axis=-3).repeat(times, axis=-2)
    padding = [(0, 0)] * (larger.ndim - 3) + [(0, height * times % 2), (0, width * times % 2), (0, 0)]
    return np.pad(larger, padding, mode="edge")


def video_bytes(
    video: np.ndarray, fps: float, format: str = "mp4", scale: int | None = None, threads: int = 0
) -> bytes:
    """Encodes (T, H, W, 3) uint8 as "mp4" (H.264, playable in browsers), "webm" (VP9) or "gif".

    With one thread, equal videos give equal bytes; by default there are as many as the encoder likes.

    Raises:
      ValueError: `video` has another shape or dtype or no frames, or `format` is unknown.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise ValueError(f"a video must be (T, H, W, 3) uint8, not {video.shape} {video.dtype}")
    frames = [av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format="rgb24") for f in enlarge(video, scale)]
    if format == "gif":
        return _gif(frames, fps)
    if format not in CODECS:
        raise ValueError(f"format={format!r}: must be one of {', '.join((*CODECS, 'gif'))}")
    name, pixels, options = CODECS[format]
    options = options | ({"threads": str(threads)} if threads else {})
    rate = Fraction(fps).limit_denominator(1001)
    target = io.BytesIO()
    with av.open(target, "w", format=format) as container:
        stream = container.add_stream(name, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, pixels
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def _gif(frames: list[av.VideoFrame], fps: float) -> bytes:
    """Encodes a looping GIF with an adaptive palette. GIF stores durations in hundredths of a second."""
    base = Fraction(1, 100)
    graph = av.filter.Graph()
    source = graph.add_buffer(width=frames[0].width, height=frames[0].height, format=frames[0].format, time_base=base)
    split, palette, use = graph.add("split"), graph.add("palettegen"), graph.add("paletteuse", "dither=none")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = round(number * 100 / fps), base
        graph.push(frame)
    graph.push(None)
    target = io.BytesIO()
    end = round(len(frames) * 100 / fps)
    with av.open(target, "w", format="gif", options={"final_delay": str(end - (frames[-1].pts or 0))}) as container:
        stream = container.add_stream("gif", rate=100)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, "pal8"
        stream.codec_context.time_base = base
        for _ in frames:
            frame = graph.pull()
            assert isinstance(frame, av.VideoFrame)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return target.getvalue()


def png_bytes(image: np.ndarray) -> bytes:
    """Encodes (H, W, 3) uint8 as PNG."""
    encoder = av.CodecContext.create("png", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.height, encoder.width, encoder.pix_fmt = image.shape[0], image.shape[1], "rgb24"
    encoder.time_base = Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def write_png(path: epath.PathLike, image: np.ndarray) -> None:
    """Writes (H, W, 3) uint8 as PNG, atomically."""
    manifest.write_atomically(path, png_bytes(image))


def write_video(path: epath.PathLike, video: np.ndarray, fps: float, scale: int | None = None) -> None:
    """Writes (T, H, W, 3) uint8 as .mp4, .webm, .gif or a .png of its frames, atomically.

    Raises:
      UserError: the path has another ending, or cannot be written.
    """
    ending = epath.Path(path).suffix.lower().removeprefix(".")
    if ending not in FORMATS:
        raise UserError(f"{path} ends in {ending!r}; videos are written as {', '.join('.' + f for f in FORMATS)}")
    if ending == "png":
        write_png(path, contact_sheet(video[None]))
    else:
        manifest.write_atomically(path, video_bytes(video, fps, ending, scale))


def contact_sheet(videos: np.ndarray, captions: Sequence[str] | None = None, columns: int = 8) -> np.ndarray:
    """Lays out videos as rows of up to `columns` frames in temporal order, each below its caption.

    Args:
      videos: (N, T, H, W, 3) uint8.
      captions: N texts, or None.
      columns: maximum number of frames per video, evenly spaced.

    Returns:
      (height, width, 3) uint8.
    """
    frames = videos.shape[1]
    chosen = np.linspace(0, frames - 1, min(columns, frames)).round().astype(int)
    scale = max(1, -(-READABLE // 2 // min(videos.shape[2:4])))
    strips = []
    for number, video in enumerate(videos):
        shown = enlarge(video[chosen], scale)
        row = np.concatenate([np.pad(f, ((2, 2), (2, 2), (0, 0)), constant_values=128) for f in shown], axis=1)
        if captions is not None:
            line = 255 - lettering.write_line(captions[number], row.shape[1] - 8)
            strips.append(np.pad(line, ((3, 0), (4, 4)), constant_values=255)[..., None].repeat(3, -1))
        strips.append(row)
    return np.concatenate(strips, axis=0)
