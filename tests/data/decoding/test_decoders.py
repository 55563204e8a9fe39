"""Decoding processes: a decoder that crashes, hangs or eats memory costs one process and one clip."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from paris_jax.data.decoding.decoders import Decoders, Limits
from paris_jax.data.sources.clip import Clip, Dropped
from tests.data.decoding.hostile_videos import Hostile

LIMITS = Limits(seconds=1.5, megabytes=256)
ROOT = Path(__file__).parents[2]


def decode(*videos, count: int = 2) -> list[Clip | Dropped]:
    with Decoders(count, LIMITS) as pool:
        return list(pool.clips(videos))


def named(items) -> list[str]:
    return [item.id if isinstance(item, Clip) else f"{item.id} {item.reason}" for item in items]


def test_clips_arrive_in_order_whatever_takes_longest():
    videos = [Hostile(name, "slow", at=0, count=3, repeated=5 - number) for number, name in enumerate("abcdef")]
    items = decode(*videos, count=3)
    assert named(items) == [f"{name}#{number:04d}" for name in "abcdef" for number in range(3)]
    clip = items[1]
    assert isinstance(clip, Clip)
    assert (clip.video.shape, clip.video.dtype, clip.fps, clip.caption) == ((2, 4, 4, 3), np.uint8, 8.0, "x")
    assert (clip.video == 1).all()


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("crash", "crashes the decoder (SIGSEGV)"),
        ("hang", "took more time than allowed"),
        ("spin", "took more time than allowed"),
    ],
)
def test_what_takes_a_process_down_costs_one_clip(deed, reason):
    items = decode(Hostile("a"), Hostile("b", deed), Hostile("c"))
    lost = ["b#0000", f"b#0001 {reason}", "b#0002", "b#0003"]
    assert named(items) == [*(f"a#000{i}" for i in range(4)), *lost, *(f"c#000{i}" for i in range(4))]


def test_memory_is_bounded():
    with Decoders(2, Limits(seconds=60.0, megabytes=256)) as pool:
        items = named(pool.clips([Hostile("a", "eat", count=2), Hostile("b", count=1)]))
    assert items == ["a#0000", "a needs more memory than allowed", "b#0000"]


def test_an_error_of_a_decoder_drops_the_rest_of_its_video():
    items = decode(Hostile("a", "fail"), Hostile("b", count=1))
    assert named(items) == ["a#0000", "a cannot be decoded", "b#0000"]
    assert isinstance(items[1], Dropped) and items[1].detail == "ValueError: a decoder's own error"


@pytest.mark.parametrize("at", [0, 1])
def test_a_video_that_takes_two_processes_down_in_a_row_is_given_up(at):
    items = decode(Hostile("a", "crash", at=at, count=50, repeated=50), Hostile("b", count=1))
    lost = "a crashes" if at == 0 else "a#0001 crashes"
    assert named(items) == [*(["a#0000"] * at), f"{lost} the decoder (SIGSEGV)", "b#0000"]


def test_a_crash_at_the_first_clip_costs_that_clip():
    items = named(decode(Hostile("a", "crash", at=0, count=2)))
    assert items == ["a#0000 crashes the decoder (SIGSEGV)", "a#0001"]


def test_what_is_dropped_already_keeps_its_place():
    lost = Dropped("z", "list", "has no caption")
    assert named(decode(Hostile("a", count=1), lost, Hostile("b", count=1))) == ["a#0000", "z has no caption", "b#0000"]


def test_an_error_of_the_source_arrives():
    def videos():
        yield Hostile("a", count=1)
        raise OSError("the disk is gone")

    with Decoders(2, LIMITS) as pool, pytest.raises(OSError, match="the disk is gone"):
        list(pool.clips(videos()))


def test_who_stops_early_leaves_no_process_behind():
    with Decoders(2, Limits(60.0, 256)) as pool:
        clips = pool.clips(Hostile(name, "hang", at=2) for name in "abcdefgh")
        assert named([next(clips)]) == ["a#0000"]
        processes = [worker.process for worker in pool._workers]
        start = time.monotonic()
        clips.close()
    assert time.monotonic() - start < 10
    assert all(process is None or process.poll() is not None for process in processes)


def test_workers_end_with_the_process_that_started_them():
    code = (
        "import os, sys; from paris_jax.data.decoding.decoders import *\n"
        "from tests.data.decoding.hostile_videos import Hostile\n"
        "pool = Decoders(1, Limits(60.0, 256)); clips = pool.clips([Hostile('a', 'slow', count=9**9, repeated=9**9)])\n"
        "next(clips); print(pool._workers[0].process.pid, flush=True); next(clips); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while _runs(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
