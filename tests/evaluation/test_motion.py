"""Optical flow finds known translations, a still clip does not move; flicker is the change of what stands still."""

import numpy as np
import pytest

from paris_jax.evaluation.metrics.motion import mean_motion, optical_flow, temporal_flicker


def moving_noise(shift: tuple[float, float], frames: int = 5, size: int = 32) -> np.ndarray:
    """Smooth random texture moved by (rows, columns) pixels a frame, exact below a pixel: a sum of plane waves."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:size, :size]
    clip = np.zeros((frames, size, size))
    for _ in range(40):
        angle, phase, frequency = rng.random(3) * [2 * np.pi, 2 * np.pi, 0.55] + [0, 0, 0.15]
        for t in range(frames):
            along = (row - t * shift[0]) * np.sin(angle) + (column - t * shift[1]) * np.cos(angle)
            clip[t] += np.cos(frequency * along + phase)
    return np.repeat(np.clip(clip / 12, -1, 1)[..., None], 3, axis=-1)


@pytest.mark.parametrize("shift", [(0.0, 0.5), (0.7, 0.0), (-0.6, 0.8), (1.2, -0.9), (0.0, 2.0)])
def test_finds_a_known_translation(shift):
    clip = moving_noise(shift)
    flow = optical_flow(clip[:-1], clip[1:])[:, 4:-4, 4:-4]
    np.testing.assert_allclose(np.median(flow, axis=(0, 1, 2)), shift, atol=0.07)
    assert mean_motion(clip[None])[0] == pytest.approx(np.hypot(*shift), rel=0.15)


def test_a_still_clip_does_not_move():
    assert mean_motion(moving_noise((0.0, 0.0))[None])[0] == pytest.approx(0, abs=1e-9)


def test_plain_ground_does_not_move():
    flat = np.linspace(-1, 1, 6)[:, None, None, None] * np.ones((6, 20, 20, 3))  # only the light changes
    assert mean_motion(flat[None])[0] == pytest.approx(0, abs=1e-6)


def test_faster_shapes_have_more_motion():
    from paris_jax.data.sources.shapes import render

    base = {
        "world": "flat",
        "object": "circle",
        "colour": "red",
        "size": "large",
        "direction": "left",
        "ground": "white",
    }
    slow, fast = (render(base | {"speed": s}, 0, 8, 20, 20)[None] / 127.5 - 1 for s in ("slow", "fast"))
    assert mean_motion(fast)[0] > 1.7 * mean_motion(slow)[0] > 0


def test_one_frame_does_not_move():
    np.testing.assert_array_equal(mean_motion(np.ones((2, 1, 20, 20, 3))), [0.0, 0.0])


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


def test_one_frame_has_no_flicker_and_other_shapes_are_refused():
    assert temporal_flicker(np.zeros((2, 1, 8, 8, 3))).tolist() == [0, 0]
    with pytest.raises(ValueError, match="must be"):
        temporal_flicker(np.zeros((2, 3, 8, 8)))
