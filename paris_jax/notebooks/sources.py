"""Finds an ensemble to sample from: one that ships, a folder, a bucket, or a folder of a hub."""

import importlib.util
import os
from typing import Literal, get_args

from etils import epath

from paris_jax.artifacts import ensemble_manifest, manifest
from paris_jax.errors import UserError, nearest

Kind = Literal["bundled", "local", "bucket", "hub"]
HUB_FILES = ("*.json", "*.safetensors")  # of a published ensemble; nothing else is downloaded


def find_ensemble(kind: Kind, name: str, revision: str = "") -> str:
    """The path of an ensemble for `Ensemble.load`.

    Args:
      kind: "bundled" (ships with the package), "local" (a folder), "bucket" (gs://...), or "hub" (OWNER/NAME of the
        Hugging Face hub, as `paris-jax export` writes folders).
      name: of the ensemble: "shapes", "runs/mine/ensemble", "gs://bucket/run/ensemble", "owner/ensemble".
      revision: of a hub folder: a branch, tag or commit.

    Raises:
      UserError: another kind, or no ensemble of that name, with the remedy.
    """
    if kind not in get_args(Kind):
        raise UserError(
            f"kind={kind!r}: must be one of {', '.join(get_args(Kind))}{nearest(str(kind), get_args(Kind))}"
        )
    if kind == "bundled":
        name = ensemble_manifest.BUNDLED_PREFIX + name.removeprefix(ensemble_manifest.BUNDLED_PREFIX)
        ensemble_manifest.resolve(name)
        return name
    if kind == "hub":
        return _of_hub(name, revision)
    if kind == "bucket" and not name.startswith("gs://"):
        raise UserError(f"{name!r} is not a bucket; name it as gs://BUCKET/RUN/ensemble")
    if kind == "bucket" and importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{name} needs gcsfs; pip install gcsfs, then restart the session")
    if kind == "local" and "://" in name:
        raise UserError(f"{name!r} is not a local folder; choose kind 'bucket'")
    if not manifest.exists(epath.Path(name)):
        hint = (
            "on Colab, sign in with google.colab.auth.authenticate_user()" if kind == "bucket" else "look at the path"
        )
        raise UserError(f"There is no ensemble at {name!r}; name a folder with a {manifest.FILE_NAME}, and {hint}")
    return name


def _of_hub(name: str, revision: str) -> str:
    """Downloads a hub folder into the hub's cache, and returns its snapshot there."""
    if name.count("/") != 1:
        raise UserError(f"{name!r} is no folder of the hub; name it as OWNER/NAME")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError(f"{name} needs huggingface_hub; pip install huggingface_hub")
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=list(HUB_FILES))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} cannot be downloaded from the hub ({said}); look at its name and the network, or sign in with "
            "huggingface_hub.login() where it is private"
        ) from error
    if not manifest.exists(epath.Path(folder)):
        raise UserError(
            f"{name} on the hub holds no {manifest.FILE_NAME}; name an ensemble that 'paris-jax export' wrote"
        )
    return os.fspath(folder)
