"""Folders of videos as evaluation sets: which clip of each file, checks, and refusals with their remedy."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from etils import epath

from paris_jax.data import video
from paris_jax.data.decoding import footage
from paris_jax.data.sources import folder, video_file
from paris_jax.errors import UserError

ClipChoice = Literal["first", "middle", "random"]
CLIP_CHOICES: tuple[ClipChoice, ...] = ("first", "middle", "random")


@dataclasses.dataclass(frozen=True)
class ClipRule:
    """Which frames of a video are evaluated.

    Attributes:
      num_frames: consecutive frames of each clip.
      fps: frames per second that videos are resampled to; None keeps each file's own frames.
      size: (height, width) that frames are scaled to cover (area average) and cropped to; None keeps their size.
      choice: the first clip of a video, its middle one, or one at a place drawn from (seed, file name).
      seed: of that draw, and of the choice of files.
    """

    num_frames: int = 16
    fps: float | None = None
    size: tuple[int, int] | None = None
    choice: ClipChoice = "first"
    seed: int = 0

    def describe(self) -> dict[str, str]:
        size = "as in the files" if self.size is None else f"{self.size[0]} x {self.size[1]}, area average, cropped"
        rate = "every frame of the file" if self.fps is None else f"resampled to {self.fps:g} per second"
        return {
            "frames": f"{self.num_frames}, {rate}",
            "clip": f"the {self.choice} one, seed {self.seed}",
            "size": size,
        }


@dataclasses.dataclass(frozen=True)
class VideoFolder:
    """The videos of a folder that are evaluated.

    Attributes:
      root: the folder; names: relative names of files and folders of frames, in the order of evaluation.
    """

    root: epath.Path
    names: tuple[str, ...]
    flag: str

    @classmethod
    def open(cls, path: epath.PathLike, flag: str) -> "VideoFolder":
        """All videos of a folder, sorted by name.

        Raises:
          UserError: no folder, or no video in it.
        """
        root = epath.Path(path)
        if "://" in str(root) or not root.is_dir():
            raise UserError(f"--{flag}={path}: must be a folder of videos on this machine")
        names = folder.find(root)
        if not names:
            raise UserError(
                f"--{flag}={path} holds no video; put {', '.join(video_file.VIDEOS[:7])} files or folders of frames "
                "there"
            )
        return cls(root, tuple(names), flag)

    def choose(self, count: int, seed: int, leave_out: "frozenset[str] | set[str]" = frozenset()) -> "VideoFolder":
        """`count` of the videos, the first by the hash of (seed, name): the same ones whatever else is there.

        Raises:
          UserError: there are fewer.
        """
        left = [name for name in self.names if name not in leave_out]
        if len(left) < count:
            raise UserError(
                f"--{self.flag}={self.root} holds {len(left)} videos, fewer than --num_clips={count}; lower it "
                "or add videos"
            )
        order = sorted(left, key=lambda name: hashlib.sha256(f"{seed}\n{name}".encode()).digest())
        return dataclasses.replace(self, names=tuple(order[:count]))

    def fingerprint(self) -> list[tuple[str, int, float]]:
        """Name, size and time of change of each file that the cached features of a set were made from."""
        found = []
        for name in self.names:
            path = self.root / name
            files = [path / picture for picture in video_file.pictures(path)] if path.is_dir() else [path]
            found += [(str(f.relative_to(self.root)), f.stat().length, f.stat().mtime) for f in files]
        return found

    def read(self, names: tuple[str, ...], rule: ClipRule) -> np.ndarray:
        """The clips of these videos, (N, T, H, W, 3) uint8.

        Raises:
          UserError: a video is too short, cannot be read, or has another size than the first.
        """
        clips = []
        for name in names:
            frames = list(itertools.islice(self._frames(name, rule), rule.num_frames))
            if len(frames) < rule.num_frames:
                raise UserError(f"{self.root / name} breaks off after {len(frames)} frames; replace or remove the file")
            frames = np.stack(frames)
            if clips and frames.shape != clips[0].shape:
                raise UserError(
                    f"{self.root / name} has {frames.shape[1]} x {frames.shape[2]} pixels and {names[0]} "
                    f"{clips[0].shape[1]} x {clips[0].shape[2]}; give one size for all with --size=HEIGHT,WIDTH"
                )
            clips.append(frames)
        return np.stack(clips)

    def _frames(self, name: str, rule: ClipRule) -> Iterator[np.ndarray]:
        """The frames of a video from the start of its clip on."""
        path = self.root / name
        if path.is_dir():
            pictures = video_file.pictures(path)
            count, frames = len(pictures), (footage.read_image(path / picture) for picture in pictures)
        elif rule.fps is None:
            count, frames = len(footage.probe(path).times), (frame.image for frame in footage.decode(path))
        else:
            count, frames = int(footage.probe(path).duration * rule.fps + 1e-3), footage.at_rate(path, rule.fps)
        if count < rule.num_frames:
            raise UserError(
                f"{path} has {count} frames, fewer than --num_frames={rule.num_frames}; lower it or remove the video"
            )
        spare = count - rule.num_frames
        draw = int.from_bytes(hashlib.sha256(f"{rule.seed}\n{name}".encode()).digest()[:8], "big")
        start = {"first": 0, "middle": spare // 2, "random": draw % (spare + 1)}[rule.choice]
        for frame in itertools.islice(frames, start, None):
            yield frame if rule.size is None else video.fit(frame, *rule.size)


def content_hashes(videos: np.ndarray) -> np.ndarray:
    """Hashes of the contents of videos, (N, 16) uint8."""
    digests = [hashlib.sha256(np.ascontiguousarray(v).tobytes()).digest()[:16] for v in videos]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(videos), 16)


def check_distinct(folder: VideoFolder, hashes: np.ndarray, is_constant: np.ndarray) -> None:
    """Refuses sets whose scores would mean little: videos of one colour, and videos that are there twice.

    Raises:
      UserError: the first of them are named.
    """
    constant = [name for name, is_flat in zip(folder.names, is_constant, strict=True) if is_flat]
    advice = "remove them, or count them with --allow_degenerate"
    if constant:
        raise UserError(
            f"--{folder.flag}={folder.root}: {len(constant)} videos are of a single colour "
            f"({', '.join(constant[:3])}); {advice}"
        )
    first: dict[bytes, str] = {}
    pairs = []
    for name, row in zip(folder.names, hashes, strict=True):
        original = first.setdefault(row.tobytes(), name)
        if original != name:
            pairs.append(f"{name} is {original}")
    if pairs:
        raise UserError(
            f"--{folder.flag}={folder.root}: {len(pairs)} videos are there twice ({', '.join(pairs[:3])}); {advice}"
        )


def degenerate(videos: Mapping[str, np.ndarray]) -> list[str]:
    """A sentence for each set (N, T, H, W, 3) with videos of one colour, or videos that are there twice."""
    found = []
    for name, each in videos.items():
        flat = each.reshape(len(each), -1)
        constant = int((flat.max(1) == flat.min(1)).sum())
        repeated = len(each) - len(np.unique(content_hashes(each), axis=0))
        if constant or repeated:
            found.append(
                f"Of the {len(each)} videos of {name}, {constant} are of one colour and {repeated} are repeated."
            )
    return found


def check_values(videos: np.ndarray, what: str) -> None:
    """Refuses arrays that are no videos in [-1, 1].

    Args:
      videos: (N, T, H, W, 3) float.
      what: their name in the error.
    Raises:
      UserError: a value is not finite or out of range; the first video is numbered.
    """
    flat = videos.reshape(len(videos), -1)
    bad = np.flatnonzero(~np.isfinite(flat).all(1))
    if len(bad):
        raise UserError(f"{what}: video {bad[0]} holds values that are not finite; sample it again")
    far = np.flatnonzero(np.abs(flat).max(1) > 1 + 1e-6)
    if len(far):
        largest = np.abs(flat[far[0]]).max()
        raise UserError(
            f"{what}: video {far[0]} reaches {largest:.3g}; values must be in [-1, 1], as decoded and clipped"
        )
