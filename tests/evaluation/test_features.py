"""Features are the same whatever the batch and on however many devices."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from paris_jax.errors import UserError
from paris_jax.evaluation import features
from paris_jax.evaluation.features import WeightFiles
from tests.oracles.encoders import FOLDER

ROOT = Path(__file__).parents[2]


def videos(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 20, 24, 3), np.uint8)


@pytest.fixture
def dinov2(monkeypatch):
    monkeypatch.setattr(features, "DINO_SIDE", 32)
    return features.networks(WeightFiles(dinov2=str(FOLDER / "dinov2")))[0]


def test_features_of_frames_do_not_depend_on_the_batch(dinov2):
    given = videos(5)
    found = dinov2(given)
    assert found.shape == (5, 3, dinov2.width)
    np.testing.assert_allclose(dinov2(given[3:4])[0], found[3], atol=1e-4)


def test_progress_counts_videos(dinov2):
    counted = []
    dinov2(videos(5), counted.append)
    assert sum(counted) == 5


def test_too_few_frames_are_refused(dinov2):
    with pytest.raises(UserError, match="needs at least 9 frames, these videos have 3"):
        dataclasses.replace(dinov2, label="FVD (I3D)", min_frames=9)(videos(1))


def test_eight_devices_give_the_features_of_one(tmp_path):
    code = f"""
import sys, numpy as np, jax
from paris_jax.evaluation import features
from tests.evaluation.test_features import videos
features.DINO_SIDE = 32
(network,) = features.networks(features.WeightFiles(dinov2={str(FOLDER / "dinov2")!r}))
np.save(sys.argv[1], network(videos(11)))
print(len(jax.devices()))
"""
    found = []
    for count in (1, 8):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}", "JAX_PLATFORMS": "cpu", "PATH": ""}
        path = tmp_path / f"{count}.npy"
        done = subprocess.run([sys.executable, "-c", code, str(path)], env=flags, check=True, cwd=ROOT,
                              capture_output=True, text=True)  # fmt: skip
        assert done.stdout.strip() == str(count)
        found.append(np.load(path))
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
