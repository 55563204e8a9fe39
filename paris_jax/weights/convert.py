"""Converts published tensors to our arrays and back, one layer at a time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from paris_jax.artifacts import manifest, safe_files, weight_files
from paris_jax.artifacts.schemas import NetworkManifest, WeightsManifest
from paris_jax.artifacts.tensors import DTYPES, Tensors, write
from paris_jax.config.network import NETWORK_PRESETS
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.weights.layouts import LAYOUTS, pieces

OURS = "paris_jax"  # the layout of our own exports
FRESH = ("cond_in.",)  # may be missing: zero-initialised, it does not change the network
Advance = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Report:
    """The mapping of a source: arrays to read, zero-initialised arrays, unused tensors."""

    layout: str
    read: list[str]
    fresh: list[str]
    unused: list[str]


def read_manifest(folder: epath.PathLike, verify: bool = False) -> NetworkManifest | WeightsManifest:
    """The manifest of imported weights or of an exported network; `verify` also hashes its files."""
    is_network = manifest.read_kind(folder) == manifest.kind(NetworkManifest)
    return manifest.read(folder, NetworkManifest if is_network else WeightsManifest, verify)


def layout_of(tensors: Tensors) -> str:
    """The layout that these names belong to.

    Raises:
      UserError: no known layout has such names; shows a few of them.
    """
    names = tensors.shapes
    if "video_in.kernel" in names:
        return OURS
    if "x_embedder.weight" in names:
        return "diffusers"
    if "img_in.weight" in names:
        return "opensora2" if any(".q_proj." in name for name in names) else "bfl"
    shown = ", ".join(sorted(names)[:3])
    raise UserError(
        f"{tensors.files[0]} has no known layout (its tensors are {shown}, ...); known layouts are {', '.join(LAYOUTS)}"
    )


def sizes(tensors: Tensors, layout: str) -> dict[str, Any]:
    """The fields of a `DiTConfig` that the shapes of the tensors determine: all but the RoPE axes."""
    names = tensors.shapes

    def of(ours: str) -> tuple[int, ...]:
        return names[f"{LAYOUTS[layout].outside[ours]}.weight"][0]

    def blocks(prefix: str) -> int:
        return len({name.split(".")[1] for name in names if name.startswith(f"{prefix}.")})

    chosen = LAYOUTS[layout]
    head_norm = f"{chosen.double_prefix}.0.{chosen.video['head_norm.query']}.{chosen.scale}"
    hidden = of("video_in")[0]
    mlp = names[f"{chosen.double_prefix}.0.{chosen.video['mlp_in']}.weight"][0][0]
    return {
        "channels": of("video_in")[1] // 4,
        "text_width": of("text_in")[1],
        "pooled_width": of("conditioning.pooled.inner")[1],
        "hidden": hidden,
        "heads": hidden // names[head_norm][0][0],
        "double_blocks": blocks(chosen.double_prefix),
        "single_blocks": blocks(chosen.single_prefix),
        "mlp_ratio": mlp // hidden,
        "cond_frames": f"{chosen.outside['cond_in']}.weight" in names,
    }


def network_config(tensors: Tensors, layout: str) -> DiTConfig:
    """The network that these tensors are of, with the RoPE axes of FLUX.1.

    Raises:
      UserError: a tensor that determines a size is missing, or heads of another width than FLUX.1's.
    """
    try:
        found = sizes(tensors, layout)
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{tensors.files[0]}: the network's sizes cannot be read, {error} is not there; give --config"
        ) from error
    published = NETWORK_PRESETS["11b"]
    if not found["heads"] or found["hidden"] // found["heads"] != sum(published.rope_axes):
        raise UserError(
            f"{tensors.files[0]} has {found['heads']} heads for {found['hidden']} features, FLUX.1's heads have "
            f"{sum(published.rope_axes)}: name the --config whose experts it is for"
        )
    return DiTConfig(**found, rope_axes=published.rope_axes, theta=published.theta)


def check(tensors: Tensors, config: DiTConfig, layout: str) -> Report:
    """Compares all names and shapes before any values are read.

    Raises:
      UserError: tensors that are missing, extra or of another shape, all by name.
    """
    problems, used, fresh, read = [], set(), [], []
    for piece in pieces(config, LAYOUTS[layout]):
        absent = [name for name in piece.theirs if name not in tensors.shapes]
        if absent and piece.ours.startswith(FRESH):
            fresh.append(piece.ours)
            continue
        problems += [f"{name} is missing" for name in absent]
        for name, expected in zip(piece.theirs, piece.their_shapes, strict=True):
            found, kind = tensors.shapes.get(name, (expected, np.dtype(np.float32)))
            if found != expected:
                problems.append(f"{name} has shape {found} instead of {expected}")
            elif kind not in DTYPES.values():
                problems.append(f"{name} has dtype {kind}")
        used.update(piece.theirs)
        if piece.layer in (None, 0):
            read.append(piece.ours)
    left = sorted(tensors.shapes.keys() - used)
    unused = [name for name in left if name.startswith(LAYOUTS[layout].unused)]
    problems += [f"{name} is extra" for name in left if name not in unused]
    if problems:
        where = tensors.files[0] if len(tensors.files) == 1 else tensors.files[0].parent
        raise UserError(f"{where} cannot be loaded, {len(problems)} of its tensors do not fit: {'; '.join(problems)}")
    return Report(layout, read, fresh, unused)


def to_ours(tensors: Tensors, config: DiTConfig, report: Report, dtype: Any = None) -> Iterator[tuple[str, np.ndarray]]:
    """Yields our arrays by name, stacked ones layer by layer, in `dtype` or the dtype of each tensor.

    Raises:
      UserError: values of a tensor are not finite.
    """
    for piece in pieces(config, LAYOUTS[report.layout]):
        if piece.ours in report.fresh:
            yield piece.ours, np.zeros(piece.shape, np.float32)
            continue
        found = [_finite(tensors, name, dtype) for name in piece.theirs]
        yield piece.ours, piece.to_ours(found)


def _finite(tensors: Tensors, name: str, dtype: Any) -> np.ndarray:
    values = tensors.read(name)
    with np.errstate(over="ignore"):
        values = values.astype(dtype or values.dtype)
    if not np.isfinite(values.astype(np.float32)).all():
        raise UserError(f"{tensors.files[0].parent}: {name} holds values that are not finite; download it again")
    return values


def import_network(
    tensors: Tensors,
    config: DiTConfig,
    report: Report,
    folder: epath.Path,
    source: str,
    dtype: str,
    advance: Advance,
    sampling: Mapping[str, Any] | None = None,
    shard_bytes: int = weight_files.SHARD_BYTES,
) -> None:
    """Writes a published network in our layout to `folder`: weights (`artifacts.weight_files`), then a manifest.

    Args:
      report: returned by `check`.
      source: name of the source, for the manifest.
      dtype: "float32" or "bfloat16"; "": the dtype of the source, or a wider one that holds all its values.
      advance: called after each piece (`count`).
      sampling: further entries of the manifest that sampling needs. With them, the folder is an exported network that
        computes in `config.dtype`; without, it holds initial weights.
      shard_bytes: the size above which the weights are several files.
    """
    names = {name for piece in pieces(config, LAYOUTS[report.layout]) for name in piece.theirs} & tensors.shapes.keys()
    used = {tensors.shapes[name][1] for name in names}
    wide = used.pop() if len(used) == 1 else np.dtype(np.float32)
    if sampling and wide == np.float16:  # exported networks are not stored in float16
        wide = np.dtype(np.float32)
    kind = DTYPES[{"float32": "F32", "bfloat16": "BF16"}[dtype]] if dtype else wide
    shapes = {name: (leaf.shape, kind) for name, leaf in functional.to_names(functional.abstract(config)).items()}

    def chunks() -> Iterator[tuple[str, np.ndarray]]:
        for name, values in to_ours(tensors, config, report, kind):
            yield name, values
            advance()

    files = weight_files.write(folder, shapes, chunks(), shard_bytes)
    network = dataclasses.asdict(config)
    del network["remat"]
    if sampling:
        network["kind"] = "dit"
    else:
        del network["dtype"]
    manifest.write(
        folder,
        NetworkManifest if sampling else WeightsManifest,
        files,
        "",
        source=source,
        network=network,
        parameters=functional.count(config),
        report=dataclasses.asdict(report),
        origin={file.name: safe_files.check_regular(file, follow_links=True) for file in tensors.files},
        **sampling or {},
    )


def export_network(tensors: Tensors, config: DiTConfig, layout: str, path: epath.Path, advance: Advance) -> None:
    """Writes one of our networks as a file of another layout."""
    every = list(pieces(config, LAYOUTS[layout]))
    kinds = {name: dtype for name, (_, dtype) in tensors.shapes.items()}
    shapes = {
        name: (shape, kinds[piece.ours])
        for piece in every
        for name, shape in zip(piece.theirs, piece.their_shapes, strict=True)
    }

    def chunks() -> Iterator[tuple[str, np.ndarray]]:
        for piece in every:
            array = tensors.read(piece.ours, ... if piece.layer is None else piece.layer)
            yield from zip(piece.theirs, piece.to_theirs(array), strict=True)
            advance()

    write(path, shapes, chunks())


def count(config: DiTConfig, layout: str) -> int:
    """The number of pieces in which a network is read or written."""
    return sum(1 for _ in pieces(config, LAYOUTS[layout]))
