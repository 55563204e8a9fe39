"""Companions: rows of any network, of CLIP and of steadiness, paired by prompt, with what is left out."""

import dataclasses

import numpy as np
import pytest
from etils import epath

from paris_jax.errors import UserError
from paris_jax.evaluation import companions, features
from paris_jax.evaluation.cache import ResultCache
from paris_jax.evaluation.companions import OTHERS, Instruments
from paris_jax.evaluation.features import FeatureNetwork, TextScores, WeightFiles
from paris_jax.evaluation.metrics.aesthetic import AestheticHead
from paris_jax.evaluation.metrics.clip_score import ClipEncoder
from paris_jax.evaluation.metrics.motion import temporal_flicker
from tests.oracles.encoders import FOLDER

N = 20


@pytest.fixture
def videos():
    """The ensemble is near the real clips, the monolith far from them."""
    rng = np.random.default_rng(0)
    base = rng.uniform(-0.5, 0.5, (2 * N, 1, 1, 1, 3)) + rng.uniform(-0.1, 0.1, (2 * N, 4, 12, 12, 3))
    sets = {"real": base[:N], OTHERS: base[N:], "ensemble": base[:N] + 0.02, "monolith": base[:N] + 0.45}
    return {name: np.clip(v, -1, 1).astype(np.float32) for name, v in sets.items()}


def colours(videos):
    return videos.astype(np.float32).mean((1, 2, 3)) / 255


@pytest.fixture
def network():
    return FeatureNetwork("colour", "Frechet distance (colours)", 3, 1, "all frames", "0" * 64, colours)


def run(videos, instruments, tmp_path):
    shapes = {name: np.random.default_rng(1).standard_normal((N, 64)) for name in videos}
    cache = ResultCache(epath.Path(tmp_path), "k" * 16)
    flicker = {name: temporal_flicker(v) for name, v in videos.items()}
    return companions.rows(videos, ["a red ball"] * N, shapes, flicker, instruments, cache, is_shapes=False)


def test_each_network_has_three_distances_and_the_nearer_model_wins(videos, network, tmp_path):
    rows, left_out = run(videos, Instruments((network,), None), tmp_path)
    found = {row["id"]: row for row in rows}
    assert found.keys() == {"shapes_kernel", "colour_frechet", "colour_limit", "colour_kernel", "flicker"}
    for kind in ("frechet", "kernel"):
        row = found[f"colour_{kind}"]
        assert row["winner"] == "ensemble"
        assert row["ensemble"]["value"] < row["monolith"]["value"] and row["reference"]["n"] == N
    assert any("64 features need 128 clips" in sentence for sentence in left_out)


def test_features_are_not_computed_again(videos, network, tmp_path):
    calls = []

    def embed(given):
        calls.append(len(given))
        return colours(given)

    instruments = Instruments((dataclasses.replace(network, embed=embed),), None)
    first = run(videos, instruments, tmp_path)
    assert len(calls) > 0
    calls.clear()
    assert run(videos, instruments, tmp_path) == first and calls == []


def test_features_of_frames_are_compared_frame_by_frame(videos, tmp_path):
    def embed(given):
        return given.astype(np.float32).mean((2, 3)) / 255

    by_frame = FeatureNetwork("colour", "Per-frame distance (colours)", 3, 1, "", "", embed)
    rows, _ = run(videos, Instruments((by_frame,), None), tmp_path)
    assert next(row for row in rows if row["id"] == "colour_frechet")["winner"] == "ensemble"


def test_clip_and_aesthetic_scores_are_of_each_clip(videos, tmp_path):
    encoder = ClipEncoder.load(FOLDER / "clip")
    head = AestheticHead(np.ones(encoder.width), 5.0, "v1", "")
    rows, _ = run(videos, Instruments((), TextScores(encoder, head)), tmp_path)
    found = {row["id"]: row for row in rows}
    assert found["clip"]["better"] == "higher" and found["clip"]["note"].endswith("raw cosine")
    assert abs(found["clip"]["reference"]["value"]) <= 1
    assert found["aesthetic"]["difference"]["n"] == N and found["aesthetic"]["note"] == "LAION v1"


def test_a_network_that_needs_more_frames_is_refused_before_sampling(monkeypatch, network):
    needy = dataclasses.replace(network, label="FVD (I3D)", min_frames=9)
    monkeypatch.setattr(features, "networks", lambda files: [needy])
    with pytest.raises(UserError, match=r"FVD .* needs at least 9 frames, these videos have 8"):
        Instruments.load(WeightFiles(), 8)
