"""Whether a clip is held out depends on the id of its video only, not on order or on other clips."""

import numpy as np
import pytest

from paris_jax.clustering.heldout import TEST, TRAIN, VALIDATION, split
from paris_jax.data.sources.clip import video_of

IDS = [f"shapes-{i:06d}" for i in range(4000)]
CLIPS = [f"folder {v % 7}/video {v}.mp4#{n:04d}" for v in range(600) for n in range(1 + v % 5)]


def test_holds_out_about_the_requested_fractions():
    counts = np.bincount(split(IDS, 0.2, 0.25, seed=0), minlength=3) / len(IDS)
    assert counts[TRAIN] == pytest.approx(0.8, abs=0.02)
    assert counts[VALIDATION] == pytest.approx(0.05, abs=0.012)
    assert counts[TEST] == pytest.approx(0.15, abs=0.02)
    assert (split(IDS, 0.0, 0.5, seed=0) == TRAIN).all()
    assert (split(IDS, 0.2, 0.0, seed=0) != VALIDATION).all()


def test_all_clips_of_a_video_are_on_one_side():
    found = split(CLIPS, 0.3, 0.5, seed=0)
    sides = {}
    for clip, side in zip(CLIPS, found.tolist()):
        sides.setdefault(clip.rpartition("#")[0], set()).add(side)
    assert len(sides) == 600 and all(len(side) == 1 for side in sides.values())
    assert set().union(*sides.values()) == {TRAIN, VALIDATION, TEST}


@pytest.mark.parametrize(
    ("clip", "video"),
    [("a.mp4#0003", "a.mp4"), ("a#1.mp4#0000", "a#1.mp4"), ("frames#2#0012", "frames#2"), ("shapes-000001",) * 2,
     ("a#b", "a#b"), ("a.mp4#0003\n", "a.mp4#0003\n")],
)  # fmt: skip
def test_the_video_of_a_clip_is_its_id_without_the_number(clip, video):
    assert video_of(clip) == video


def test_adding_or_permuting_clips_changes_no_clip():
    few = split(CLIPS[:1000], 0.1, 0.5, seed=0)
    assert np.array_equal(split(CLIPS, 0.1, 0.5, seed=0)[:1000], few)
    assert np.array_equal(split(CLIPS[:1000][::-1], 0.1, 0.5, seed=0), few[::-1])


def test_a_larger_fraction_only_takes_from_training():
    small, large = split(IDS, 0.05, 0.4, seed=0), split(IDS, 0.2, 0.4, seed=0)
    moved = small != large
    assert moved.any() and (small[moved] == TRAIN).all()


def test_another_seed_holds_out_other_clips():
    assert np.any(split(IDS, 0.05, 0.3, seed=0) != split(IDS, 0.05, 0.3, seed=1))
