"""Writes small SVG plots directly, so that they take their colours from the page (light or dark) and need no network.

A series is (name, CSS class, values); a class such as "ensemble" gets its colour in data/page.css.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Sequence

from paris_jax.evaluation.estimates import Z95, Estimate

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 46


@dataclasses.dataclass(frozen=True)
class Series:
    """One line or one set of bars."""

    name: str
    style: str
    values: Sequence[Estimate | None]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A linear map from data to pixels, with round ticks."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        raw = (self.high - self.low) / wanted
        size = 10.0 ** math.floor(math.log10(raw))
        step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(
    title: str,
    series: Sequence[Series],
    edges: Sequence[float],
    y_label: str,
    unit: str = "",
    mark: float | None = None,
) -> str:
    """Plots means with 95 % bands over timestep bins; `edges` are the bins' borders, `mark` a dashed level."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y = _value_axis(series, unit, from_zero=unit == "share")
    parts = [_frame(y, unit), _time_axis(x), "" if mark is None else _level(y(mark))]
    for s in series:
        points = [(x(m), e) for m, e in zip(middles, s.values, strict=True) if e is not None]
        upper = [f"{px:.1f},{y(_clip(e['value'] + Z95 * e['stderr'], y)):.1f}" for px, e in points]
        lower = [f"{px:.1f},{y(_clip(e['value'] - Z95 * e['stderr'], y)):.1f}" for px, e in points]
        parts.append(f'<polygon class="band {s.style}" points="{" ".join(upper + lower[::-1])}"/>')
        middle = [f"{px:.1f},{y(e['value']):.1f}" for px, e in points]
        parts.append(f'<polyline class="line {s.style}" points="{" ".join(middle)}"/>')
        parts += [_dot(px, y(e["value"]), s, e, unit) for px, e in points]
    return _svg(_described(title, series, unit), parts, y_label)


def differences(title: str, values: Sequence[Estimate | None], edges: Sequence[float], y_label: str) -> str:
    """Plots paired differences over timestep bins with 95 % whiskers, coloured by the model with the lower value."""
    series = Series("ensemble minus monolith", "neutral", values)
    x = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    y = _value_axis([series], "", around_zero=True)
    parts = [_frame(y, ""), _time_axis(x), _level(y(0))]
    for a, b, e in zip(edges[:-1], edges[1:], values, strict=True):
        if e is None:
            continue
        px, half = x((a + b) / 2), Z95 * e["stderr"]
        significant = abs(e["value"]) > half
        style = ("ensemble" if e["value"] < 0 else "monolith") if significant else "neutral"
        parts.append(_whisker(px, y(e["value"] - half), y(e["value"] + half), style))
        parts.append(_dot(px, y(e["value"]), Series(series.name, style, values), e, ""))
    return _svg(_described(title, [series], ""), parts, y_label)


def bars(title: str, names: Sequence[str], series: Sequence[Series], y_label: str, unit: str = "") -> str:
    """Plots groups of bars with 95 % whiskers, one group per name."""
    y = _value_axis(series, unit, from_zero=True)
    group = (WIDTH - LEFT - RIGHT) / len(names)
    width = min(group * 0.74 / len(series), 34)
    parts = [_frame(y, unit)]
    for i, name in enumerate(names):
        centre = LEFT + group * (i + 0.5)
        parts.append(_tick(centre, name))
        for j, s in enumerate(series):
            e = s.values[i]
            if e is None:
                continue
            px = centre + (j - len(series) / 2) * width
            top, half = y(e["value"]), Z95 * e["stderr"]
            label = f"{s.name}, {name}: {_number(e['value'], unit)} ± {_number(e['stderr'], unit)}"
            parts.append(
                f'<rect class="bar {s.style}" x="{px + 1:.1f}" y="{top:.1f}" width="{width - 2:.1f}" '
                f'height="{max(y.start - top, 0):.1f}" rx="2"><title>{html.escape(label)}</title></rect>'
            )
            low, high = _clip(e["value"] - half, y), _clip(e["value"] + half, y)
            parts.append(_whisker(px + width / 2, y(low), y(high), "on-bar"))
    return _svg(_described(f"{title} ({', '.join(names)})", series, unit), parts, y_label, HEIGHT - 20)


