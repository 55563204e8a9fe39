"""Manifests: schema, sizes and hashes of the files of a folder. Written last: a folder without one is unfinished."""

import contextlib
import hashlib
import importlib.metadata
import json
import platform
import secrets
from collections.abc import Iterable
from typing import Any

from etils import epath

from paris_jax.errors import UserError

SCHEMA = "paris_jax/1"
FILE_NAME = "manifest.json"
# Required entries of each kind.
_LATENT_SPACE = ("latent", "codec", "text", "text_length", "fps", "clips")
REQUIRED = {
    "data": _LATENT_SPACE,
    "cluster": _LATENT_SPACE,
    "network": (
        "conventions",
        "network",
        "role",
        "cluster",
        "clusters",
        "latent",
        "codec",
        "text",
        "text_length",
        "fps",
        "timestep_shift",
    ),
    "weights": ("network", "source", "report"),
    "ensemble": ("experts", "router", "sampling", "clusters"),
    "evaluation": ("evaluation_hash",),
}
# The convention of the project (docs/design.md). Another prediction type is declared in the manifest.
CONVENTIONS = {
    "time": "t in [0, 1], t = 0 data, t = 1 noise",
    "path": "x_t = (1 - t) x_0 + t e",
    "prediction": "velocity v = e - x_0",
}


def hash_file(path: epath.PathLike) -> str:
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions that may change a result: Python, this package, jax, flax, optax."""
    found = {"python": platform.python_version()}
    for name in ("paris-jax", "jax", "flax", "optax", "grain"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def write_atomically(path: epath.PathLike, data: bytes | str, shared: bool = False) -> None:
    """Writes the whole file under another name and renames it, so that a killed process leaves no half file.

    `shared` is for a file that several processes, on several machines even, may write at the same moment.
    """
    path = epath.Path(path)
    partial = path.parent / f".{path.name}{f'.{secrets.token_hex(8)}' if shared else ''}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data if isinstance(data, bytes) else data.encode())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {path} ({error.strerror or error}); free some space or choose another place, "
            "then run the same command again"
        ) from error


def write_json(path: epath.PathLike, value: Any, shared: bool = False) -> None:
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", shared)


def read_json(
    path: epath.PathLike, remedy: str = "restore it from a copy, or delete it and run its stage again"
) -> Any:
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); {remedy}") from error


def write(folder: epath.PathLike, kind: str, files: Iterable[str], config_hash: str, **content: Any) -> dict[str, Any]:
    """Writes `folder/manifest.json`, which marks the folder as complete.

    Args:
      folder: the finished folder.
      kind: what it holds ("data", "cluster", "network", "ensemble", ...).
      files: names, relative to the folder, of the files that are promised.
      config_hash: hash of the config that made them.
      **content: JSON data that readers of this kind need.
    """
    folder = epath.Path(folder)
    promised = {
        name: {"bytes": (folder / name).stat().length, "sha256": hash_file(folder / name)} for name in sorted(files)
    }
    manifest = {
        "schema": SCHEMA,
        "kind": kind,
        "config_hash": config_hash,
        "versions": versions(),
        "conventions": CONVENTIONS,
        **content,
        "files": promised,
    }
    write_json(folder / FILE_NAME, manifest)
    return manifest


def exists(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / FILE_NAME).exists()


def read_kind(folder: epath.PathLike) -> str:
    """The kind of folder that a manifest describes; "" without a readable manifest."""
    path = epath.Path(folder) / FILE_NAME
    found = read_json(path) if path.exists() else {}
    return found.get("kind", "") if isinstance(found, dict) else ""


def read(folder: epath.PathLike, kind: str, verify: bool = False) -> dict[str, Any]:
    """Reads a manifest and checks its schema and kind; with `verify`, sizes and hashes of every promised file too."""
    folder = epath.Path(folder)
    path = folder / FILE_NAME
    if not path.exists():
        raise UserError(
            f"{path} does not exist, so the {kind} there is not finished; run the stage that makes it first"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
        raise UserError(f"{path} has schema {found!r}; this version reads {SCHEMA!r}")
    if manifest.get("kind") != kind:
        raise UserError(f"{path} describes a {manifest.get('kind')!r}, where a {kind!r} is expected")
    absent = [name for name in ("files", "config_hash", *REQUIRED.get(kind, ())) if name not in manifest]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; copy the {kind} again from its origin, or make it again")
    for name, promise in manifest["files"].items():
        check_file(folder / name, promise, contents=verify)
    return manifest


def check_file(path: epath.Path, promise: dict[str, Any], contents: bool) -> None:
    """Raises UserError for a listed file that is missing, of another size or, with `contents`, of another hash."""
    remedy = "copy it again from its origin, or run the stage that makes it again"
    if not path.exists():
        raise UserError(f"{path} is missing though its manifest promises it; {remedy}")
    size = path.stat().length
    if size != promise["bytes"]:
        raise UserError(f"{path} has {size} bytes where its manifest promises {promise['bytes']}; {remedy}")
    if contents and hash_file(path) != promise["sha256"]:
        raise UserError(f"{path} was altered: its sha256 is not the one in its manifest; {remedy}")
