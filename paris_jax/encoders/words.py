"""The frozen word table; the encoding of a text and the check of its length, for all text encoders."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np

from paris_jax.artifacts.schemas import WordsDescription
from paris_jax.errors import UserError, nearest

UNKNOWN = "<unknown>"


@dataclasses.dataclass(frozen=True)
class TextEncoding:
    """One encoded text.

    Attributes:
      tokens: (L, Dt) float32 at the text's true length, L >= 1; every value fits the dtype in which it is stored.
      pooled: (Dp,) float32, likewise.
    """

    tokens: np.ndarray
    pooled: np.ndarray


def split(text: str) -> list[str]:
    """Returns the lower-case words of a text, without punctuation."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.lower())


def check_length(text: str, count: int, max_tokens: int, unit: str) -> None:
    """Raises UserError for a text of no or too many tokens."""
    if not count:
        raise UserError(f"The prompt {text!r} is empty; describe the video")
    if count > max_tokens:
        raise UserError(
            f"The prompt {text[:60]!r}... has {count} {unit}; the maximum is {max_tokens} (config.text.max_tokens); "
            "shorten it, or raise text.max_tokens"
        )


@dataclasses.dataclass(frozen=True)
class Words:
    """A frozen random table: each word's vector comes from the sha256 of the word, so no table is stored.

    Tokens carry the position of their word; pooled is the mean direction of the words.
    """

    vocabulary: tuple[str, ...]  # the words of the training captions, sorted
    width: int = 64
    max_tokens: int = 24

    stored: ClassVar[Any] = np.dtype(np.float16)

    @property
    def pooled_width(self) -> int:
        return self.width

    def encode(self, texts: Sequence[str]) -> list[TextEncoding]:
        """Encodes texts; words outside the vocabulary share one <unknown>.

        Raises:
          UserError: a text without a word, or with more than `max_tokens`.
        """
        return [self._encode(text) for text in texts]

    def null(self) -> TextEncoding:
        """The null text embedding, for dropout and guidance: one token of zeros, pooled zeros."""
        return TextEncoding(np.zeros((1, self.width), np.float32), np.zeros(self.pooled_width, np.float32))

    def unknown_words(self, text: str) -> dict[str, str]:
        """The words of a text that are in no training caption, each with the nearest known word (`errors.nearest`)."""
        return {word: nearest(word, self.vocabulary) for word in split(text) if word not in self._known}

    def unload(self) -> None:
        """Does nothing: there are no weights."""

    def describe(self) -> WordsDescription:
        return WordsDescription(tuple(self.vocabulary), self.width, self.max_tokens)

    def _encode(self, text: str) -> TextEncoding:
        words = split(text)
        check_length(text, len(words), self.max_tokens, "words")
        vectors = np.stack([word_vector(w if w in self._known else UNKNOWN, self.width) for w in words])
        total = vectors.sum(0)
        pooled = total * np.sqrt(self.width / np.sum(total**2))
        tokens = vectors + positions(len(words), self.width)
        return TextEncoding(rounded(tokens, self.stored), rounded(pooled, self.stored))

    @functools.cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(self.vocabulary)


@functools.lru_cache(maxsize=65536)
def word_vector(word: str, width: int) -> np.ndarray:
    """Returns (width,) float64 of zero mean and unit variance, uniform, from the word's sha256 alone."""
    blocks = (hashlib.sha256(f"{word}\n{block}".encode()).digest() for block in range(-(-width // 16)))
    digits = np.frombuffer(b"".join(blocks), "<u2")[:width]
    return ((digits + 0.5) / 32768 - 1) * np.sqrt(3.0)


@functools.lru_cache(maxsize=1024)
def positions(length: int, width: int) -> np.ndarray:
    """Returns sinusoids (length, width) float64: sine, then cosine, of periods from 2 pi to 2 pi 100 words."""
    rates = 100.0 ** -(np.arange(-(-width // 2)) / max(1, width // 2))
    angles = np.arange(length)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]


def rounded(x: np.ndarray, stored: Any) -> np.ndarray:
    """Rounds to a 16-bit dtype, returned as float32: sampling uses the values that were stored and trained on."""
    return x.astype(stored).astype(np.float32)


def words_of(captions: Iterable[str]) -> tuple[str, ...]:
    """Returns the vocabulary of captions: their words, sorted, each once."""
    return tuple(sorted({word for caption in captions for word in split(caption)}))
