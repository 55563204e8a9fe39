"""Text to a token sequence and a pooled vector.

An encoder has `encode`, `null`, `width`, `pooled_width`, `max_tokens`, `stored` (the dtype of what is kept on disk) and
`describe`, whose JSON rebuilds it.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from paris_jax.errors import Refused, nearest

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
    """Refuses a text of no or too many tokens."""
    if not count:
        raise Refused(f"The prompt {text!r} is empty; say what is to be seen")
    if count > max_tokens:
        raise Refused(
            f"The prompt {text[:60]!r}... has {count} {unit}; at most {max_tokens} are taken (config.text.max_tokens); "
            "shorten it, or raise text.max_tokens"
        )


@dataclasses.dataclass(frozen=True)
class Words:
    """A frozen random table: each word's vector comes from the sha256 of the word, so no table is stored.

    Tokens carry the place of their word in the text; pooled is the mean direction of the words.
    """

    vocabulary: tuple[str, ...]  # the words of the training captions, sorted
    width: int = 64
    max_tokens: int = 24

    stored: ClassVar[Any] = np.dtype(np.float16)

    @property
    def pooled_width(self) -> int:
        return self.width

    def encode(self, texts: Sequence[str]) -> list[TextEncoding]:
        """Encodes texts; a word outside the vocabulary stands as one common <unknown>.

        Raises:
          Refused: a text without a word, or with more than `max_tokens`.
        """
        return [self._encode(text) for text in texts]

    def null(self) -> TextEncoding:
        """The encoding of no text, for dropout and guidance: one token of zeros, pooled zeros."""
        return TextEncoding(np.zeros((1, self.width), np.float32), np.zeros(self.pooled_width, np.float32))

    def unknown_words(self, text: str) -> list[str]:
        """Returns the words of a text that no training caption has."""
        return [word for word in dict.fromkeys(split(text)) if word not in self._known]

    def describe(self) -> dict[str, Any]:
        return {
            "name": "words",
            "vocabulary": list(self.vocabulary),
            "width": self.width,
            "max_tokens": self.max_tokens,
        }

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
    """Rounds to what a 16-bit dtype holds, as float32: what is sampled with is what was stored and trained on."""
    return x.astype(stored).astype(np.float32)


def words_of(captions: Iterable[str]) -> tuple[str, ...]:
    """Returns the vocabulary of captions: their words, sorted, each once."""
    return tuple(sorted({word for caption in captions for word in split(caption)}))


# Widths (token sequence, pooled vector) of encoders that have their own; T5-v1.1-XXL and CLIP ViT-L/14 are Paris 2.0's.
WIDTHS = {"minilm": (384, 384), "t5+clip": (4096, 768)}
NAMES = ("words", *WIDTHS)


def widths(name: str, width: int, t5: str = "", clip: str = "") -> tuple[int, int]:
    """Returns (token width, pooled width) of an encoder; `width` is the frozen table's.

    Those of T5 and CLIP are said by their folders, where these are named.
    """
    published = WIDTHS.get(name, (width, width))
    if name != "t5+clip" or not (t5 and clip):
        return published
    from paris_jax.weights.reading import described

    found = described(clip)
    return described(t5, "d_model")["d_model"], found.get("text_config", found)["hidden_size"]


def described_widths(description: dict[str, Any]) -> tuple[int, int]:
    """Returns (token width, pooled width) of the encoder that data were made with, without its weights."""
    width = description.get("width", 0)
    pooled = description.get("pooled_width")
    return (width, pooled) if pooled else widths(description["name"], width)


def text_encoder(name: str, **settings: Any) -> Any:
    """Returns the text encoder of this name, e.g. text_encoder("words", vocabulary=..., width=64, max_tokens=24)."""
    if name == "words":
        return Words(tuple(settings.pop("vocabulary", ())), **settings)
    if name == "minilm":
        from paris_jax.encoders.minilm import MiniLM  # reads 90 MB of weights: only where it is asked for

        return MiniLM(**settings)
    if name == "t5+clip":
        from paris_jax.encoders.published import T5Clip

        return T5Clip(**settings)
    raise Refused(f"text encoder {name!r}: must be one of {', '.join(NAMES)}{nearest(name, NAMES)}")


def from_description(description: dict[str, Any], folders: Mapping[str, str] | None = None) -> Any:
    """Rebuilds a text encoder from its `describe()`.

    Published ones are looked for in `folders` ("t5", "clip"), or else where the environment says (PARIS_JAX_T5,
    PARIS_JAX_CLIP).
    """
    if description["name"] != "t5+clip":
        return text_encoder(**description)
    description = {k: v for k, v in description.items() if k not in ("width", "pooled_width")}
    named = {name: os.environ.get(f"PARIS_JAX_{name.upper()}", "") for name in ("t5", "clip")}
    given = {name: folder for name, folder in (folders or {}).items() if name in named}
    return text_encoder(**description, **(named | given))
