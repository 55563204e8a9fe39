"""Exported networks: one trained network as files, and their validation.

    part/model.safetensors     parameters under their `a.b.c` names; above 5 GB in shards with an index
    part/manifest.json         its architecture, data, training settings, sizes and hashes

Nothing of a part is executed or unpickled. A hash proves that the files are the promised ones, not that they are good:
a part can still be badly or maliciously trained.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest, signatures, weight_files
from paris_jax.artifacts.schemas import NetworkManifest, RouterDescription, WeightsManifest
from paris_jax.artifacts.weight_files import SHARD_BYTES, WeightFiles
from paris_jax.config import hashing
from paris_jax.diffusion.predictions import PREDICTIONS
from paris_jax.errors import UserError, first_line
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig

DTYPES = ("float32", "bfloat16")
SMALLEST_VALUE = 2  # bytes of a parameter
FINITE_AT_ONCE = 1 << 20  # values that are checked at once
CHECKS = ("manifest", "files", "network", "hash", "tensors")  # of `read`, in order


@dataclasses.dataclass(frozen=True)
class ExportedNetwork:
    """A validated network: its config, its parameters (numpy) and its manifest."""

    folder: epath.Path
    config: functional.Config
    params: functional.Params
    manifest: NetworkManifest


def write(
    folder: epath.PathLike,
    config: functional.Config,
    params: functional.Params,
    config_hash: str,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    **content: Any,
) -> None:
    """Writes an exported network, one array after the other.

    Args:
      shard_bytes: the size above which the weights are several files (`artifacts.weight_files`).
      **content: the other entries of the manifest: role, cluster, latent, codec, text.
    """
    flat = dict(sorted(functional.to_names(params).items()))
    shapes = {name: (leaf.shape, np.dtype(jnp.dtype(dtype))) for name, leaf in flat.items()}
    files = weight_files.write(folder, shapes, ((n, np.asarray(leaf)) for n, leaf in flat.items()), shard_bytes)
    kind = "router" if isinstance(config, RouterConfig) else "dit"
    if isinstance(config, DiTConfig):
        content["conventions"] = manifest.CONVENTIONS | {"prediction": PREDICTIONS[config.prediction_type]}
    network = {"kind": kind, **dataclasses.asdict(config)}
    del network["remat"]  # of training only
    manifest.write(
        folder,
        NetworkManifest,
        files,
        config_hash,
        network=network,
        parameters=functional.count(config),
        dtype=dtype,
        tree=tree_hash(config),
        **content,
    )


def tree_hash(config: functional.Config) -> str:
    """Fingerprint of a network's parameter tree: the names and shapes of all arrays."""
    shapes = {name: list(leaf.shape) for name, leaf in functional.to_names(functional.abstract(config)).items()}
    return hashing.hash_text(hashing.canonical_json(shapes))


def read(folder: epath.PathLike, passed: Callable[[str, str], None] = lambda name, detail: None) -> ExportedNetwork:
    """Reads an exported network, validating every file and every array.

    Args:
      passed: called after each of `CHECKS` with its name and its finding.

    Raises:
      UserError: a file that is altered, missing or extra, or an array that is missing, extra, misshapen, of another
        dtype or not finite, by name.
    """
    folder = epath.Path(folder)
    found = manifest.read(folder, NetworkManifest)
    if signatures.exists(folder):
        signatures.read(folder)
    passed("manifest", _describe(found))
    weight_files.check_names(folder, found.files)
    extra = sorted(
        p.name for p in folder.iterdir() if p.name not in {manifest.FILE_NAME, signatures.FILE_NAME, *found.files}
    )
    if extra:
        raise UserError(f"{folder} holds {', '.join(extra)}, which its manifest does not name; remove the extra files")
    total = sum(entry.bytes for entry in found.files.values())
    passed("files", f"{weight_files.describe(found.files)}, {total:,} bytes, nothing else")
    config = network(found, folder)
    files = WeightFiles(folder, found.files, limit=functional.count(config) * 4)
    passed("network", f"{functional.count(config):,} parameters, {getattr(config, 'prediction_type', 'router')}")
    dtypes = (found.dtype,) if found.training else DTYPES  # imported networks may keep those of their publisher
    arrays = _read_arrays(files, config, dtypes, passed)
    kinds = "/".join(sorted({a.dtype.name for a in arrays.values()}))
    passed("tensors", f"{len(arrays)} arrays, {kinds}, all finite")
    # Matrices keep their stored dtype: they are nearly all of a large network.
    params = functional.from_names({n: a if n.endswith("kernel") else a.astype(np.float32) for n, a in arrays.items()})
    return ExportedNetwork(folder, config, params, found)


def _describe(found: NetworkManifest) -> str:
    """A network's description of itself, for a table of checks."""
    said = [found.role if found.cluster is None else f"{found.role} {found.cluster}"]
    for name in ("config_hash", "partition", "data"):
        said.append(f"{name.removesuffix('_hash')} {getattr(found, name)[:12] or 'not known'}")
    code = found.code
    if code.revision:
        said.append(f"revision {code.revision[:12]}{' and changes' * code.dirty}")
    if done := found.training:
        ema = "" if done.ema_decay is None else f", EMA {done.ema_decay:g}"
        flops = done.steps * done.global_batch_size * done.flops_per_sample
        said.append(f"{done.steps} steps of {done.global_batch_size}{ema}, {flops:.3g} FLOP")
    return ", ".join(said)


