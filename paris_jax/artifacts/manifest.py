"""Manifests: schema, sizes and hashes of the files of a folder. Written last: a folder without one is unfinished."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import platform
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import msgspec
from etils import epath

from paris_jax.artifacts import safe_files
from paris_jax.artifacts.schemas import CodeVersion, FileEntry, Manifest
from paris_jax.config import hashing
from paris_jax.errors import UserError

T = TypeVar("T")
M = TypeVar("M", bound=Manifest)

SCHEMA = "paris_jax/1"
FILE_NAME = "manifest.json"
REMEDY = "copy the folder again from its origin, or make it again"
# The convention of the project (docs/design.md). Another prediction type is declared in the manifest.
CONVENTIONS = {
    "time": "t in [0, 1], t = 0 data, t = 1 noise",
    "path": "x_t = (1 - t) x_0 + t e",
    "prediction": "velocity v = e - x_0",
}


class _Header(msgspec.Struct):
    """The entries that decide how the others are read."""

    schema: Any = None
    kind: str = ""


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


@functools.cache
def code_version() -> CodeVersion:
    """Version of this package; in a checkout, also its revision and whether files differ from it."""
    version, root = versions()["paris-jax"], Path(__file__).parents[2]
    if not (root / ".git").exists():
        return CodeVersion(version)
    revision, changes = (_git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no"))
    return CodeVersion(version, revision, bool(changes))


def _git(root: Path, *arguments: str) -> str:
    """The output of git; "" without git, or in a folder of another user, which it does not read."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def partial_path(path: epath.Path) -> epath.Path:
    """A name for a file while it is written, unique among all processes; `locks.only_writer` deletes leftovers."""
    return path.parent / f".{path.name}.{secrets.token_hex(8)}.partial"


@contextlib.contextmanager
def partial_file(path: epath.PathLike, place: str = "place") -> Iterator[epath.Path]:
    """The name to write a file under, which then gets its own: a killed process leaves no half file.

    Args:
      place: what to choose another of where it cannot be written, for the error.
    """
    path = epath.Path(path)
    partial = partial_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(
            f"Cannot write {path} ({error.strerror or error}); free some space or choose another {place}, "
            "then run the same command again"
        ) from error


def write_atomically(path: epath.PathLike, data: bytes | str) -> None:
    """Writes a whole file; see `partial_file`."""
    with partial_file(path) as partial:
        partial.write_bytes(data if isinstance(data, bytes) else data.encode())


