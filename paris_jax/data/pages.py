"""Shared parts of all pages for browsers: style, the script that plays videos, and media inside the page."""

import base64
from pathlib import Path

import numpy as np

from paris_jax.data import video

# A page asks nothing of any network: it looks the same by mail, from a bucket or in ten years.
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; media-src data:; img-src data:\">"
)


def style() -> str:
    return Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def script() -> str:
    return Path(__file__).with_name("page.js").read_text(encoding="utf-8")


def video_address(frames: np.ndarray, fps: float, scale: int | None = None) -> str:
    """(T, H, W, 3) uint8 as a data: address of an mp4."""
    return f"data:video/mp4;base64,{base64.b64encode(video.video_bytes(frames, fps, scale=scale, threads=1)).decode()}"


def image_address(image: np.ndarray) -> str:
    """(H, W, 3) uint8 as a data: address of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(video.png_bytes(image)).decode()}"
