"""Points of a sweep as overrides of a config: axes, their products, and files that list them.

A file of configs/sweeps/ defines `sweep(add)`, which calls `add` once per point, or a list `POINTS`:

    from paris_jax.config.overrides import axis, product, zipped

    POINTS = product(
        axis("training.learning_rate", [1e-3, 3e-3, 1e-2]),
        zipped(axis("network.hidden_size", [32, 48]), axis("network.num_heads", [2, 3])),
    )
"""

import itertools
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paris_jax.config.files import failures_of
from paris_jax.errors import UserError

Overrides = dict[str, Any]  # "training.learning_rate" -> value
EXAMPLE = "configs/sweeps/learning_rate_by_width.py"


def axis(field: str, values: Iterable[Any]) -> list[Overrides]:
    """One point for each value of a config field such as "training.learning_rate"."""
    return [{field: value} for value in values]


def fixed(**overrides: Any) -> list[Overrides]:
    """A single point; dots in names are written as two underscores: fixed(training__steps=100)."""
    return [{name.replace("__", "."): value for name, value in overrides.items()}]


def product(*axes: Sequence[Overrides]) -> list[Overrides]:
    """Every combination of the axes' points; the last axis varies fastest."""
    return [_join(combination) for combination in itertools.product(*axes)]


def zipped(*axes: Sequence[Overrides]) -> list[Overrides]:
    """Points whose values change together, such as a width with its number of heads.

    Raises:
      UserError: axes of different lengths.
    """
    if len(lengths := {len(points) for points in axes}) > 1:
        raise UserError(f"zipped axes have {', '.join(map(str, sorted(lengths)))} values; give them equally many")
    return [_join(combination) for combination in zip(*axes, strict=True)]


def _join(points: Iterable[Overrides]) -> Overrides:
    joined: Overrides = {}
    for point in points:
        if twice := joined.keys() & point.keys():
            raise UserError(f"{', '.join(sorted(twice))} is set by two axes of a sweep; set it in one of them")
        joined |= point
    return joined


def to_text(value: Any) -> str:
    """A value as --config.FIELD=VALUE takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(to_text, value)) if isinstance(value, list | tuple) else str(value)


def load(file: str) -> list[Overrides]:
    """The points of a file that defines `sweep(add)` or `POINTS`.

    Raises:
      UserError: no such file, one that fails, no point, a point that is there twice, or is no mapping of field names.
    """
    if not file.endswith(".py") or not Path(file).is_file():
        raise UserError(f"there is no file of a sweep {file!r} here; give a .py file, such as {EXAMPLE}")
    points: list[Any] = []

    def add(overrides: Mapping[str, Any] | None = None, **more: Any) -> None:
        points.append(_join([dict(overrides or {}), *fixed(**more)]))

    with failures_of(file, file):
        namespace = runpy.run_path(file)
        if "sweep" in namespace:
            namespace["sweep"](add)
        elif "POINTS" in namespace:
            points.extend(namespace["POINTS"])
        else:
            raise UserError(f"{file} defines neither sweep(add) nor POINTS; see {EXAMPLE}")
    seen: list[dict[str, str]] = []
    for point in points:
        if not isinstance(point, dict) or not all(isinstance(name, str) and "." in name for name in point):
            raise UserError(f"{file}: {point!r} must map config fields to values, as {{'training.steps': 100}}")
        text = {name: to_text(value) for name, value in point.items()}
        if text in seen:
            raise UserError(f"{file}: the point {', '.join(f'{n}={v}' for n, v in text.items())} is there twice")
        seen.append(text)
    if not points:
        raise UserError(f"{file} has no point; see {EXAMPLE}")
    return points
