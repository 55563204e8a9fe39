"""The embedded data set: generates captioned videos of moving shapes.

Three worlds that look and move differently: `flat` shapes sliding over light ground, `textured` sprites circling and
swinging over coloured noise, and real handwritten `digits` drifting diagonally in the dark. Clip i is a pure function
of (seed, i); captions follow a grammar that `parse` inverts, so that generated videos can be checked against their
prompts.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from paris_jax.data.sources.clip import Clip
from paris_jax.data.sources.source import ClipSource

WORLDS = ("flat", "textured", "digits")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = ("small", "large")
SPEEDS = ("slow", "fast")
COLOURS = {
    "red": (225, 30, 35),
    "green": (20, 165, 50),
    "blue": (40, 85, 245),
    "yellow": (245, 210, 0),
    "purple": (185, 40, 205),
    "cyan": (0, 200, 215),
}
ACCENT = (250, 250, 250)  # the second colour of a textured sprite
GROUNDS = {  # two for each world
    "white": (246, 246, 246),
    "grey": (196, 196, 196),
    "sandy": (150, 118, 78),
    "stony": (98, 104, 116),
    "black": (6, 6, 8),
    "brown": (52, 28, 14),
}
NOISE = 26.0  # half the range of the coloured noise of sandy and stony ground, in levels of 255
NOISE_CELLS = 5  # cells of the noise along each side
# Caption phrase of each direction: straight ("moving", "drifting"), circular, or back and forth.
DIRECTIONS = {
    "left": "moving left",
    "right": "moving right",
    "up": "moving up",
    "down": "moving down",
    "clockwise": "circling clockwise",
    "counterclockwise": "circling counterclockwise",
    "side to side": "swinging side to side",
    "up and down": "bouncing up and down",
    "up left": "drifting up left",
    "up right": "drifting up right",
    "down left": "drifting down left",
    "down right": "drifting down right",
}
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (rows, columns) of each straight word
ADVERBS = {"slow": "slowly", "fast": "fast"}


class World(NamedTuple):
    """Objects, directions and sizes of one world; lengths are fractions of the shorter side of the frame."""

    objects: tuple[str, ...]
    directions: tuple[str, ...]
    grounds: tuple[str, ...]
    radius: dict[str, float]  # of the sprite, by size name
    travel: dict[str, float]  # per clip, by speed; straight: fraction of the side; textured: turns or swings


SPECS = {
    "flat": World(
        ("circle", "square", "triangle", "cross"),
        ("left", "right", "up", "down"),
        ("white", "grey"),
        {"small": 0.16, "large": 0.28},
        {"slow": 0.14, "fast": 0.42},
    ),
    "textured": World(
        ("striped ball", "checked tile", "ringed disc"),
        ("clockwise", "counterclockwise", "side to side", "up and down"),
        ("sandy", "stony"),
        {"small": 0.165, "large": 0.28},
        {"slow": 0.35, "fast": 0.95},
    ),
    "digits": World(
        DIGITS,
        ("up left", "up right", "down left", "down right"),
        ("black", "brown"),
        {"small": 0.19, "large": 0.31},
        {"slow": 0.12, "fast": 0.36},
    ),
}
ORBIT = 0.19  # radius of circling and half the width of swinging, as a share of the side
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "world": WORLDS,
    "object": tuple(o for world in SPECS.values() for o in world.objects),
    "colour": tuple(COLOURS),
    "size": SIZES,
    "direction": tuple(DIRECTIONS),
    "speed": SPEEDS,
    "ground": tuple(GROUNDS),
}


@functools.cache
def _digits() -> tuple[np.ndarray, ...]:
    """Returns, for each digit, its handwritten images (N, 8, 8) float32 in [0, 1]."""
    table = np.load(Path(__file__).with_name("digits.npy"), allow_pickle=False)
    images = np.minimum(table[:, 1:].reshape(-1, 8, 8).astype(np.float32) / 13.0, 1.0)
    return tuple(images[table[:, 0] == digit] for digit in range(10))


@functools.cache
def _phrases() -> dict[str, tuple[str, str, str]]:
    """Returns (world, object, direction) for each caption phrase of an object and a direction."""
    return {f"{_noun(o)} {DIRECTIONS[d]}": (w, o, d) for w, s in SPECS.items() for o in s.objects for d in s.directions}


def _noun(name: str) -> str:
    return f"digit {name}" if name in DIGITS else name


def caption(attributes: dict[str, str]) -> str:
    """Returns the caption of these attributes, e.g. "a small red circle moving left slowly on a white ground"."""
    a = attributes
    return (
        f"a {a['size']} {a['colour']} {_noun(a['object'])} {DIRECTIONS[a['direction']]} {ADVERBS[a['speed']]}"
        f" on a {a['ground']} ground"
    )


def parse(text: str) -> dict[str, str] | None:
    """Parses a caption of the grammar into its attributes; returns None for any other text."""
    words = text.lower().split()
    if len(words) < 8 or words[0] != "a" or words[-4:-2] != ["on", "a"] or words[-1] != "ground":
        return None
    speed = {adverb: name for name, adverb in ADVERBS.items()}.get(words[-5])
    phrase = _phrases().get(" ".join(words[3:-5]))
    if speed is None or phrase is None or words[1] not in SIZES or words[2] not in COLOURS:
        return None
    world, name, direction = phrase
    if words[-2] not in SPECS[world].grounds:
        return None
    values = (world, name, words[2], words[1], direction, speed, words[-2])
    return dict(zip(ATTRIBUTES, values, strict=True))


def draw_attributes(rng: np.random.Generator) -> dict[str, str]:
    """Draws a world uniformly, then each attribute uniformly from that world's values."""
    # Only Generator.random is used, because its stream is simple enough to stay the same across NumPy versions.
    chances = iter(rng.random(len(ATTRIBUTES)))

    def pick(values: tuple[str, ...]) -> str:
        return values[int(next(chances) * len(values))]

    world = pick(WORLDS)
    spec = SPECS[world]
    values = (
        world,
        pick(spec.objects),
        pick(tuple(COLOURS)),
        pick(SIZES),
        pick(spec.directions),
        pick(SPEEDS),
        pick(spec.grounds),
    )
    return dict(zip(ATTRIBUTES, values, strict=True))


