"""Loads config files, and changes fields from the command line."""

import contextlib
import os
import runpy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from paris_jax.errors import UserError

EXAMPLE = "--config=configs/shapes.py:tiny"


def load(name: str) -> dict[str, Any]:
    """Calls get_config of a config file and returns the config as nested dictionaries, unchecked.

    Args:
      name: the file, with the argument of get_config after a colon where there is one: "configs/shapes.py:tiny".

    Raises:
      UserError: the file does not exist, or its get_config fails.
    """
    file, _, argument = name.partition(":")
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f"--config={name}: there is no config file {file!r} here; give a .py file, such as {EXAMPLE}")
    with failures_of(f"--config={name}", file):
        namespace = runpy.run_path(file)
        if "get_config" not in namespace:
            raise UserError(f"--config={name}: {file} has no get_config; see the top of the file for its variants")
        config = namespace["get_config"](argument) if argument else namespace["get_config"]()
    return config.to_dict() if hasattr(config, "to_dict") else config


@contextlib.contextmanager
def failures_of(name: str, file: str) -> Iterator[None]:
    """Turns whatever a user's file raises into one sentence that begins with `name`."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"{name}: {file} fails with KeyError: {error}; see the top of the file for its variants"
        ) from error
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{name}: {file} fails with {said}; mend the file") from error


def change(config: dict[str, Any], changes: Iterable[str]) -> None:
    """Sets fields in place, from "training.steps=100"; `Experiment` refuses values that do not fit."""
    for text in changes:
        name, _, value = text.partition("=")
        *groups, last = name.split(".")
        inner = config
        for k, group in enumerate(groups):
            inner = inner.setdefault(group, {})
            if not isinstance(inner, dict):
                raise UserError(
                    f"--config.{text}: config.{'.'.join(groups[: k + 1])} is one value, not a group of fields"
                )
        inner[last] = _like(inner.get(last), value)


def embedded() -> str:
    """The path of configs/shapes.py: the checkout's, or the copy that a wheel carries."""
    package = Path(__file__).parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "shapes.py").exists():
            near = os.path.relpath(folder / "shapes.py")
            return str(folder / "shapes.py") if near.startswith("..") else near
    raise UserError(f"configs/shapes.py is not beside the package; name a config file, such as {EXAMPLE}")


def _like(old: Any, text: str) -> Any:
    """`text` as a value of the type of `old`, or as it is where that cannot be."""
    if isinstance(old, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        if isinstance(old, list | tuple):
            return [type(old[0])(item) for item in text.strip("()[]").split(",")]
        return type(old)(text) if isinstance(old, int | float) else text
    except ValueError:
        return text