def _read_arrays(
    files: WeightFiles, config: functional.Config, dtypes: Sequence[str], passed: Callable[[str, str], None]
) -> dict[str, np.ndarray]:
    """The arrays; headers are checked before any is allocated, hashes before anything else is said of the contents."""
    try:
        shapes = files.shapes()
        _check_shapes(shapes, config, dtypes, files.path)
    except UserError:
        files.check_hashes()
        passed("hash", files.describe_hashes())
        raise
    arrays = dict(files.read())
    passed("hash", files.describe_hashes())
    problems = [f"{name} holds values that are not finite" for name, a in sorted(arrays.items()) if not _is_finite(a)]
    _refuse(problems, files.path)
    return arrays


def copy(part: ExportedNetwork, folder: epath.Path) -> ExportedNetwork:
    """The network copied to another folder, its files verified there.

    Raises:
      UserError: a full disk, or a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        signature = [signatures.FILE_NAME] if signatures.exists(part.folder) else []
        for name in (*part.manifest.files, *signature, manifest.FILE_NAME):
            (part.folder / name).copy(folder / name, overwrite=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"Cannot copy {part.folder} to {folder} ({reason}); free some space or choose another folder"
        ) from error
    manifest.read(folder, NetworkManifest, verify=True)
    return dataclasses.replace(part, folder=folder)


def network(found: NetworkManifest | WeightsManifest, folder: epath.Path) -> functional.Config:
    """The config of the network that a manifest describes.

    Raises:
      UserError: sizes that do not fit together, or a prediction type that this version does not know.
    """
    kind = RouterConfig if isinstance(found.network, RouterDescription) else DiTConfig
    _check_size(found, folder)
    try:
        config = kind(**msgspec.structs.asdict(found.network))
        functional.abstract(config)
    except Exception as error:  # impossible sizes fail in many ways
        reason = first_line(error)[:200]
        raise UserError(
            f"{folder}: its manifest describes a network that cannot be ({reason}); copy it again"
        ) from error
    if isinstance(config, DiTConfig) and isinstance(found, NetworkManifest):
        said = found.conventions.prediction
        if said != PREDICTIONS.get(config.prediction_type):
            raise UserError(
                f"{folder} predicts {said!r} by a network for {config.prediction_type!r}; this version knows "
                f"{', '.join(PREDICTIONS)}; update paris_jax, or copy it again"
            )
    if isinstance(found, NetworkManifest):
        _check_conventions(found, config, folder)
    return config


def _check_size(found: NetworkManifest | WeightsManifest, folder: epath.Path) -> None:
    """Refuses sizes whose matrices alone would not fit in the promised files, before they are traced."""
    sizes, size = found.network, sum(entry.bytes for entry in found.files.values())
    is_router = isinstance(sizes, RouterDescription)
    streams = sizes.blocks if is_router else sizes.single_blocks + 2 * sizes.double_blocks
    least = streams * sizes.hidden**2 * (4 + 2 * sizes.mlp_ratio)  # attention and MLP of every stream
    if SMALLEST_VALUE * least > size:
        raise UserError(
            f"{folder}: its manifest describes a network of more than {least:,} parameters, its files have {size:,} "
            "bytes; copy it again"
        )


def _check_conventions(found: NetworkManifest, config: functional.Config, folder: epath.Path) -> None:
    """Refuses another meaning of time and path, another number of parameters, and another parameter tree."""
    for name in ("time", "path"):
        said, ours = getattr(found.conventions, name), manifest.CONVENTIONS[name]
        if said != ours:
            raise UserError(f"{folder}: its {name} is {said[:200]!r}, this version knows {ours!r}; convert it first")
    count = functional.count(config)
    if found.parameters not in (0, count):
        raise UserError(
            f"{folder}: its manifest promises {found.parameters:,} parameters, it has {count:,}; copy it again"
        )
    if found.tree not in ("", tree_hash(config)):
        raise UserError(
            f"{folder} has another parameter tree than this version makes of its sizes; use the version that wrote it"
        )


def _is_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        blocks = (flat[i : i + FINITE_AT_ONCE] for i in range(0, flat.size, FINITE_AT_ONCE))
        return all(np.isfinite(block).all() for block in blocks)


def _check_shapes(
    found: Mapping[str, tuple[tuple[int, ...], str]],
    config: functional.Config,
    dtypes: Sequence[str],
    path: epath.Path,
) -> None:
    """Refuses tensors that are missing, extra, misshapen or of another dtype, by name."""
    expected = functional.to_names(functional.abstract(config))
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is extra" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        (shape, dtype), wanted = found[name], expected[name].shape
        if shape != wanted:
            problems.append(f"{name} has shape {shape} instead of {wanted}")
        elif dtype not in DTYPES or dtype not in dtypes:
            problems.append(f"{name} has dtype {dtype} instead of {' or '.join(dtypes)}")
    _refuse(problems, path)


def _refuse(problems: list[str], path: epath.Path) -> None:
    if problems:
        shown = "; ".join(problem[:300] for problem in problems[:5])
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{path} cannot be loaded: {shown}{more}; export it again with 'paris-jax train'")
