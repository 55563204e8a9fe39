"""Range checks of config fields: each yields a sentence for a value that is not allowed."""

from collections.abc import Iterable, Iterator

from paris_jax.errors import nearest

Problems = Iterator[str]


def choice(name: str, value: str, allowed: Iterable[str]) -> Problems:
    if value not in allowed:
        yield f"{name}={value!r}: must be one of {', '.join(allowed)}{nearest(value, allowed)}"


def at_least(low: float, **fields: float) -> Problems:
    for name, value in fields.items():
        if not value >= low:
            yield f"{name}={value}: must be at least {low}"


def above(low: float, **fields: float) -> Problems:
    for name, value in fields.items():
        if not value > low:
            yield f"{name}={value}: must be above {low}"


def seed(**fields: int) -> Problems:
    """The range of a 32-bit key; beyond it, two seeds would give the same draws."""
    for name, value in fields.items():
        if not 0 <= value < 2**32:
            yield f"{name}={value}: must be from 0 to {2**32 - 1}"


def between(low: float, high: float, **fields: float) -> Problems:
    for name, value in fields.items():
        if not low <= value <= high:
            yield f"{name}={value}: must be between {low} and {high}"
