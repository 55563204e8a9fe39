"""Exported networks: one trained network as files, and their validation.

    part/model.safetensors     parameters under their `a.b.c` names
    part/manifest.json         what it is, what it was trained on and with, sizes and hashes

Nothing of a part is executed or unpickled. A hash proves that the files are the promised ones, not that they are good:
a part can still be badly or maliciously trained.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import msgspec
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from paris_jax.artifacts import manifest, safe_files
from paris_jax.artifacts.schemas import NetworkManifest, RouterDescription, WeightsManifest
from paris_jax.artifacts.tensors import loads
from paris_jax.diffusion.predictions import PREDICTIONS
from paris_jax.errors import UserError, first_line
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig

WEIGHTS = "model.safetensors"
DTYPES = ("float32", "bfloat16")
HEADER_BYTES = 16 << 20  # of a safetensors file, at most
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
    **content: Any,
) -> None:
    """Writes an exported network; `content` has the other manifest entries: role, cluster, latent, codec, text."""
    flat = {name: np.asarray(leaf).astype(jnp.dtype(dtype)) for name, leaf in functional.to_names(params).items()}
    manifest.write_atomically(epath.Path(folder) / WEIGHTS, safetensors.numpy.save(flat))
    kind = "router" if isinstance(config, RouterConfig) else "dit"
    if isinstance(config, DiTConfig):
        content["conventions"] = manifest.CONVENTIONS | {"prediction": PREDICTIONS[config.prediction_type]}
    network = {"kind": kind, **dataclasses.asdict(config)}
    del network["remat"]  # of training only
    manifest.write(
        folder,
        NetworkManifest,
        [WEIGHTS],
        config_hash,
        network=network,
        parameters=functional.count(config),
        dtype=dtype,
        **content,
    )


def read(folder: epath.PathLike, passed: Callable[[str, str], None] = lambda name, detail: None) -> ExportedNetwork:
    """Reads an exported network, validating every file and every array.

    Args:
      passed: called after each of `CHECKS` with its name and what was found.

    Raises:
      UserError: a file that is altered, missing or extra, or an array that is missing, extra, misshapen, of another
        dtype or not finite, by name.
    """
    folder = epath.Path(folder)
    found = manifest.read(folder, NetworkManifest)
    role = found.role if found.cluster is None else f"{found.role} {found.cluster}"
    passed("manifest", f"{role}, config {found.config_hash[:12]}, partition {found.partition[:12] or 'not known'}")
    if found.files.keys() != {WEIGHTS}:
        raise UserError(f"{folder}: its manifest must name {WEIGHTS} and no other file; copy it again")
    extra = sorted(p.name for p in folder.iterdir() if p.name not in {manifest.FILE_NAME, WEIGHTS})
    if extra:
        raise UserError(f"{folder} holds {', '.join(extra)}, which its manifest does not name; remove what is extra")
    passed("files", f"{WEIGHTS}, {found.files[WEIGHTS].bytes:,} bytes, nothing else")
    config = network(found, folder)
    largest = functional.count(config) * 4 + HEADER_BYTES
    if found.files[WEIGHTS].bytes > largest:
        raise UserError(f"{folder / WEIGHTS} is larger than its network, {largest:,} bytes at most; copy it again")
    passed("network", f"{functional.count(config):,} parameters, {getattr(config, 'prediction_type', 'router')}")
    data = safe_files.read_bytes(folder / WEIGHTS, largest)
    sha256 = hashlib.sha256(data).hexdigest()
    manifest.check_hash(folder / WEIGHTS, sha256, found.files[WEIGHTS])
    passed("hash", f"sha256 {sha256[:12]}")
    try:
        arrays = loads(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{folder / WEIGHTS} is not a readable safetensors file ({error}); copy it again") from error
    _check_arrays(arrays, config, folder / WEIGHTS)
    passed("tensors", f"{len(arrays)} arrays, {'/'.join(sorted({a.dtype.name for a in arrays.values()}))}, all finite")
    # Matrices keep their stored dtype: they are nearly all of a large network.
    params = functional.from_names({n: a if n.endswith("kernel") else a.astype(np.float32) for n, a in arrays.items()})
    return ExportedNetwork(folder, config, params, found)


def copy(part: ExportedNetwork, folder: epath.Path) -> ExportedNetwork:
    """The network copied to another folder, its files verified there.

    Raises:
      UserError: a full disk, or a folder that cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, manifest.FILE_NAME):
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
    return config


def _is_finite(array: np.ndarray) -> bool:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return bool(np.isfinite(array).all())


def _check_arrays(arrays: dict[str, np.ndarray], config: functional.Config, path: epath.Path) -> None:
    expected = functional.to_names(functional.abstract(config))
    problems = [f"{name} is missing" for name in sorted(expected.keys() - arrays.keys())]
    problems += [f"{name} is extra" for name in sorted(arrays.keys() - expected.keys())]
    for name in sorted(expected.keys() & arrays.keys()):
        array, shape = arrays[name], expected[name].shape
        if array.shape != shape:
            problems.append(f"{name} has shape {array.shape} instead of {shape}")
        elif array.dtype.name not in DTYPES:
            problems.append(f"{name} has dtype {array.dtype.name} instead of {' or '.join(DTYPES)}")
        elif not _is_finite(array):
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{path} is refused: {shown}; export it again with 'paris-jax train'")
