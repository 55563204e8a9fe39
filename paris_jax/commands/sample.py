"""`paris-jax sample`: prompts to videos."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console

from paris_jax.artifacts.run_folder import find_run_folder
from paris_jax.data import video as video_io
from paris_jax.encoders.codecs import to_uint8
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.ensemble.progress import Interrupted
from paris_jax.ensemble.samples import FORMATS, Samples
from paris_jax.errors import UserError
from paris_jax.training.distributed import SWITCH

logger = logging.getLogger(__name__)


def sample(
    ensemble: str, prompts: Sequence[str], out: str | None, keeping: dict[str, Any] | None = None, **how: Any
) -> list[epath.Path]:
    """Samples `prompts` from an ensemble and writes the videos; of several processes of one job, the first writes.

    Args:
      ensemble: folder of the ensemble, or "bundled:NAME".
      out: file to write (.mp4, .webm, .gif or .png); by default an mp4, a gif and a PNG contact sheet named after the
        first prompt and the seed, in the run's samples/ folder or the current one.
      keeping: how the experts are kept: `mesh`, `weights`, `offload` and `encoders` of `Ensemble.load`.
      **how: see `Ensemble.sample`. With `preview_every`, a contact sheet of what is predicted so far stands beside the
        videos until they are there.

    Raises:
      Interrupted: Ctrl-C; what was predicted by then is written, under a name that says so.
    """
    if not prompts:
        raise UserError(
            "--prompt is missing; say what to show, "
            "for example --prompt='a small red circle moving left slowly on a white ground'"
        )
    if out and epath.Path(out).suffix.lower() not in FORMATS:
        raise UserError(f"--out={out} has the ending {epath.Path(out).suffix!r}; allowed are {', '.join(FORMATS)}")
    if jax.process_count() > 1:
        _check_several(keeping or {})
    loaded = Ensemble.load(ensemble, **keeping or {}, drop_encoders=True)  # all prompts are known
    unknown = sorted({word for prompt in prompts for word in loaded.text.unknown_words(prompt)})
    if unknown:
        logger.warning("the text encoder does not know %s; it was trained without", ", ".join(map(repr, unknown)))
    paths = [epath.Path(out)] if out else _default_paths(ensemble, prompts[0], how.get("seed", 0))
    console, shown = Console(highlight=False), paths[0].parent / f"{paths[0].stem}-preview.png"

    previews = []

    def preview(step: int, videos: np.ndarray) -> None:
        previews.append(step)
        video_io.write_png(shown, video_io.contact_sheet(to_uint8(videos), list(prompts)))

    previewing = {"on_preview": preview} if how.get("preview_every") else {}
    try:
        samples = loaded.sample(prompts, progress=True, **previewing, **how)
    except Interrupted as stop:
        partial = [path.parent / f"{path.stem}-step{stop.done}of{stop.steps}{path.suffix}" for path in paths]
        _write(stop.samples, partial if stop.done and not jax.process_index() else [], console)
        raise
    finally:
        if previews:
            shown.unlink(missing_ok=True)
    if jax.process_index():
        return []
    console.print(samples.bars())
    return _write(samples, paths, console)


def _check_several(keeping: dict[str, Any]) -> None:
    """Refuses several processes that are not told how they share the work."""
    count, devices = jax.process_count(), jax.device_count()
    if not keeping.get("mesh"):
        raise UserError(
            f"--mesh is missing: this job has {count} processes with {devices} devices together; say how they share "
            f"the work, such as --mesh=expert:{devices}, or set {SWITCH}=0 to run this process alone"
        )


def _write(samples: Samples, paths: list[epath.Path], console: Console) -> list[epath.Path]:
    for path in paths:
        console.print(f"wrote {samples.save(path)}", soft_wrap=True)
    return paths


def _default_paths(ensemble: str, prompt: str, seed: int | list[int]) -> list[epath.Path]:
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
    run = None if ensemble.startswith("bundled:") else find_run_folder(ensemble)
    folder = run.samples if run else epath.Path("samples")
    seeds = "-".join(map(str, np.atleast_1d(seed)[:3]))
    return [folder / f"{name}-seed{seeds}{ending}" for ending in (".mp4", ".gif", ".png")]
