"""CLIP scores are cosines of CLIP's embeddings, cut texts are counted, and frames are prepared as CLIP's are."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from paris_jax.errors import UserError
from paris_jax.evaluation.metrics.clip_score import ClipEncoder, clip_scores
from paris_jax.evaluation.networks.frames import scale_and_crop
from tests.oracles.encoders import FOLDER

CLIP = FOLDER / "clip"


@pytest.fixture(scope="module")
def encoder():
    return ClipEncoder.load(CLIP)


def test_text_embeddings_are_units_and_do_not_depend_on_their_batch(encoder):
    texts = list(json.loads((CLIP / "expected" / "ids.json").read_text()))
    embedded, cut = encoder.embed_texts(texts)
    assert embedded.shape == (3, encoder.width) and cut == sum(
        len(encoder.tokenize(text)) > encoder.max_tokens for text in texts
    )
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-6)
    for i, text in enumerate(texts):
        alone, _ = encoder.embed_texts([text])
        np.testing.assert_allclose(alone[0], embedded[i], atol=1e-6)  # whatever it is padded to


def test_a_text_that_is_too_long_is_cut_and_counted(encoder):
    long = "red circle " * 200
    embedded, cut = encoder.embed_texts([long, "red circle"])
    assert cut == 1
    longer, _ = encoder.embed_texts([long + "large"])
    np.testing.assert_allclose(embedded[0], longer[0], atol=1e-6)


def test_a_score_is_the_mean_cosine_of_frames_and_text():
    rng = np.random.default_rng(0)
    frames, texts = rng.standard_normal((2, 3, 4)), rng.standard_normal((2, 4))
    frames /= np.linalg.norm(frames, axis=-1, keepdims=True)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    expected = [np.mean([frames[n, t] @ texts[n] for t in range(3)]) for n in range(2)]
    np.testing.assert_allclose(clip_scores(frames, texts), expected)
    assert clip_scores(texts[:, None], texts) == pytest.approx([1, 1])


def test_frames_are_embedded_one_by_one(encoder):
    videos = np.random.default_rng(1).integers(0, 256, (2, 3, 20, 24, 3), np.uint8)
    embedded = encoder.embed_frames(videos)
    assert embedded.shape == (2, 3, encoder.width)
    np.testing.assert_allclose(encoder.embed_frames(videos[1:, 2:])[0, 0], embedded[1, 2], atol=1e-5)


def test_a_frame_of_the_networks_size_is_only_scaled_in_its_values():
    frames = np.random.default_rng(2).integers(0, 256, (1, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(scale_and_crop(jnp.asarray(frames), 8), frames / 255, atol=1e-6)
    wide = np.concatenate([0 * frames, frames, 0 * frames], axis=2)
    np.testing.assert_allclose(scale_and_crop(jnp.asarray(wide), 8), frames / 255, atol=1e-6)


def test_a_text_encoder_alone_is_refused():
    with pytest.raises(UserError, match="lacks CLIP's text encoder with its projection"):
        ClipEncoder.load(FOLDER / "clip-text")


def test_the_hash_is_of_the_weights(encoder, tmp_path):
    for file in CLIP.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = safetensors.numpy.load_file(CLIP / "model.safetensors")
    tensors["visual_projection.weight"] = tensors["visual_projection.weight"] + 1
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    assert ClipEncoder.load(tmp_path).sha256 != encoder.sha256
