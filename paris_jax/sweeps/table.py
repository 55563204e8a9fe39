"""The table of a sweep: table.csv, table.md and plot.png, by any metric of results.json."""

import csv
import dataclasses
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from paris_jax.artifacts import manifest
from paris_jax.errors import UserError, nearest, printable
from paris_jax.evaluation.estimates import Z95
from paris_jax.sweeps.points import Point, varied

RESULTS = "results.json"
HELDOUT_LOSS = "loss"  # id of the held-out flow loss among the comparisons


@dataclasses.dataclass(frozen=True)
class Row:
    """One point: its settings, state, and (value, standard error or NaN) by metric."""

    name: str
    settings: Mapping[str, str]
    state: str
    scores: Mapping[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class SweepTable:
    """The rows of a sweep. The first metric is the one that judges; `lower` says whether less of it is better."""

    fields: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    lower: bool | None = None

    @property
    def best(self) -> Row | None:
        """The row with the best first metric; None without a direction or a value."""
        scored = [row for row in self.rows if math.isfinite(row.scores.get(self.metrics[0], (math.nan, 0))[0])]
        if self.lower is None or not scored:
            return None
        return min(scored, key=lambda row: row.scores[self.metrics[0]][0] * (1 if self.lower else -1))


def of_runs(points: Sequence[Point], metrics: Sequence[str], failed: Mapping[str, str]) -> SweepTable:
    """The table of points with run folders of their own; points that are not done have no scores.

    Raises:
      UserError: a metric that a finished point does not have.
    """
    metrics = tuple(metrics) or (HELDOUT_LOSS, f"{HELDOUT_LOSS}.monolith")
    rows, lower = [], None
    for point in points:
        scores: dict[str, tuple[float, float]] = {}
        state = f"failed: {failed[point.name]}" if point.name in failed else point.state
        path = point.run.evaluation / RESULTS
        if point.is_done and path.exists():
            found = manifest.read_json(path)
            scores = {metric: find(found, metric, path) for metric in metrics}
            lower = _lower(found, metrics[0])
        rows.append(Row(point.name, point.changes, state, scores))
    fields = varied(points) or list(dict.fromkeys(field for point in points for field in point.changes))
    return SweepTable(tuple(fields), metrics, tuple(rows), lower)


def of_systems(found: Mapping[str, Any], metrics: Sequence[str]) -> SweepTable:
    """The table of sampling settings of one ensemble, from the results of `evaluate_systems`."""
    first = found["systems"][0]["scores"]
    metrics = tuple(metrics) or tuple(first)
    rows = []
    for row in found["systems"]:
        scores = {metric: _score(row["scores"], metric, RESULTS) for metric in metrics}
        settings = {name: str(value) for name, value in row["overrides"].items()}
        rows.append(Row(", ".join(f"{n}={v}" for n, v in settings.items()), settings, "done", scores))
    fields = dict.fromkeys(field for row in rows for field in row.settings)
    return SweepTable(tuple(fields), metrics, tuple(rows))


def find(found: Mapping[str, Any], metric: str, path: epath.PathLike) -> tuple[float, float]:
    """A metric of results.json and its standard error, NaN where it has none.

    Args:
      metric: the id of a comparison ("frechet", of the ensemble; "frechet.monolith", "frechet.difference"), or the path
        of a number or score ("experts.routed").

    Raises:
      UserError: there is no such metric.
    """
    comparisons = {row["id"]: row for row in (*found["comparisons"], *found["companions"])}
    name, _, part = metric.partition(".")
    if name in comparisons:
        return _score(comparisons[name], part or "ensemble", path)
    value: Any = found
    for key in metric.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    number = _number(value)
    if number is None:
        raise UserError(f"--metric={metric}: {path} has no such number{nearest(name, comparisons)}")
    return number


def _score(scores: Mapping[str, Any], name: str, path: epath.PathLike) -> tuple[float, float]:
    number = _number(scores.get(name))
    if number is None:
        raise UserError(f"--metric={name}: {path} has no such score; it has {', '.join(map(str, scores))}")
    return number


def _number(value: Any) -> tuple[float, float] | None:
    if isinstance(value, dict) and "value" in value:
        return float(value["value"]), float(value.get("stderr") or math.nan)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value), math.nan
    return None


