"""Exported networks: one trained network as files, and their validation.

    part/model.safetensors     parameters under their `a.b.c` names
    part/manifest.json         what it is, what it was trained on and with, sizes and hashes

Nothing of a part is executed or unpickled. A hash proves that the files are the promised ones, not that they are good:
a part can still be badly or maliciously trained.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.tensors import loads
from paris_jax.diffusion.predictions import PREDICTIONS
from paris_jax.errors import UserError, first_line
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig

WEIGHTS = "model.safetensors"
DTYPES = ("float32", "bfloat16")
NETWORK_KINDS = {"dit": DiTConfig, "router": RouterConfig}


@dataclasses.dataclass(frozen=True)
class ExportedNetwork:
    """A validated network: its config, its parameters (numpy) and its manifest."""

    folder: epath.Path
    config: functional.Config
    params: functional.Params
    manifest: dict[str, Any]


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
        "network",
        [WEIGHTS],
        config_hash,
        network=network,
        parameters=functional.count(config),
        dtype=dtype,
        **content,
    )


def read(folder: epath.PathLike) -> ExportedNetwork:
    """Reads an exported network, validating every file and every array.

    Raises:
      UserError: a file that is altered, missing or extra, or an array that is missing, extra, misshapen, of another
      dtype
        or not finite, by name.
    """
    folder = epath.Path(folder)
    found = manifest.read(folder, "network", verify=True)
    extra = sorted(p.name for p in folder.iterdir() if p.name not in {manifest.FILE_NAME, *found["files"]})
    if extra:
        raise UserError(f"{folder} holds {', '.join(extra)}, which its manifest does not promise; remove what is extra")
    config = network(found, folder)
    try:
        arrays = loads((folder / WEIGHTS).read_bytes())
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{folder / WEIGHTS} is not a readable safetensors file ({error}); copy it again") from error
    _check_arrays(arrays, config, folder / WEIGHTS)
    # Matrices keep their stored dtype: they are nearly all of a large network.
    params = functional.from_names({n: a if n.endswith("kernel") else a.astype(np.float32) for n, a in arrays.items()})
    return ExportedNetwork(folder, config, params, found)


def network(found: dict[str, Any], folder: epath.Path) -> functional.Config:
    """The network that a manifest describes; refuses one that cannot be."""
    described = dict(found["network"])
    kind = NETWORK_KINDS.get(described.pop("kind", "dit" if found["kind"] == "weights" else None))
    if kind is None:
        raise UserError(f"{folder} is a network of an unknown kind; this version knows {', '.join(NETWORK_KINDS)}")
    unknown = sorted(described.keys() - {f.name for f in dataclasses.fields(kind)})
    if unknown:
        raise UserError(
            f"{folder}: the network has fields this version does not know ({', '.join(unknown)}); update paris_jax"
        )
    try:
        config = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in described.items()})
        functional.abstract(config)
    except Exception as error:  # impossible sizes fail in many ways
        reason = first_line(error)[:200]
        raise UserError(
            f"{folder}: its manifest describes a network that cannot be ({reason}); copy it again"
        ) from error
    if isinstance(config, DiTConfig) and found["kind"] == "network":
        said = found["conventions"]["prediction"]
        if said != PREDICTIONS.get(config.prediction_type):
            raise UserError(
                f"{folder} predicts {said!r} by a network for {config.prediction_type!r}; this version knows "
                f"{', '.join(PREDICTIONS)}; update paris_jax, or copy it again"
            )
    return config


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
        elif not np.isfinite(array).all():
            problems.append(f"{name} holds values that are not finite")
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise UserError(f"{path} is refused: {shown}; export it again with 'paris-jax train'")
