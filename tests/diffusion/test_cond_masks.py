"""Which frames are given, how often, and the conditioning input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.diffusion import cond_masks

COUNT = 20_000


def drawn(weights, frames):
    """How often each mask occurs, by its pattern."""
    masks, is_prefix = cond_masks.draw(jax.random.split(jax.random.key(1), COUNT), weights, frames)
    assert float(is_prefix.mean()) == pytest.approx(weights[4] / sum(weights), abs=0.02)
    found = np.asarray(masks).astype(int)
    patterns, counts = np.unique(found, axis=0, return_counts=True)
    return {"".join(map(str, p)): n / COUNT for p, n in zip(patterns, counts, strict=True)}


def test_mask_kinds_are_drawn_by_their_weights():
    found = drawn((2.0, 3.0, 1.0, 1.0, 3.0), 4)
    expected = {"0000": 0.2, "1000": 0.3 + 0.1, "0001": 0.1, "1001": 0.1, "1100": 0.1, "1110": 0.1}
    assert found.keys() == expected.keys()
    for pattern, share in expected.items():
        assert abs(found[pattern] - share) < 4 * np.sqrt(share / COUNT), pattern


@pytest.mark.parametrize("kind, pattern", [(1, "10000"), (2, "00001"), (3, "10001"), (0, "00000")])
def test_a_single_weight_draws_its_kind_only(kind, pattern):
    assert drawn(tuple(float(k == kind) for k in range(5)), 5) == {pattern: 1.0}


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 1.0)])
def test_a_clip_of_a_single_frame_has_no_conditioning_frame(weights):
    assert drawn(weights, 1) == {"0": 1.0}


def test_a_prefix_of_two_latent_frames_is_the_first():
    assert drawn((0.0, 0.0, 0.0, 0.0, 1.0), 2) == {"10": 1.0}


def test_a_mask_depends_on_its_sample_alone():
    keys = jax.random.split(jax.random.key(3), 8)
    whole = cond_masks.draw(keys, (1.0, 1.0, 1.0, 1.0, 1.0), 6)
    part = cond_masks.draw(keys[3:5], (1.0, 1.0, 1.0, 1.0, 1.0), 6)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[3:5]), part, whole)


def test_the_conditioning_input_holds_mask_and_clean_latent_of_the_given_frames_only():
    x_0 = jax.random.normal(jax.random.key(0), (2, 3, 2, 4, 5)).at[0, 2].set(jnp.nan)
    kept = cond_masks.cond_input(x_0, jnp.array([[1, 1, 0], [0, 0, 1]], bool))
    assert kept.shape == (2, 3, 2, 4, 6) and kept.dtype == jnp.float32
    np.testing.assert_array_equal(kept[0, :2, ..., 0], 1)
    np.testing.assert_array_equal(kept[0, :2, ..., 1:], x_0[0, :2])
    np.testing.assert_array_equal(kept[0, 2], 0)  # not even where a value is not finite
    np.testing.assert_array_equal(kept[1, 2, ..., 1:], x_0[1, 2])
    np.testing.assert_array_equal(kept[1, :2], 0)
