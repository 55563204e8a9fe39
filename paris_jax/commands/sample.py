"""`paris-jax sample`: prompts to videos."""

import contextlib
import dataclasses
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from etils import epath
from rich.console import Console

from paris_jax.artifacts import locks
from paris_jax.artifacts.run_folder import find_run_folder
from paris_jax.artifacts.safe_files import is_local
from paris_jax.data import video as video_io
from paris_jax.encoders.codecs import to_uint8
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.ensemble.progress import Interrupted
from paris_jax.ensemble.samples import FORMATS, Samples
from paris_jax.errors import UserError, nearest
from paris_jax.training.distributed import SWITCH

REQUEST_FIELDS = ("prompt", "seed", "negative_prompt", "image", "last_image", "video")
NAME_LENGTH = 60  # characters of a prompt in a file name


@dataclasses.dataclass(frozen=True)
class Output:
    """Where videos go: a file, or files named after their prompts in a folder.

    Attributes:
      out: one file (.mp4, .webm, .gif or .png); "" for files named after the prompts.
      folder: of these files; "" for RUN/samples, or ./samples for bundled ensembles.
      grid: one file with all videos.
      overwrite: whether existing files may be replaced.
    """

    out: str = ""
    folder: str = ""
    grid: bool = False
    overwrite: bool = False

    def paths(self, ensemble: str, prompts: Sequence[str], seeds: Sequence[int]) -> list[epath.Path]:
        """A file for each video, or one for the grid; refuses paths that could not be written afterwards."""
        if self.out and self.folder:
            raise UserError("--out names one file and --out_dir a folder; give one of them")
        if self.out and len(prompts) > 1 and not self.grid:
            raise UserError(
                f"--out={self.out} names one file for {len(prompts)} prompts; add --grid to tile them into it, or give "
                "--out_dir for a file each"
            )
        if self.out:
            path = epath.Path(self.out)
            if path.suffix.lower() not in FORMATS:
                raise UserError(f"--out={self.out} has the ending {path.suffix!r}; allowed are {', '.join(FORMATS)}")
            if path.exists() and not self.overwrite:
                raise UserError(f"--out={self.out} exists already; choose another name, or add --overwrite")
            paths = [path]
        else:
            run = None if ensemble.startswith("bundled:") else find_run_folder(ensemble)
            folder = epath.Path(self.folder) if self.folder else run.samples if run else epath.Path("samples")
            names = ["grid-" + file_name(prompts[0], seeds[0])] if self.grid else map(file_name, prompts, seeds)
            paths: list[epath.Path] = []
            for name in names:
                paths.append(_free(folder, name, paths))
        check_writable(paths[0].parent)
        return paths


def file_name(prompt: str, seed: int) -> str:
    """A file name of the letters and digits of a prompt, in any script, and the seed."""
    letters = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", prompt).lower()).strip("-")
    return f"{letters[:NAME_LENGTH].strip('-') or 'video'}-seed{seed}"


def _free(folder: epath.Path, name: str, taken: Sequence[epath.Path], ending: str = ".mp4") -> epath.Path:
    """A file of this name that does not exist yet, with a number where the name is taken."""
    path, number = folder / f"{name}{ending}", 1
    while path.exists() or path in taken:
        number += 1
        path = folder / f"{name}-{number}{ending}"
    return path


def check_writable(folder: epath.Path) -> None:
    """Refuses a folder of this machine in which no file can be made."""
    if not is_local(folder):
        return
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{existing} is a file, where a folder for the videos is needed; choose another place")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} is not writable; choose another --out or --out_dir")


def read_requests(path: str) -> list[dict[str, Any]]:
    """The requests of a prompts file: a prompt per line, or JSON lines with `REQUEST_FIELDS`.

    Raises:
      UserError: no such file, no prompt in it, a line that is not JSON, an unknown field or one of another type.
    """
    try:
        lines = epath.Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file={path} cannot be read ({error}); give a text file in UTF-8") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith("{"):
            requests.append({"prompt": line.strip()})
            continue
        where = f"--prompts_file={path}, line {number}"
        try:
            request = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}); write one object per line") from error
        unknown = next((name for name in request if name not in REQUEST_FIELDS), None)
        if unknown:
            known = f"allowed are {', '.join(REQUEST_FIELDS)}{nearest(unknown, REQUEST_FIELDS)}"
            raise UserError(f"{where}: {unknown} is unknown; {known}")
        if not isinstance(request.get("prompt"), str):
            raise UserError(f'{where} has no prompt; write {{"prompt": "..."}}')
        for name, value in request.items():
            kind = int if name == "seed" else str
            if type(value) is not kind:
                raise UserError(f"{where}: {name}={value!r} must be {'an int' if kind is int else 'a str'}")
        requests.append(request)
    if not requests:
        raise UserError(f"--prompts_file={path} has no prompt; write one per line")
    return requests


