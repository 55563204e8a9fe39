"""headline.png and headline.pdf: the verdict as a figure to share."""

import importlib.util
import io
import textwrap
from collections.abc import Mapping
from typing import Any

from paris_jax.evaluation import report_sections
from paris_jax.evaluation.estimates import Z95
from paris_jax.evaluation.results import MODELS, Comparison, headline

COLOURS = {"ensemble": "#1f6f78", "monolith": "#b04c13"}
INSTALL = "pip install -e '.[evaluation]'"


def render(results: Mapping[str, Any]) -> dict[str, bytes]:
    """The figure as {"headline.png": ..., "headline.pdf": ...}; {} where matplotlib is not installed.

    Bars are the models' values with 95 % intervals, dashed lines those of real clips.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    scored = [c for c in results["comparisons"] if c["better"]]
    first = report_sections.main_comparison(scored)
    shown = [c for c in (first, *(c for c in scored if c is not first)) if c is not None][:3]
    figure = Figure(figsize=(3.1 * max(len(shown), 1) + 0.6, 3.9), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(headline(results["comparisons"]), 34 * max(len(shown), 1))), fontsize=11)
    for axes, comparison in zip(figure.subplots(1, max(len(shown), 1), squeeze=False)[0], shown, strict=False):
        _draw(axes, comparison)
    protocol = results["protocol"]
    source = f"{results['experiment']}, {protocol['prompts']} held-out prompts, bars: 95 % intervals"
    figure.supxlabel(source, x=0.01, ha="left", fontsize=7, color="#5d626d")
    found = {}
    for ending in ("png", "pdf"):
        data = io.BytesIO()
        dates = {"CreationDate": None} if ending == "pdf" else None
        figure.savefig(data, format=ending, dpi=200, metadata=dates)
        found[f"headline.{ending}"] = data.getvalue()
    return found


def _draw(axes: Any, c: Comparison) -> None:
    scale = 100 if c["unit"] == "share" else 1
    for i, model in enumerate(MODELS):
        value, error = c[model]["value"] * scale, Z95 * c[model]["stderr"] * scale
        axes.bar(i, value, 0.62, yerr=error, color=COLOURS[model], capsize=4, ecolor="#1d1f24")
    if c["reference"]:
        axes.axhline(c["reference"]["value"] * scale, color="#858b98", linestyle="--", linewidth=1)
        axes.annotate("real clips", (1.42, c["reference"]["value"] * scale), fontsize=7, color="#5d626d", ha="right",
                      va="bottom")  # fmt: skip
    axes.set_xlim(-0.5, len(MODELS) - 0.5)
    axes.set_xticks(range(len(MODELS)), MODELS, fontsize=9)
    label = "\n".join(textwrap.wrap(c["label"] + (", %" if scale == 100 else ""), 26))
    axes.set_title(f"{label}\n{c['better']} is better", fontsize=8.5, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