def render(
    attributes: dict[str, str], seed: int | np.random.Generator, frames: int, height: int, width: int
) -> np.ndarray:
    """Renders a clip with these attributes; position, phase, handwriting and noise are drawn from `seed`.

    The sprite stays entirely inside the frame. Speed is the distance per clip, so that it looks the same at every
    number of frames. A single frame shows a random moment.

    Returns:
      (T, H, W, 3) uint8, anti-aliased from exact distances, so that motion is smooth below one pixel.
    """
    rng = seed if isinstance(seed, np.random.Generator) else np.random.default_rng(seed)
    chances = rng.random(5)
    spec = SPECS[attributes["world"]]
    side = min(height, width)
    radius = spec.radius[attributes["size"]] * side
    centre_T2 = _path(attributes, spec, chances, frames, (height, width), radius)

    row_H1, column_1W = np.arange(height, dtype=np.float32)[:, None] + 0.5, np.arange(width, dtype=np.float32) + 0.5
    v_THW = (row_H1 - centre_T2[:, 0, None, None]) / radius  # in radii from the sprite's centre, down
    u_THW = (column_1W - centre_T2[:, 1, None, None]) / radius  # and right
    cover_THW, accent_THW = _sprite(attributes["object"], u_THW, v_THW, radius, chances[4])

    video_THWC = np.broadcast_to(_ground(attributes, rng, height, width), (frames, height, width, 3))
    sprite = np.asarray(COLOURS[attributes["colour"]], np.float32)
    if accent_THW is not None:
        sprite = sprite + accent_THW[..., None] * (np.asarray(ACCENT, np.float32) - sprite)
    return (video_THWC + cover_THW[..., None] * (sprite - video_THWC) + 0.5).astype(np.uint8)


def _path(attributes, spec: World, chances, frames: int, size: tuple[int, int], radius: float) -> np.ndarray:
    """Returns the sprite's centre (T, 2) float32 as (row, column), with the whole path inside the frame."""
    side = min(size)
    time_T = np.linspace(0.0, 1.0, frames) if frames > 1 else chances[3:4]
    direction, travel = attributes["direction"], spec.travel[attributes["speed"]]
    if attributes["world"] == "textured":
        turn_T = 2 * np.pi * (chances[2] + time_T * travel * (1.5 if " " in direction else 1.0))
        sign = -1.0 if direction == "counterclockwise" else 1.0
        row_T, column_T = sign * np.sin(turn_T), np.cos(turn_T)  # rows grow downwards: clockwise as seen
        row_T, column_T = {
            "side to side": (np.zeros(frames), column_T),
            "up and down": (column_T, np.zeros(frames)),
        }.get(direction, (row_T, column_T))
        offset_T2 = ORBIT * side * np.stack([row_T, column_T], axis=1)
    else:
        step = np.sum([STEPS[word] for word in direction.split()], axis=0)
        offset_T2 = time_T[:, None] * step * travel * side
    # The range of start positions that keeps the sprite inside the frame along its whole path.
    low = radius - offset_T2.min(axis=0)
    high = np.asarray(size) - radius - offset_T2.max(axis=0)
    return (low + chances[:2] * np.maximum(high - low, 0.0) + offset_T2).astype(np.float32)


