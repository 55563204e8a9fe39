"""T5, CLIP and DINOv2 against transformers, from files as they are published; and clips through them to videos."""

import importlib.util
import json
import shutil

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from paris_jax import Ensemble
from paris_jax.artifacts.run_folder import Role, RunFolder, roles
from paris_jax.clustering.build import cluster
from paris_jax.commands.assemble import assemble
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import prepare
from paris_jax.data.records import read_records
from paris_jax.encoders import clip, dinov2, features, published, t5, text
from paris_jax.encoders.tokens import tokenizer
from paris_jax.errors import UserError
from tests.conftest import micro_config
from tests.oracles import encoders as oracle

PROMPTS = ["a large red circle moving right fast on a white ground", "a striped ball"]


def folder(name):
    return str(oracle.FOLDER / name)


def expected(name):
    return safetensors.numpy.load_file(oracle.FOLDER / name / "expected" / "outputs.safetensors")


@pytest.mark.parametrize("name", oracle.NAMES)
def test_every_output_is_that_of_transformers(name):
    errors = oracle.errors(name, expected(name))
    assert errors and max(errors.values()) < 1e-4, errors
    assert max(oracle.errors(name, expected(name), "bfloat16").values()) < 0.02


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs torch and transformers")
@pytest.mark.parametrize("name", oracle.NAMES)
def test_the_fixtures_are_what_the_oracle_says_today(name):
    _, made = oracle.theirs(name)
    for key, value in expected(name).items():
        np.testing.assert_allclose(value, made[key], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "clip"])
def test_texts_become_the_tokens_of_the_published_tokenizers(name):
    known = json.loads((oracle.FOLDER / name / "expected" / "ids.json").read_text())
    assert len(known) == 3
    for said, ids in known.items():
        assert tokenizer(folder(name))(said) == ids


def test_a_tokenizer_may_stand_beside_its_encoder_as_in_diffusers(tmp_path):
    (tmp_path / "text_encoder_2").mkdir()
    shutil.copytree(folder("t5"), tmp_path / "tokenizer_2")
    assert tokenizer(tmp_path / "text_encoder_2")("a ball") == tokenizer(folder("t5"))("a ball")
    with pytest.raises(UserError, match=r"text_encoder and .* hold no tokenizer: put tokenizer\.json, spiece\.model"):
        tokenizer(tmp_path / "text_encoder")


def test_positions_are_interpolated_by_cubic_convolution():
    """A cubic polynomial is met exactly away from the edges, whatever the grid."""
    matrix = dinov2.cubic(40, 56, sharpness=-0.5)  # the sharpness for which Keys proves it, to second order
    at = (np.arange(56) + 0.5) * 40 / 56 - 0.5
    np.testing.assert_allclose((matrix @ np.arange(40.0) ** 2)[4:-4], at[4:-4] ** 2, atol=1e-3)
    np.testing.assert_allclose(dinov2.cubic(7, 7), np.eye(7), atol=1e-7)
    np.testing.assert_allclose(dinov2.cubic(5, 13).sum(1), 1, atol=1e-6)


def test_distances_of_t5_fall_into_buckets_by_side_and_logarithm():
    found = t5.bucket(300, 32, 128)
    np.testing.assert_array_equal(found[100, 92:109], [8, 7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23, 24])
    assert found[299, 0] == 15 and found[0, 299] == 31 and found.max() == 31


def damaged(tmp_path, name, change):
    shutil.copytree(folder(name), tmp_path / "weights")
    path = tmp_path / "weights" / "model.safetensors"
    weights = safetensors.numpy.load_file(path)
    change(weights)
    safetensors.numpy.save_file(weights, path)
    return tmp_path / "weights"


@pytest.mark.parametrize("name, read", [("t5", t5.read), ("clip", clip.read), ("dinov2", dinov2.read)])
def test_every_tensor_that_does_not_fit_is_named_at_once(name, read, tmp_path):
    names = sorted(safetensors.numpy.load_file(oracle.FOLDER / name / "model.safetensors"))
    gone, cut = next(n for n in names if "1." in n and "norm" in n), next(n for n in names if n.endswith("norm.weight"))

    def change(w):
        del w[gone]
        w[cut] = w[cut][:-1]
        w["adapter.weight"] = np.ones(2, np.float32)

    with pytest.raises(UserError, match="3 of its tensors do not fit") as refused:
        read(damaged(tmp_path, name, change))
    for said in (f"{gone} is missing", f"{cut} has shape (31,) instead of (32,)", "adapter.weight is extra"):
        assert said in str(refused.value)


def test_what_is_no_encoder_of_the_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist; name the folder"):
        t5.read(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: .* missing required field `num_heads`"):
        t5.read(folder("clip"))
    with pytest.raises(UserError, match="holds no CLIP encoder"):
        clip.read(folder("t5"))
    shutil.copytree(folder("t5"), tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text()) | {"feed_forward_proj": "relu"}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"feed_forward_proj is 'relu'; T5-v1\.1's is 'gated-gelu'"):
        t5.read(tmp_path / "old")


def both(**how):
    return published.T5Clip(t5=folder("t5"), clip=folder("clip"), **how)


