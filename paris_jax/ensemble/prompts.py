"""Prompts as the sampler is told them."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from paris_jax.encoders import published
from paris_jax.encoders.text import TextEncoding
from paris_jax.ensemble.sampler import Text


class Prompts:
    """Encodes prompts; with `drop`, forgets published encoders as soon as they did their work, and remembers it."""

    def __init__(self, encoder: Any, trained_length: int, drop: bool):
        self._encoder, self._trained_length, self._drop = encoder, trained_length, drop
        self._known: dict[str, TextEncoding] = {}
        self._none: TextEncoding | None = None

    def expect(self, prompts: Iterable[str]) -> None:
        """Encodes at once what will be asked for one by one, so that dropped encoders are not read again."""
        if self._drop:
            self._encode([*prompts])

    def null(self, like: Text) -> Text:
        """As many prompts that say nothing, as training drops them, of the same lengths as other prompts."""
        B, L, _ = like.tokens.shape
        none = self._null()
        tokens = jnp.pad(jnp.asarray(none.tokens), ((0, max(L - len(none.tokens), 0)), (0, 0)))
        each = (tokens, jnp.int32(len(none.tokens)), jnp.asarray(none.pooled))
        return Text(*(jnp.broadcast_to(one, (B, *one.shape)) for one in each))

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Encodes prompts, padded to the longest caption trained on, or longer ones to the most the encoder takes."""
        found = self._encode(list(prompts))
        longest = max(len(e.tokens) for e in found)
        length = self._trained_length if longest <= self._trained_length else self._encoder.max_tokens
        tokens = np.zeros((len(found), length, found[0].tokens.shape[1]), np.float32)
        for row, encoding in zip(tokens, found, strict=True):
            row[: len(encoding.tokens)] = encoding.tokens
        return Text(
            jnp.asarray(tokens),
            jnp.asarray([len(e.tokens) for e in found], jnp.int32),
            jnp.asarray(np.stack([e.pooled for e in found]), jnp.float32),
        )

    def _encode(self, prompts: list[str]) -> list[TextEncoding]:
        if not self._drop:
            return self._encoder.encode(prompts)
        try:
            self._null()
            if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
                self._known |= zip(new, self._encoder.encode(new), strict=True)
        finally:
            published.drop("t5", "clip")
        return [self._known[prompt] for prompt in prompts]

    def _null(self) -> TextEncoding:
        none = self._none = self._none or self._encoder.null()
        return none