def _lower(found: Mapping[str, Any], metric: str) -> bool | None:
    """Whether less of a metric is better; None where results.json does not say."""
    rows = {row["id"]: row["better"] for row in (*found["comparisons"], *found["companions"])}
    better = rows.get(metric.partition(".")[0])
    return None if better is None else better == "lower"


def write(folder: epath.PathLike, found: SweepTable) -> None:
    """Writes table.csv, table.md and, where matplotlib is installed, plot.png."""
    folder = epath.Path(folder)
    manifest.write_atomically(folder / "table.csv", to_csv(found).encode())
    manifest.write_atomically(folder / "table.md", to_markdown(found).encode())
    if picture := plot(found):
        manifest.write_atomically(folder / "plot.png", picture)


def show(folder: epath.PathLike, found: SweepTable) -> None:
    """Prints the table."""
    console = Console(highlight=False)
    shown = RichTable(*found.fields, *found.metrics, "state", "run")
    for row in found.rows:
        best = ", best" if row is found.best else ""
        cells = [*(row.settings.get(f, "") for f in found.fields), *_cells(found, row), row.state + best, row.name]
        shown.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(shown)
    console.print(f"table: {epath.Path(folder) / 'table.md'}", soft_wrap=True)


def _cells(found: SweepTable, row: Row) -> list[str]:
    return [_with_interval(*row.scores[metric]) if metric in row.scores else "" for metric in found.metrics]


def _with_interval(value: float, stderr: float) -> str:
    return f"{value:.4g}" if math.isnan(stderr) else f"{value:.4g} ± {Z95 * stderr:.2g}"


def to_csv(found: SweepTable) -> str:
    """One line for each point; every metric has a column with its standard error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *found.fields, "state", *(c for m in found.metrics for c in (m, f"{m}_stderr"))])
    for row in found.rows:
        numbers = [n for metric in found.metrics for n in row.scores.get(metric, (math.nan, math.nan))]
        settings = [row.settings.get(field, "") for field in found.fields]
        writer.writerow([row.name, *settings, row.state, *("" if math.isnan(n) else repr(n) for n in numbers)])
    return text.getvalue()


def to_markdown(found: SweepTable) -> str:
    """The table with 95 % intervals; the best point is bold."""
    header = [*found.fields, *found.metrics, "state", "run"]
    lines = [header, ["---"] * len(header)]
    for row in found.rows:
        settings = [row.settings.get(field, "") for field in found.fields]
        cells = [_plain(cell) for cell in (*settings, *_cells(found, row), row.state, row.name)]
        lines.append([f"**{cell}**" if cell and row is found.best else cell for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    return "".join(f"\\{c}" if c in "\\|*_`<>[]" else c for c in printable(text).replace("\n", " "))


def plot(found: SweepTable) -> bytes | None:
    """The first metric over the first numeric field, a line for each combination of the others; None without either."""
    axis = next((f for f in found.fields if all(_is_number(row.settings.get(f, "")) for row in found.rows)), None)
    metric = found.metrics[0]
    rows = [row for row in found.rows if metric in row.scores]
    if axis is None or not rows or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    lines: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        label = ", ".join(f"{f}={row.settings.get(f, '')}" for f in found.fields if f != axis)
        value, stderr = row.scores[metric]
        lines.setdefault(label, []).append((float(row.settings[axis]), value, stderr))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        x, y, stderr = zip(*sorted(points), strict=True)
        errors = [0.0 if math.isnan(e) else Z95 * e for e in stderr]
        axes.errorbar(x, y, errors, marker="o", capsize=3, label=label)
    values = [point[0] for points in lines.values() for point in points]
    if min(values) > 0 and max(values) / min(values) > 8:
        axes.set_xscale("log")
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{metric}, 95 % intervals")
    if any(lines):
        axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150)
    return data.getvalue()


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