def _ground(attributes, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns the background, (H, W, 3) float32: plain, or with smooth coloured noise in the textured world."""
    plain = np.asarray(GROUNDS[attributes["ground"]], np.float32)
    if attributes["world"] != "textured":
        return np.broadcast_to(plain, (height, width, 3))
    cells = (rng.random((NOISE_CELLS, NOISE_CELLS, 3)) * 2 - 1).astype(np.float32) * NOISE
    rows, columns = _interpolation(height), _interpolation(width)
    return plain + np.einsum("hi,ijc,wj->hwc", rows, cells, columns, optimize=True)


@functools.cache
def _interpolation(length: int) -> np.ndarray:
    """Returns (length, NOISE_CELLS) weights that interpolate the noise cells linearly."""
    place = np.linspace(0, NOISE_CELLS - 1, length)[:, None]
    return np.maximum(1 - np.abs(place - np.arange(NOISE_CELLS)), 0).astype(np.float32)


def _sprite(name: str, u, v, radius: float, chance: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns the sprite's coverage of each pixel, (T, H, W) in [0, 1], and the accent colour's share of it or None."""
    if name in DIGITS:
        images = _digits()[DIGITS.index(name)]
        return _ink(images[int(chance * len(images))], u, v), None

    def inside(distance: np.ndarray) -> np.ndarray:  # signed distance in radii, negative inside, to coverage
        return np.clip(0.5 - distance * radius, 0.0, 1.0)

    across, down = np.abs(u), np.abs(v)
    if name == "square":
        return inside(np.maximum(across, down) - 0.9), None
    if name == "triangle":  # apex up; the slanted edge from (0, -1) to (1.05, 0.85)
        slant = (1.85 * across - 1.05 * (v + 1)) / np.hypot(1.85, 1.05)
        return inside(np.maximum(slant, v - 0.85)), None
    if name == "cross":
        return inside(np.minimum(np.maximum(across - 1, down - 0.33), np.maximum(across - 0.33, down - 1))), None
    if name == "checked tile":  # three by three, the corners and the middle in colour
        between = np.minimum(np.maximum(across - 0.3, 0.3 - down), np.maximum(down - 0.3, 0.3 - across))
        return inside(np.maximum(across, down) - 0.9), inside(-between)
    far = np.hypot(u, v)
    if name == "striped ball":
        return inside(far - 1), inside(across - 0.32)
    if name == "ringed disc":
        return inside(far - 1), inside(np.abs(far - 0.55) - 0.18)
    return inside(far - 1), None  # circle


def _ink(image: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Samples an 8 x 8 image linearly where u and v are in [-1, 1]; 0 outside."""
    padded = np.pad(image, 2)
    row, column = np.clip(v * 4 + 5.5, 0.0, 10.99), np.clip(u * 4 + 5.5, 0.0, 10.99)
    top, left = row.astype(np.intp), column.astype(np.intp)
    down, right = row - top, column - left
    upper = padded[top, left] * (1 - right) + padded[top, left + 1] * right
    lower = padded[top + 1, left] * (1 - right) + padded[top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


@dataclasses.dataclass(frozen=True)
class ShapesSource(ClipSource):
    """Clips of moving shapes: clip i depends on `seed`, i and the sizes alone."""

    seed: int
    num_clips: int
    frames: int
    height: int
    width: int
    fps: float

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"clip {index} of {self.num_clips}")
        rng = np.random.default_rng((self.seed, index))
        attributes = draw_attributes(rng)
        video = render(attributes, rng, self.frames, self.height, self.width)
        return Clip(f"shapes-{index:06d}", video, self.fps, caption(attributes), attributes)

    def describe(self) -> dict[str, Any]:
        return {"name": "shapes", "seed": self.seed}
