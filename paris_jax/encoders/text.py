"""Text to a token sequence and a pooled vector.

An encoder has `encode`, `null`, `width`, `pooled_width`, `max_tokens`, `stored` (the dtype of cached embeddings) and
`describe`, whose JSON rebuilds it.
"""

import os
from collections.abc import Mapping
from typing import Any

import msgspec

from paris_jax.artifacts import schemas
from paris_jax.artifacts.schemas import T5ClipDescription, TextDescription
from paris_jax.config.experiment import Experiment
from paris_jax.encoders import published
from paris_jax.encoders.published import EncoderStore
from paris_jax.encoders.words import Words
from paris_jax.errors import UserError, nearest

# Widths (tokens, pooled) that the encoder fixes; T5-v1.1-XXL and CLIP ViT-L/14 are Paris 2.0's.
WIDTHS = {"minilm": (384, 384), "t5+clip": (4096, 768)}
NAMES = ("words", *WIDTHS)
STORED_DTYPES = {"words": "float16", "minilm": "float16", "t5+clip": "bfloat16"}  # of embeddings in the latent cache


def widths(name: str, width: int, t5: str = "", clip: str = "") -> tuple[int, int]:
    """Returns (token width, pooled width) of an encoder; `width` is that of the word table.

    For T5 and CLIP, the folders define them, where they are given.
    """
    if name == "t5+clip" and t5 and clip:
        return published.widths(t5, clip)
    return WIDTHS.get(name, (width, width))


def widths_of(experiment: Experiment) -> tuple[int, int]:
    """(token width, pooled width) of an experiment's text encoder."""
    return widths(experiment.text.name, experiment.text.width, experiment.text.t5, experiment.text.clip)


def described_widths(description: TextDescription) -> tuple[int, int]:
    """Returns (token width, pooled width) of the encoder that made the data, without its weights."""
    if isinstance(description, T5ClipDescription):
        return description.width, description.pooled_width
    return widths(schemas.name_of(description), getattr(description, "width", 0))


def text_encoder(name: str, **settings: Any) -> Any:
    """Returns the text encoder of this name, e.g. text_encoder("words", vocabulary=..., width=64, max_tokens=24)."""
    if name == "words":
        return Words(tuple(settings.pop("vocabulary", ())), **settings)
    if name == "minilm":
        from paris_jax.encoders.minilm import MiniLM  # reads 90 MB of weights

        return MiniLM(**settings)
    if name == "t5+clip":
        return published.T5Clip(**settings)
    raise UserError(f"text encoder {name!r}: must be one of {', '.join(NAMES)}{nearest(name, NAMES)}")


def from_description(
    description: TextDescription, folders: Mapping[str, str] | None = None, store: EncoderStore | None = None
) -> Any:
    """Rebuilds a text encoder from its `describe()`.

    Published encoders are read from `folders` ("t5", "clip"), or from PARIS_JAX_T5 and PARIS_JAX_CLIP.
    """
    settings = msgspec.to_builtins(description)
    if not isinstance(description, T5ClipDescription):
        return text_encoder(**settings)
    settings = {k: v for k, v in settings.items() if k not in ("width", "pooled_width")}
    named = {name: os.environ.get(f"PARIS_JAX_{name.upper()}", "") for name in ("t5", "clip")}
    given = {name: folder for name, folder in (folders or {}).items() if name in named}
    return text_encoder(**settings, **(named | given), store=store or EncoderStore())
