"""Clips and files that were not used: listed with their reasons, counted, and bounded in number."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from etils import epath
from rich.console import Console
from rich.table import Table

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import DroppedCount
from paris_jax.data.sources.clip import Dropped
from paris_jax.errors import UserError

FILE_NAME = "dropped.jsonl"


def counts(dropped: Iterable[Dropped]) -> tuple[DroppedCount, ...]:
    """How many were dropped at each stage for each reason, the commonest first."""
    found = Counter((item.stage, item.reason) for item in dropped)
    return tuple(DroppedCount(*kind, count) for kind, count in sorted(found.items(), key=lambda f: (-f[1], f[0])))


def write(folder: epath.Path, dropped: Iterable[Dropped]) -> str:
    """Writes one line of JSON for each; returns the name of the file."""
    rows = ({name: value for name, value in vars(item).items() if value} for item in dropped)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    manifest.write_atomically(folder / FILE_NAME, "".join(lines))
    return FILE_NAME


def check_share(clips: int, dropped: Sequence[Dropped], most: float) -> None:
    """Refuses a data set without clips, or of which too much was dropped because of a fault.

    Clips that the config chose to leave out do not count.

    Raises:
      UserError: shows the commonest reasons, each with an example.
    """
    faults = [item for item in dropped if item.stage != "curate"]
    share = len(faults) / max(clips + len(faults), 1)
    if clips and share <= most:
        return
    reasons = []
    for kind in counts(faults or dropped)[:3]:
        example = next(d for d in dropped if (d.stage, d.reason) == (kind.stage, kind.reason))
        reasons.append(f"{kind.count} x {kind.reason}, such as {example}")
    listed = "; ".join(reasons)
    if not clips:
        raise UserError(f"No clip can be used: {listed or 'the source is empty'}; mend the data, or change the config")
    raise UserError(
        f"{len(faults)} of {clips + len(faults)} clips and files cannot be used, {share:.1%} where "
        f"data.max_dropped_share={most:g}: {listed}; mend or remove them, or raise data.max_dropped_share, and run the "
        "same command again"
    )


def print_table(clips: int, dropped: Sequence[Dropped], console: Console) -> None:
    """Prints the numbers of dropped clips by reason; nothing where all were used."""
    if not dropped:
        return
    table = Table(title=f"{clips} clips are used, {len(dropped)} clips and files are dropped ({FILE_NAME} lists them)")
    for column in ("stage", "reason", "number", "for example"):
        table.add_column(column, justify="right" if column == "number" else "left", overflow="fold")
    for kind in counts(dropped):
        example = next(d for d in dropped if (d.stage, d.reason) == (kind.stage, kind.reason))
        table.add_row(kind.stage, kind.reason, str(kind.count), example.id)
    console.print(table, markup=False)
