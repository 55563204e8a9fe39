"""The features separate the worlds without labels."""

import numpy as np

from paris_jax.data.sources import shapes
from paris_jax.encoders import features

SOURCE = shapes.ShapesSource(0, 400, 8, 20, 20, 8.0)


def test_the_worlds_are_three_natural_clusters():
    from sklearn.cluster import KMeans

    describe = features.Statistics()
    clips = list(SOURCE)
    table = describe(np.stack([clip.video for clip in clips]))
    worlds = np.asarray([shapes.WORLDS.index(clip.attributes["world"]) for clip in clips])
    scaled = (table - table.mean(0)) / (table.std(0) + 1e-3)
    for kind in (table, scaled, table / np.linalg.norm(table, axis=1, keepdims=True)):
        for seed in range(3):
            found = KMeans(3, n_init=4, random_state=seed).fit_predict(kind)
            purity = sum(np.bincount(worlds[found == k]).max() for k in range(3)) / len(worlds)
            assert purity > 0.98


def test_features_are_finite_of_one_width_and_like_weight():
    describe = features.features("statistics")
    rng = np.random.default_rng(0)
    for shape in ((8, 20, 20, 3), (1, 4, 4, 3), (16, 33, 47, 3)):
        for video in (rng.integers(0, 256, shape), np.zeros(shape), np.full(shape, 255)):
            (vector,) = describe(video.astype(np.uint8)[None])
            assert vector.shape == (96,)
            assert vector.dtype == np.float32
            assert np.isfinite(vector).all()
            assert np.linalg.norm(vector) < 2.5


def test_motion_is_seen():
    describe = features.Statistics()
    clip = SOURCE[2].video
    still = np.broadcast_to(clip[:1], clip.shape)
    moves, stands = describe(np.stack([clip, still]))[:, -16:].sum(1)
    assert moves > stands == 0
