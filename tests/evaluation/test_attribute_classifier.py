"""The shipped classifier reads fresh clips, belongs to this generator of shapes, and takes clips of any size."""

import numpy as np
import pytest

from paris_jax.data.sources.shapes import ATTRIBUTES, ShapesSource
from paris_jax.evaluation.metrics import attribute_accuracy, attribute_classifier
from paris_jax.evaluation.metrics.frechet import frechet_distance


@pytest.fixture(scope="module")
def shipped() -> attribute_classifier.AttributeClassifier:
    return attribute_classifier.AttributeClassifier.load()


def draw(count: int, seed: int = 77, frames: int = 8, height: int = 20, width: int = 20):
    """Clips that training did not see: float videos in [-1, 1] and their attributes."""
    clips = list(ShapesSource(seed, count, frames, height, width, fps=8.0))
    return np.stack([c.video for c in clips]).astype(np.float32) / 127.5 - 1, [c.attributes for c in clips]


def test_belongs_to_this_generator_of_shapes():
    """A generator that draws other clips needs a new classifier (evaluation/metrics/train_attribute_classifier.py)."""
    assert attribute_classifier.read_card()["generator_hash"] == attribute_classifier.generator_hash()
    assert {k: tuple(v) for k, v in attribute_classifier.read_card()["attributes"].items()} == ATTRIBUTES


def test_reads_fresh_clips(shipped):
    videos, asked = draw(300)
    hits = attribute_accuracy.hits(asked, shipped.predict(videos)[1])
    for name in ATTRIBUTES:
        assert hits[name].mean() > 0.95, name


def test_the_card_states_the_accuracy_that_is_needed():
    assert min(attribute_classifier.read_card()["accuracy"][name] for name in ATTRIBUTES) > 0.97
    assert attribute_classifier.WEIGHTS.stat().st_size < 1_000_000


def test_reads_noisy_clips_too(shipped):
    videos, asked = draw(150)
    noisy = videos + np.random.default_rng(0).normal(0, 0.1, videos.shape)
    hits = attribute_accuracy.hits(asked, shipped.predict(noisy)[1])
    for name in ATTRIBUTES:
        assert hits[name].mean() > 0.9, name


def test_reads_larger_and_longer_clips(shipped):
    videos, asked = draw(60, frames=16, height=40, width=40)
    hits = attribute_accuracy.hits(asked, shipped.predict(videos)[1])
    for name in ATTRIBUTES:
        assert hits[name].mean() > 0.85, name


def test_the_distance_grows_with_damage(shipped):
    other, _ = shipped.predict(draw(96, seed=78)[0])
    rng = np.random.default_rng(0)
    videos, _ = draw(96)

    def distance(made: np.ndarray) -> float:
        return frechet_distance(shipped.predict(made)[0], other)

    floor = distance(videos)
    assert distance(videos + rng.normal(0, 0.1, videos.shape)) < 1.2 * floor  # it sees through mild noise
    strong, stronger = (distance(videos + rng.normal(0, s, videos.shape)) for s in (0.4, 1.0))
    assert 1.5 * floor < strong < stronger
    assert distance(np.repeat(videos[:, :1], 8, axis=1)) > 2 * floor  # nothing moves


def test_one_world_alone_is_far_from_all_worlds(shipped):
    """What a collapsed generator would score."""
    videos, asked = draw(400)
    other, _ = shipped.predict(draw(96, seed=78)[0])
    digits = videos[[a["world"] == "digits" for a in asked]][:96]
    assert frechet_distance(shipped.predict(digits)[0], other) > 3 * frechet_distance(
        shipped.predict(videos[:96])[0], other
    )


def test_predictions_do_not_depend_on_the_batch_size(shipped):
    videos, _ = draw(7)
    features, read = shipped.predict(videos, batch=7)
    again, read_again = shipped.predict(videos, batch=4)
    np.testing.assert_allclose(features, again, atol=1e-4)
    assert read == read_again


def test_its_own_size_passes_unchanged():
    videos, _ = draw(2)
    np.testing.assert_allclose(attribute_classifier.resample(videos), videos, atol=1e-6)


def test_resampling_keeps_a_plain_colour_and_the_ends_of_time():
    videos = np.broadcast_to(np.linspace(-1, 1, 15)[None, :, None, None, None], (1, 15, 33, 50, 3))
    small = attribute_classifier.resample(videos)
    assert small.shape == (1, 8, 20, 20, 3)
    np.testing.assert_allclose(small[0, :, 7, 3, 1], np.linspace(-1, 1, 8), atol=1e-5)


def test_videos_of_another_shape_are_refused(shipped):
    with pytest.raises(ValueError, match="must be"):
        shipped.predict(np.zeros((8, 20, 20, 3)))
