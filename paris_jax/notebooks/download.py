"""Packs samples into one file for download: videos, contact sheet, and all settings that made them."""

import dataclasses
import io
import json
import os
import platform
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from paris_jax import __version__
from paris_jax.artifacts import ensemble_manifest, manifest
from paris_jax.data import video as video_io
from paris_jax.ensemble import sampling_params
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.ensemble.samples import Samples
from paris_jax.errors import UserError

SETTINGS = "settings.json"
FILES = ("samples.mp4", "samples.gif", "contact_sheet.png")
PICTURES = ("image", "last_image")
COLAB = "google.colab"


def settings(
    ensemble: Ensemble, source: str, samples: Samples, overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Everything that made samples, as JSON, and the pictures that it names, by file name.

    Args:
      source: the argument of `Ensemble.load`. Of a folder, its name and its manifest's hash are kept, not its path.
      overrides: arguments of `Ensemble.sample` besides the prompts.

    The same are drawn again by `ensemble.sample(prompts, SamplingParams(**params))`.

    Raises:
      UserError: an override that cannot be kept as JSON or as a picture.
    """
    params, pictures = dataclasses.asdict(sampling_params.resolve(ensemble.params, None, overrides)), {}
    for name in PICTURES:
        if params[name] is not None:
            pictures[f"{name}.png"] = _png(name, params[name])
            params[name] = f"{name}.png"
    for name, value in params.items():
        try:
            json.dumps(value)
        except TypeError:
            raise UserError(f"{name} cannot be kept in {SETTINGS}; give it as numbers, text or a picture") from None
    bundled = source.startswith(ensemble_manifest.BUNDLED_PREFIX)
    folder = ensemble_manifest.resolve(source)
    made = {
        "ensemble": source if bundled or "://" in source else Path(source).name,
        "manifest_sha256": manifest.hash_file(folder / manifest.FILE_NAME),
        "prompts": samples.prompts,
        "params": params,
        "device": jax.devices()[0].device_kind,
        "versions": {"paris_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
    }
    return made, pictures


def _png(name: str, value: Any) -> bytes:
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[-1] == 3:
        return video_io.png_bytes(value)
    raise UserError(f"{name} must be one picture (height, width, 3) of uint8 to be kept with the samples")


def pack(
    path: str | os.PathLike[str], ensemble: Ensemble, source: str, samples: Samples, overrides: Mapping[str, Any]
) -> Path:
    """Writes a .zip of the samples as grid (.mp4, .gif) and contact sheet, with settings.json; see `settings`."""
    path = Path(path)
    if path.suffix != ".zip":
        raise UserError(f"{path} has the ending {path.suffix!r}; samples are packed as .zip")
    made, pictures = settings(ensemble, source, samples, overrides)
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w") as archive:
        for name in FILES:
            archive.write(samples.save(Path(folder) / name), name)
        for name, data in pictures.items():
            archive.writestr(name, data)
        archive.writestr(SETTINGS, json.dumps(made, indent=2, ensure_ascii=False))
    manifest.write_atomically(path, packed.getvalue())
    return path


def offer(path: Path) -> Any:
    """Downloads a file to the browser on Colab; elsewhere returns a link that a notebook shows."""
    if COLAB in sys.modules:
        from google.colab import files  # type: ignore[reportMissingImports]

        return files.download(os.fspath(path))
    from IPython.display import FileLink

    return FileLink(os.fspath(path))
