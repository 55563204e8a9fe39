"""An object that changes is noticed, and one that only moves is not."""

import numpy as np
import pytest

from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.evaluation.metrics.identity import identity_kept, subject_consistency


def test_real_clips_keep_their_object_and_spliced_ones_do_not():
    clips = list(ShapesSource(seed=11, num_clips=120, frames=8, height=20, width=20, fps=8.0))
    videos = np.stack([clip.video for clip in clips]) / 127.5 - 1
    others = np.array([clip.attributes["colour"] for clip in clips])
    spliced = np.concatenate([videos[:, :4], np.roll(videos, 1, axis=0)[:, 4:]], axis=1)
    differ = others != np.roll(others, 1)
    classifier = AttributeClassifier.load()
    assert identity_kept(classifier, videos).mean() > 0.85
    assert identity_kept(classifier, spliced)[differ].mean() < 0.15


def test_consistency_is_one_for_equal_frames_and_less_where_they_differ():
    same = np.repeat(np.eye(3)[None, :1], 4, axis=1)
    assert subject_consistency(same) == pytest.approx([1])
    turned = np.stack([np.eye(3)[[0, 0, 1, 1]]])
    # Cosines with the first frame 1, 0, 0, with the one before 1, 0, 1.
    assert subject_consistency(turned) == pytest.approx([np.mean([1, 0, 0.5])])
    with pytest.raises(ValueError, match="T >= 2"):
        subject_consistency(same[:, :1])