def test_a_text_is_encoded_at_its_true_length_whatever_stands_beside_it():
    encoder = both(max_tokens=64)
    alone, among = (
        encoder.encode(PROMPTS[1:])[0],
        encoder.encode([PROMPTS[0], PROMPTS[1] + " and more of it", PROMPTS[1]])[2],
    )
    assert alone.tokens.shape == (len(tokenizer(folder("t5"))(PROMPTS[1])), 32) and alone.pooled.shape == (32,)
    np.testing.assert_allclose(alone.tokens, among.tokens, atol=2e-3)
    np.testing.assert_allclose(alone.pooled, among.pooled, atol=2e-3)
    assert encoder.width == encoder.pooled_width == 32
    assert text.described_widths(encoder.describe()) == (32, 32)
    assert "t5" not in str(msgspec.structs.replace(encoder.describe(), weights={})).removeprefix("T5ClipDescription")


def test_a_text_too_long_for_clip_is_cut_there_and_too_long_for_t5_refused():
    long = " ".join(["a red ball"] * 12)
    encoding = both().encode([long])[0]
    assert np.isfinite(encoding.pooled).all() and len(encoding.tokens) > 24
    with pytest.raises(UserError, match=r"has \d+ tokens; the maximum is 8"):
        both(max_tokens=8).encode([long])
    with pytest.raises(UserError, match="is empty"):
        both().encode([" "])


def test_other_weights_than_those_promised_are_refused_by_name(tmp_path):
    described = both().describe()
    assert text.from_description(described, {"t5": folder("t5"), "clip": folder("clip")}).describe() == described
    other = damaged(tmp_path, "t5", lambda w: w["shared.weight"].__setitem__((0, 0), 9.0))
    with pytest.raises(UserError, match=r"text\.t5=.*weights have the hash .* this data was made with"):
        text.from_description(described, {"t5": str(other), "clip": folder("clip")})
    with pytest.raises(UserError, match=r"text\.t5 is empty; name the folder"):
        text.from_description(described)


def test_folders_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("PARIS_JAX_T5", folder("t5"))
    monkeypatch.setenv("PARIS_JAX_CLIP", folder("clip"))
    assert text.from_description(both().describe()).t5 == folder("t5")


def test_dinov2_describes_a_clip_by_its_look(monkeypatch):
    monkeypatch.setattr(published, "SIDE", 28)
    describe = features.features("dinov2", folder("dinov2"))
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (6, 20, 28, 3), np.uint8)
    found, same, other = describe(np.stack([video, video[[0, 0, 2, 3, 3, 5]], 255 - video]))
    assert found.shape == (32,) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found), 1, rtol=1e-5)
    np.testing.assert_allclose(same, found, atol=1e-5)  # frames 0, 2, 3 and 5 are seen
    assert np.abs(other - found).max() > 1e-3
    np.testing.assert_allclose(describe(video[None])[0], found, atol=1e-5)  # whatever stands beside it
    with pytest.raises(UserError, match=r"features\.weights is empty"):
        features.features("dinov2")


def test_clips_go_through_published_encoders_to_videos(tmp_path, monkeypatch):
    """Every stage, with tiny networks of each kind; training needs none of their files."""
    monkeypatch.setattr(published, "SIDE", 28)  # seven patches a side are enough here
    config = micro_config()
    config.data.num_clips = 40
    config.text.update(name="t5+clip", max_tokens=96, t5=folder("t5"), clip=folder("clip"))
    config.features.update(name="dinov2", weights=folder("dinov2"))
    config.training.update(steps=4)
    config.router_training.update(steps=4)
    config.clustering.num_clusters = 2
    experiment, run = Experiment.from_config(config), RunFolder(tmp_path / "run")
    prepare(experiment, run)
    cluster(experiment, run)
    elsewhere = config.copy_and_resolve_references()
    elsewhere.text.update(t5="", clip="")
    elsewhere.features.weights = ""
    assert Experiment.from_config(elsewhere).hash == experiment.hash  # where they lie decides nothing
    for role in roles(2):
        if role != Role("monolith"):
            train(Experiment.from_config(elsewhere), run, role)
    assemble(experiment, run)
    other = damaged(tmp_path, "t5", lambda w: w["shared.weight"].__setitem__((0, 0), 9.0))
    config.text.t5 = str(other)
    with pytest.raises(UserError, match=r"the weights of the text encoder changed; .* learned from the old clips"):
        prepare(Experiment.from_config(config), run)
    ensemble_encoders = {"t5": folder("t5"), "clip": folder("clip")}
    ensemble = Ensemble.load(run.ensemble, encoders=ensemble_encoders)
    assert np.isfinite(ensemble.sample(PROMPTS, num_inference_steps=2).videos).all()
    apart = Ensemble.load(run.ensemble, encoders=ensemble_encoders, drop_encoders=True)
    made, read = ensemble.sample(PROMPTS, num_inference_steps=2, negative_prompt="a ball"), []
    readers = dict(published.READERS)
    for kind in ("t5", "clip"):
        monkeypatch.setitem(
            published.READERS,
            kind,
            lambda where, kind=kind: (read.append((kind, "params" in vars(apart._placed))), readers[kind](where))[1],
        )
    again = apart.sample(PROMPTS, num_inference_steps=2, negative_prompt="a ball")
    np.testing.assert_array_equal(again.videos, made.videos)
    assert read == [("t5", False), ("clip", False)]  # once, before the experts
    assert not apart.text.store.kinds and ensemble.text.store.kinds == ["t5", "clip"]
    (record, *_) = read_records(run.data)
    assert record.tokens.dtype == record.pooled.dtype == published.T5Clip.stored
    with pytest.raises(UserError, match=r"text\.t5 is empty"):
        Ensemble.load(run.ensemble)