def shares(title: str, names: Sequence[str], by_step: Sequence[Sequence[float]], x_label: str) -> str:
    """Plots stacked shares over solver steps, one layer per expert; rows of `by_step` (S, K) sum to 1."""
    count = len(by_step)
    x = Axis(0, count, LEFT, WIDTH - RIGHT)
    y = Axis(0, 1, HEIGHT - BOTTOM, TOP)
    parts = [_frame(y, "share")]
    below = [0.0] * count
    for k, name in enumerate(names):
        above = [b + row[k] for b, row in zip(below, by_step, strict=True)]
        # Steps are drawn as stairs: each is a separate routing decision, not a sample of a curve.
        upper = [f"{x(s + d):.1f},{y(above[s]):.1f}" for s in range(count) for d in (0, 1)]
        lower = [f"{x(s + d):.1f},{y(below[s]):.1f}" for s in range(count) for d in (0, 1)]
        mean = sum(row[k] for row in by_step) / count
        points = " ".join(upper + lower[::-1])
        label = f"<title>{html.escape(name)}: {mean:.0%}</title>"
        parts.append(f'<polygon class="layer part{k % 8}" points="{points}">{label}</polygon>')
        below = above
    for s in sorted({0, count // 4, count // 2, 3 * count // 4, count - 1}):
        parts.append(_tick(x(s + 0.5), str(s + 1)))
    parts.append(_below(x_label))
    means = [f"{name} {sum(row[k] for row in by_step) / count:.0%}" for k, name in enumerate(names)]
    return _svg(f"{title}: {', '.join(means)}", parts, "mean weight")


def interval(difference: Estimate, better: str | None, won: str) -> str:
    """Draws the 95 % interval of ensemble - monolith for a table row; to the right, the ensemble is better."""
    width, middle, half = 170, 11, Z95 * difference["stderr"]
    value = -difference["value"] if better == "lower" else difference["value"]
    reach = max(abs(value) + half, 1e-12) * 1.1
    x = Axis(-reach, reach, 0, width)
    style = "neutral" if won == "none" else won
    ends = f'x1="{x(value - half):.1f}" x2="{x(value + half):.1f}"'
    return (
        f'<svg class="interval" viewBox="0 0 {width} {2 * middle}" role="img" aria-label="95 % interval">'
        f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="1" y2="{2 * middle - 1}"/>'
        f'<line class="whisker {style}" {ends} y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot {style}" cx="{x(value):.1f}" cy="{middle}" r="4.5"/></svg>'
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Renders (name, CSS class) pairs as a legend of coloured marks."""
    items = "".join(f'<span><i class="swatch {style}"></i>{html.escape(name)}</span>' for name, style in entries)
    return f'<p class="legend">{items}</p>'


def _described(title: str, series: Sequence[Series], unit: str) -> str:
    """A plot in words, for screen readers: its title and all values."""
    texts = [
        f"{s.name} {', '.join('none' if e is None else _number(e['value'], unit) for e in s.values)}" for s in series
    ]
    return f"{title}: {'; '.join(texts)}"


def _value_axis(series: Sequence[Series], unit: str, from_zero: bool = False, around_zero: bool = False) -> Axis:
    estimates = [e for s in series for e in s.values if e is not None]
    low = min((e["value"] - Z95 * e["stderr"] for e in estimates), default=0.0)
    high = max((e["value"] + Z95 * e["stderr"] for e in estimates), default=1.0)
    if unit == "share":
        return Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    if from_zero:
        low = min(low, 0.0)
    if around_zero:
        high = max(abs(low), abs(high))
        low = -high
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    return Axis(low if from_zero and low == 0 else low - pad, high + pad, HEIGHT - BOTTOM, TOP)


def _clip(value: float, axis: Axis) -> float:
    return min(max(value, axis.low), axis.high)


def _frame(y: Axis, unit: str) -> str:
    rows = [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{_number(v, unit)}</text>'
        for v in y.ticks()
    ]
    return "".join(rows)


def _time_axis(x: Axis) -> str:
    ticks = "".join(_tick(x(v), f"{v:g}") for v in (0, 0.25, 0.5, 0.75, 1))
    return ticks + _below("time t  (0 = data, 1 = noise)")


def _tick(px: float, text: str) -> str:
    place = f'x="{px:.1f}" y="{HEIGHT - BOTTOM + 18}"'
    return f'<text class="tick" {place} text-anchor="middle">{html.escape(text)}</text>'


def _below(text: str) -> str:
    place = f'x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}"'
    return f'<text class="axis" {place} text-anchor="middle">{html.escape(text)}</text>'


def _level(py: float) -> str:
    return f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>'


def _whisker(px: float, y1: float, y2: float, style: str) -> str:
    return f'<line class="whisker {style}" x1="{px:.1f}" x2="{px:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _dot(px: float, py: float, series: Series, e: Estimate, unit: str) -> str:
    label = f"{series.name}: {_number(e['value'], unit)} ± {_number(e['stderr'], unit)} (n = {e['n']})"
    place = f'cx="{px:.1f}" cy="{py:.1f}" r="3.6"'
    return f'<circle class="dot {series.style}" {place}><title>{html.escape(label)}</title></circle>'


def _number(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.0%}"
    text = f"{0.0 if abs(value) < 1e-12 else value:.3g}"
    return text.replace("-", "−")


def _svg(title: str, parts: Sequence[str], y_label: str, height: int = HEIGHT) -> str:
    turned = f'transform="translate(12 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"'
    label = f'<text class="axis" {turned} text-anchor="middle">{html.escape(y_label)}</text>'
    box = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(title, quote=True)}"'
    return f'<svg class="plot" {box}>{label}{"".join(parts)}</svg>'
