"""`paris-jax sample`: prompts to videos."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console

from paris_jax.ensemble.api import Ensemble
from paris_jax.ensemble.samples import FORMATS
from paris_jax.errors import Refused

logger = logging.getLogger(__name__)


def sample(ensemble: str, prompts: Sequence[str], out: str | None, **how: Any) -> list[epath.Path]:
    """Samples `prompts` from an ensemble and writes the videos.

    Args:
      ensemble: folder of the ensemble, or "bundled:NAME".
      out: file to write (.mp4, .webm, .gif or .png); by default an mp4, a gif and a PNG contact sheet named after the
        first prompt and the seed, in the run's samples/ folder or the current one.
      **how: see `Ensemble.sample`.
    """
    if not prompts:
        raise Refused(
            "--prompt is missing; say what to show, "
            "for example --prompt='a small red circle moving left slowly on a white ground'"
        )
    if out and epath.Path(out).suffix.lower() not in FORMATS:
        raise Refused(f"--out={out} has the ending {epath.Path(out).suffix!r}; allowed are {', '.join(FORMATS)}")
    loaded = Ensemble.load(ensemble)
    unknown = sorted({word for prompt in prompts for word in loaded.text.unknown_words(prompt)})
    if unknown:
        logger.warning("the text encoder does not know %s; it was trained without", ", ".join(map(repr, unknown)))
    samples = loaded.sample(prompts, progress=True, **how)
    paths = [epath.Path(out)] if out else _default_paths(ensemble, prompts[0], how.get("seed", 0))
    written = [samples.save(path) for path in paths]
    console = Console(highlight=False)
    console.print(samples.bars())
    for path in written:
        console.print(f"wrote {path}", soft_wrap=True)
    return written


def _default_paths(ensemble: str, prompt: str, seed: int | list[int]) -> list[epath.Path]:
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    folder = epath.Path("samples") if ensemble.startswith("bundled:") else epath.Path(ensemble).parent / "samples"
    seeds = "-".join(map(str, np.atleast_1d(seed)[:3]))
    return [folder / f"{name}-seed{seeds}{ending}" for ending in (".mp4", ".gif", ".png")]
