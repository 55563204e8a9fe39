"""Fields of config sections: default, help and range are declared once; checks, flags and docs/config.md follow."""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

from paris_jax.config import checks
from paris_jax.config.checks import Problems


def setting(
    default: Any,
    help: str,
    *,
    choices: Any = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """Declares a field of a config section.

    Args:
      default: used where a config does not set the field.
      help: the field's effect, with its unit; shown by --help, --print_config and docs/config.md.
      choices: allowed values, as a `Literal` or an iterable.
      at_least, above: lower bound, inclusive or exclusive.
      at_most, below: upper bound, inclusive or exclusive.
    """
    allowed = typing.get_args(choices) or tuple(choices or ())
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    bounds = {name: value for name, value in bounds.items() if value is not None}
    return dataclasses.field(default=default, metadata={"help": help, "choices": allowed, "bounds": bounds})


def seed() -> Any:
    """Declares the field of a seed; larger ones than 32 bits would repeat the draws of smaller ones."""
    return setting(0, "seed of the random numbers", at_least=0, at_most=2**32 - 1)


def problems_of(section: Any) -> Problems:
    """A sentence for each field of a section that is outside its range; None is allowed where it is the default."""
    for field in dataclasses.fields(section):
        if getattr(section, field.name) is None and field.default is None:  # not given
            continue
        value, allowed = getattr(section, field.name), field.metadata.get("choices")
        if allowed:
            yield from checks.choice(field.name, value, allowed)
        elif wrong := wrong_bound(field, value if isinstance(value, tuple) else (value,)):
            yield f"{field.name}={value}: must be {wrong}"


def wrong_bound(field: dataclasses.Field, values: Iterable[float]) -> str:
    """The range of a field in words where a value is outside of it, else ""."""
    bounds = field.metadata.get("bounds", {})
    inside = not bounds or all(
        bounds.get("at_least", value) <= value <= bounds.get("at_most", value)
        and not ("above" in bounds and value <= bounds["above"])
        and not ("below" in bounds and value >= bounds["below"])
        for value in values
    )
    return "" if inside else describe_range(field)


def describe_range(field: dataclasses.Field) -> str:
    """The allowed values of a field in words; "" where its type allows all."""
    if field.metadata.get("choices"):
        return f"one of {', '.join(field.metadata['choices'])}"
    bounds = field.metadata.get("bounds", {})
    if bounds.keys() == {"at_least", "at_most"}:
        low, high = bounds["at_least"], bounds["at_most"]
        return f"from {low} to {high}" if isinstance(low, int) else f"between {low} and {high}"
    return " and ".join(f"{name.replace('_', ' ')} {value}" for name, value in bounds.items())
