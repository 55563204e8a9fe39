"""Frames to clips: end to end, sliding, apart, over gaps, and by scene."""

import numpy as np
import pytest

from paris_jax.data.decoding.cutting import Cutter, Window
from paris_jax.data.decoding.footage import Frame

FPS = 10.0


def frames(times, durations=0.1, damaged=()):
    for number, seconds in enumerate(times):
        yield Frame(float(seconds), durations, np.full((4, 4, 3), number, np.uint8), number in damaged)


def levels(window: Window) -> list[int] | str:
    return window.fault if window.frames is None else [int(frame[0, 0, 0]) for frame in window.frames]


def cut(source, num_frames: int = 4, **options) -> list:
    return [(window.number, levels(window)) for window in Cutter(num_frames, FPS, **options).cut(source, 4, 4)]


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        (0, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (2, [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]),
        (3, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]),
        (6, [[0, 1, 2, 3], [6, 7, 8, 9]]),
    ],
)
def test_windows_lie_end_to_end_slide_or_stand_apart(stride, expected):
    whole = cut(frames(np.arange(11) / FPS), stride=stride)
    assert whole == list(enumerate(expected))
    for first in range(len(expected)):  # a later process goes on in the middle
        start = first * (stride or 4)
        rest = (f for f in frames(np.arange(11) / FPS) if f.seconds >= start / FPS - 1e-9)
        assert cut(rest, stride=stride, first=first) == whole[first:]


def test_the_last_window_may_lack_a_thousandth_of_a_second():
    assert len(cut(frames(np.arange(8) / FPS, 0.0995))) == 2
    assert len(cut(frames(np.arange(8) / FPS, 0.08))) == 1


def test_a_gap_is_no_video():
    times = [*np.arange(5) / FPS, *(30.05 + np.arange(9) / FPS)]
    found = cut(frames(times))
    assert found[:2] == [(0, [0, 1, 2, 3]), (1, "has a gap between its frames")]
    assert [number for number, _ in found[2:]] == [76]  # windows of 0.4 s: the first that begins behind the gap
    assert cut(frames([0.0, 8.0], 0.4))[0] == (0, [0, 0, 0, 0])  # a slow video repeats what is on show


def test_a_damaged_frame_costs_the_windows_that_show_it():
    assert cut(frames(np.arange(12) / FPS, damaged={5})) == [
        *((0, [0, 1, 2, 3]), (1, "has damaged frames"), (2, [8, 9, 10, 11]))
    ]
    assert [level for _, level in cut(frames(np.arange(8) / FPS, damaged={3}), stride=2)][-1] == [4, 5, 6, 7]


def test_no_window_spans_a_cut():
    def starts(frame: Frame) -> bool:
        return int(frame.image[0, 0, 0]) in (6, 8)

    expected = [(0, [0, 1, 2, 3]), (1, [8, 9, 10, 11]), (2, [12, 13, 14, 15])]
    assert cut(frames(np.arange(17) / FPS), is_cut=starts) == expected
    assert cut(frames(np.arange(17) / FPS), is_cut=starts, first=1) == expected[1:]