def sample(
    ensemble: str,
    prompts: Sequence[str],
    output: Output | None = None,
    load: dict[str, Any] | None = None,
    prompts_file: str | None = None,
    batch_size: int = 16,
    verbose: bool = False,
    **params: Any,
) -> list[epath.Path]:
    """Samples prompts from an ensemble and writes the videos; of several processes of one job, the first writes.

    Args:
      ensemble: folder of the ensemble, or "bundled:NAME".
      prompts: sampled as one batch.
      output: where the videos go.
      load: keyword arguments of `Ensemble.load`: `mesh`, `weights_dtype`, `compute_dtype`, `offload` and `encoders`.
      prompts_file: more prompts, sampled `batch_size` at a time; a line without a seed gets the seed plus its number.
      verbose: print the mean routing weights also where the router had no choice.
      **params: see `Ensemble.sample`. With `preview_every_steps`, a contact sheet of the videos as predicted so far
        stands beside them until they are written.

    Raises:
      Interrupted: Ctrl-C; the prediction at that step is written, under a name that says so.
    """
    if not prompts and not prompts_file:
        raise UserError(
            "--prompt is missing; describe the video, "
            "for example --prompt='a small red circle moving left slowly on a white ground'"
        )
    batches = [(list(prompts), params)] if prompts else []
    if prompts_file:
        batches += file_batches(read_requests(prompts_file), params, batch_size)
    output = output or Output()
    if len(batches) > 1 and output.grid:
        raise UserError("--grid tiles one batch of prompts; leave it out, or raise --batch_size")
    everyone = [(prompt, seed) for names, how in batches for prompt, seed in zip(names, _seeds(how, len(names)))]
    paths = output.paths(ensemble, [prompt for prompt, _ in everyone], [seed for _, seed in everyone])
    if jax.process_count() > 1:
        _check_several(load or {})
    one_file = output.out and not jax.process_index()
    with locks.only_writer(output.out) if one_file else contextlib.nullcontext():
        loaded = Ensemble.load(ensemble, **load or {}, drop_encoders=True)  # all prompts are known
        console, written = Console(highlight=False), []
        for names, how in batches:
            mine = paths if output.grid else paths[len(written) : len(written) + len(names)]
            samples = _draw(loaded, names, how, mine, output, console)
            if jax.process_index():
                continue
            if verbose or (len(loaded.clusters) > 1 and how.get("fixed_expert") is None):
                console.print(samples.bars())
            written += _write(samples, mine, output, console)
        return written


def file_batches(
    requests: Sequence[dict[str, Any]], params: dict[str, Any], batch_size: int
) -> list[tuple[list[str], dict[str, Any]]]:
    """Prompts and parameters of each batch; requests with the same fields share one, in their order."""
    first = params.get("seed") or 0
    if not isinstance(first, int):
        raise UserError("--seed with several values is for --prompt; give each line of --prompts_file its own seed")
    numbered: list[dict[str, Any]] = [{"seed": first + i} | request for i, request in enumerate(requests)]
    batches: list[tuple[list[str], dict[str, Any]]] = []
    start = 0
    while start < len(numbered):
        fields, end = numbered[start].keys(), start
        while end < len(numbered) and end - start < batch_size and numbered[end].keys() == fields:
            end += 1
        batch = numbered[start:end]
        own = {name: [request[name] for request in batch] for name in fields if name != "prompt"}
        batches.append(([request["prompt"] for request in batch], params | own))
        start = end
    return batches


def _seeds(params: dict[str, Any], count: int) -> list[int]:
    """The seed in the name of each video's file."""
    seeds = np.atleast_1d(np.asarray(params.get("seed") or 0, object)).tolist()
    return seeds if len(seeds) == count else seeds[:1] * count


def _draw(
    ensemble: Ensemble,
    prompts: list[str],
    params: dict[str, Any],
    paths: list[epath.Path],
    output: Output,
    console: Console,
) -> Samples:
    """Samples one batch, with previews beside its first file; an interrupt writes the prediction at that step."""
    preview_path, previews = _free(paths[0].parent, f"{paths[0].stem}-preview", (), ".png"), []

    def preview(step: int, videos: np.ndarray) -> None:
        previews.append(step)
        video_io.write_png(preview_path, video_io.contact_sheet(to_uint8(videos), prompts))

    callback = {"on_preview": preview} if params.get("preview_every_steps") else {}
    try:
        return ensemble.sample(prompts, progress=True, **callback, **params)
    except Interrupted as stop:
        partial = [path.parent / f"{path.stem}-step{stop.done}of{stop.steps}{path.suffix}" for path in paths]
        if stop.done and not jax.process_index():
            _write(stop.samples, partial, output, console)
        raise
    finally:
        if previews:
            preview_path.unlink(missing_ok=True)


def _check_several(load: dict[str, Any]) -> None:
    """Refuses several processes without a mesh that says how they share the work."""
    count, devices = jax.process_count(), jax.device_count()
    if not load.get("mesh"):
        raise UserError(
            f"--mesh is missing: this job has {count} processes with {devices} devices together; say how they share "
            f"the work, such as --mesh=expert:{devices}, or set {SWITCH}=0 to run this process alone"
        )


def _write(samples: Samples, paths: list[epath.Path], output: Output, console: Console) -> list[epath.Path]:
    """Writes a video for each path, and returns the paths: other ones where another command has taken a name since."""
    whole = output.grid or len(samples) == 1
    written: list[epath.Path] = []
    for path, one in zip(paths, [samples] if whole else [samples[i] for i in range(len(samples))], strict=True):
        with contextlib.nullcontext() if output.out else locks.only_writer(path.parent / "names", wait=True):
            if not output.out:
                locks.delete_partial_files(path)
                path = _free(path.parent, path.stem, written, path.suffix)
            written.append(epath.Path(one.save(path)))
        console.print(f"wrote {written[-1]}", soft_wrap=True)
    return written
