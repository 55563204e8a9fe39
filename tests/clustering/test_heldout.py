"""Whether a clip is held out depends on its own id only, not on order or on other clips."""

import numpy as np

from paris_jax.clustering.heldout import is_heldout

IDS = [f"shapes-{i:06d}" for i in range(4000)]


def test_holds_out_about_the_requested_fraction():
    share = is_heldout(IDS, 0.05, seed=0).mean()
    assert 0.04 < share < 0.06
    assert not is_heldout(IDS, 0.0, seed=0).any()


def test_adding_or_permuting_clips_changes_no_clip():
    few = is_heldout(IDS[:1000], 0.1, seed=0)
    assert np.array_equal(is_heldout(IDS, 0.1, seed=0)[:1000], few)
    assert np.array_equal(is_heldout(IDS[:1000][::-1], 0.1, seed=0), few[::-1])


def test_a_larger_fraction_only_adds_clips():
    small, large = is_heldout(IDS, 0.05, seed=0), is_heldout(IDS, 0.2, seed=0)
    assert np.all(large[small])


def test_another_seed_holds_out_other_clips():
    assert np.any(is_heldout(IDS, 0.05, seed=0) != is_heldout(IDS, 0.05, seed=1))