def json_text(value: Any) -> str:
    """A value as the files of a run folder have it."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: epath.PathLike, value: Any) -> None:
    write_atomically(path, json_text(value))


@overload
def read_json(path: epath.PathLike) -> Any: ...
@overload
def read_json(path: epath.PathLike, schema: type[T], remedy: str = ...) -> T: ...
def read_json(
    path: epath.PathLike,
    schema: Any = Any,
    remedy: str = "restore it from a copy, or delete it and run its stage again",
) -> Any:
    """The contents of a JSON file as `schema` has them: a structure of `artifacts.schemas`, or a type.

    Raises:
      UserError: a file that is not regular, too large or not JSON, or has a field of another type or range.
      FileNotFoundError: no file.
    """
    return decode(safe_files.read_bytes(path), path, schema, remedy)


def decode(data: bytes | str, path: object, schema: type[T], remedy: str) -> T:
    """JSON as `schema` has it; `path` names its file in errors."""
    try:
        return msgspec.json.decode(data, type=schema)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {_described(error)}; {remedy}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); {remedy}") from error


def _described(error: msgspec.ValidationError) -> str:
    """The field of a validation error, and its allowed values."""
    reason, _, where = str(error).partition(" - at ")
    field = where.replace("`key` in ", "a name in ").replace("`", "").replace("$.", "").replace("$", "")
    return f"{field or 'its contents'}: {reason[0].lower()}{reason[1:]}"


def describe_file(path: epath.PathLike) -> FileEntry:
    """Size and hash of a regular file."""
    # Not by epath's stat, which fails for an owner without a name, as users of containers may be.
    return FileEntry(safe_files.check_regular(epath.Path(path)), hash_file(path))


def write(
    folder: epath.PathLike,
    schema: type[M],
    files: Iterable[str],
    config_hash: str,
    known: Mapping[str, FileEntry] | None = None,
    **content: Any,
) -> M:
    """Writes `folder/manifest.json`, which marks the folder as complete.

    Args:
      folder: the finished folder.
      schema: its kind of contents (`artifacts.schemas`).
      files: names of its files, relative to the folder.
      config_hash: hash of the config that made them; "" where none did.
      known: sizes and hashes of files that need not be read again.
      **content: the other entries of the schema.
    """
    folder = epath.Path(folder)
    known = known or {}
    found = {name: known[name] if name in known else describe_file(folder / name) for name in sorted(files)}
    entries = {name: msgspec.to_builtins(entry) for name, entry in found.items()}
    value = {
        "schema": SCHEMA,
        "kind": kind(schema),
        "config_hash": config_hash,
        "versions": versions(),
        "conventions": CONVENTIONS,
        **msgspec.to_builtins(content),
        "files": entries,
    }
    written = msgspec.convert(value, schema)
    write_json(folder / FILE_NAME, value)
    return written


def contents_hash(found: Manifest) -> str:
    """Hash of the names and hashes of all files: equal for folders with the same contents."""
    return hashing.hash_text(hashing.canonical_json({name: entry.sha256 for name, entry in found.files.items()}))


def exists(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / FILE_NAME).exists()


def kind(schema: type[Manifest]) -> str:
    """The kind of folder that a schema describes, as its manifest names it."""
    return str(schema.__struct_config__.tag)


def read_kind(folder: epath.PathLike) -> str:
    """The kind of folder that a manifest describes; "" without a readable manifest."""
    path = epath.Path(folder) / FILE_NAME
    return read_json(path, _Header).kind if path.exists() else ""


def read(folder: epath.PathLike, schema: type[M], verify: bool = False) -> M:
    """Reads the manifest of a finished folder.

    Args:
      folder: of the manifest and its files.
      schema: the kind of contents it must have (`artifacts.schemas`).
      verify: check the hashes of all files, too, and not only their sizes.

    Raises:
      UserError: no manifest, another kind or version, a field outside its range, or a file that is missing or altered.
    """
    folder = epath.Path(folder)
    path, expected = folder / FILE_NAME, kind(schema)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: the {expected} is missing or unfinished; run the command that writes it first"
        )
    data = safe_files.read_bytes(path)
    header = decode(data, path, _Header, REMEDY)
    if header.schema != SCHEMA:
        raise UserError(f"{path} has schema {header.schema!r}; this version reads {SCHEMA!r}")
    if header.kind != expected:
        raise UserError(f"{path} describes a {header.kind!r}, where a {expected!r} is expected")
    found = decode(data, path, schema, REMEDY)
    for name, entry in found.files.items():
        check_file(safe_files.inside(folder, name), entry, contents=verify)
    return found


def check_file(path: epath.Path, entry: FileEntry, contents: bool) -> None:
    """Raises UserError for a file that is missing, of another size or, with `contents`, of another hash."""
    remedy = "copy it again from its origin, or run the stage that makes it again"
    try:
        size = safe_files.check_regular(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing though its manifest promises it; {remedy}") from None
    if size != entry.bytes:
        raise UserError(f"{path} has {size} bytes where its manifest promises {entry.bytes}; {remedy}")
    if contents:
        check_hash(path, hash_file(path), entry)


def check_hash(path: epath.Path, sha256: str, entry: FileEntry) -> None:
    """Raises UserError for a file whose hash is not the one in its manifest."""
    if sha256 != entry.sha256:
        remedy = "copy it again from its origin, or run the stage that makes it again"
        raise UserError(f"{path} was altered: its sha256 is not the one in its manifest; {remedy}")
