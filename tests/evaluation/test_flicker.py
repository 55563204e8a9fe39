"""Flicker is the change of what stands still: motion is none, and noise is."""

import numpy as np
import pytest

from paris_jax.evaluation.metrics.flicker import temporal_flicker
from tests.evaluation.test_motion import moving_noise


def test_a_still_video_does_not_flicker():
    assert temporal_flicker(moving_noise((0.0, 0.0))[None])[0] == pytest.approx(0, abs=1e-9)


def test_brightness_that_alternates_is_measured_in_gray_levels():
    still = moving_noise((0.0, 0.0)) * 0.5
    change = 0.02 * (np.arange(len(still)) % 2)[:, None, None, None]
    assert temporal_flicker((still + change)[None])[0] == pytest.approx(0.02 * 127.5, rel=0.05)


def test_motion_alone_flickers_less_than_noise_of_the_same_change():
    moving = moving_noise((0.0, 1.5))
    change = np.abs(np.diff(moving, axis=0)).mean()
    still = moving_noise((0.0, 0.0))
    noisy = still + np.random.default_rng(0).normal(0, change, still.shape)
    assert temporal_flicker(moving[None])[0] < 0.5 * temporal_flicker(noisy[None])[0]


def test_one_frame_has_none_and_other_shapes_are_refused():
    assert temporal_flicker(np.zeros((2, 1, 8, 8, 3))).tolist() == [0, 0]
    with pytest.raises(ValueError, match="must be"):
        temporal_flicker(np.zeros((2, 3, 8, 8)))
