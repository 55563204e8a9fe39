"""Sections of the report that not every evaluation has: the one number, experts by cluster, a sweep, open questions."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from paris_jax.evaluation import plots
from paris_jax.evaluation.estimates import Z95
from paris_jax.evaluation.plots import Series
from paris_jax.evaluation.results import MODELS, Comparison, format_estimate

VERDICTS = {"ensemble": "ensemble wins", "monolith": "monolith wins", "none": "no clear winner"}


def verdict(c: Comparison) -> str:
    """The verdict of a row in a few words."""
    return "verdict withheld" if c["withheld"] else VERDICTS[c["winner"]]


def main_comparison(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The row whose number the first screen shows: the Frechet distance, else the first with a better direction."""
    scored = [c for c in comparisons if c["better"]]
    return next((c for c in scored if c["id"] == "frechet"), scored[0] if scored else None)


def over_floor(c: Comparison) -> str:
    """How many times nearer to the floor the better model is, with the raw values beside it in the page; "" without."""
    if not c["reference"] or c["better"] != "lower":
        return ""
    above = {model: c[model]["value"] - c["reference"]["value"] for model in MODELS}
    if min(above.values()) <= 0:
        return ""
    better, worse = sorted(MODELS, key=lambda model: above[model])
    ratio = above[worse] / above[better]
    floor = format_estimate(c["reference"])
    return (
        f"Less the floor of real clips against real clips ({floor}), the {worse} is {ratio:.2f} times as far as the "
        f"{better}."
    )


def number(results: Mapping[str, Any]) -> str:
    """The one number of the first screen."""
    c = main_comparison(results["comparisons"])
    if c is None:
        return ""
    unit = "share" if c["unit"] == "share" else ""
    values = "".join(
        f'<div class="{model}"><dt>{model}</dt><dd>{format_estimate(c[model], unit)}</dd></div>' for model in MODELS
    )
    reason = f'<p class="note">{html.escape(c["withheld"])}</p>' if c["withheld"] else ""
    note = f'<p class="note">{over_floor(c)}</p>' if over_floor(c) else ""
    return (
        f'<section class="number" aria-label="The one number"><h2>{html.escape(c["label"])}</h2><dl>{values}</dl>'
        f'<p><span class="pill {c["winner"]}">{verdict(c)}</span> <span class="note">{c["better"]} is better</span></p>'
        f"{reason}{note}</section>"
    )


def experts(results: Mapping[str, Any]) -> str:
    """Panels of the experts on their own; "" with one expert."""
    found = results["experts"]
    if found is None:
        return ""
    edges, router = results["router"]["edges"], results["router"]
    disagreement = plots.lines(
        "Disagreement of the experts by time", [Series("disagreement", "ensemble", found["disagreement"])], edges,
        "standard deviations",
    )  # fmt: skip
    routed = [f"{name} {format_estimate(found[name])}" for name in ("routed", "oracle")]
    calibration = router["calibration_all"]
    parts = {
        "Each expert on each cluster": (
            _matrix(found),
            "Held-out flow loss of each expert alone (rows) on the clips of each cluster (columns); its own cluster is "
            f"framed. Over all clips: {' and '.join(routed)}, where the oracle gives every clip to the expert of its "
            "own cluster.",
        ),
        "Disagreement by time": (
            disagreement,
            "Standard deviation of the experts’ predictions of the clip, weighted by the router, in standard "
            "deviations of the data.",
        ),
        "Router’s confusion": (
            _confusion(router),
            "Clips by their own cluster (rows) and the router’s first choice (columns), over all times. Its confidence "
            f"is off by {calibration['error']:.1%} on average (expected calibration error); the log loss is "
            f"{calibration['log_loss']:.3f} nats.",
        ),
    }
    return "".join(
        f'<figure class="panel"><h3>{title}</h3>{body}<figcaption>{caption}</figcaption></figure>'
        for title, (body, caption) in parts.items()
    )


def _matrix(found: Mapping[str, Any]) -> str:
    rows = []
    for expert, losses in zip(found["experts"], found["loss"], strict=True):
        values = ["–" if e is None else f"{e['value']:.3f}" for e in losses]
        own = [cluster == expert for cluster in found["clusters"]]
        rows.append((f"expert {expert}", list(zip(values, own, strict=True))))
    return _table([f"cluster {k}" for k in found["clusters"]], rows, "Loss of each expert on each cluster")


def _confusion(router: Mapping[str, Any]) -> str:
    K = len(router["confusion"][0])
    total = [[sum(b[i][j] for b in router["confusion"]) for j in range(K)] for i in range(K)]
    rows = [
        (f"cluster {i}", [(f"{count / max(sum(row), 1):.1%}", i == j) for j, count in enumerate(row)])
        for i, row in enumerate(total)
    ]
    return _table([f"chooses {j}" for j in range(K)], rows, "Router’s confusion of clusters")


def _table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, bool]]]], label: str) -> str:
    """A table of numbers with named rows and columns, some of whose cells are framed."""
    head = "".join(f'<th scope="col" class="number">{html.escape(c)}</th>' for c in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th>'
        + "".join(f'<td class="number{" own" if is_own else ""}">{value}</td>' for value, is_own in cells)
        + "</tr>"
        for name, cells in rows
    )
    table = f'<table class="dense"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
    return scroll(table, label)


def sweep(found: Mapping[str, Any] | None) -> str:
    """The sweep over sampling settings, where one was made; "" otherwise."""
    if found is None:
        return ""
    systems, labels = found["systems"], found["labels"]
    names = [", ".join(f"{k}={v}" for k, v in s["overrides"].items()) or s["ensemble"] for s in systems]
    shown = [n for n in ("correct", "shapes_frechet", "shapes_kernel", "i3d_frechet") if n in systems[0]["scores"]]
    panels = []
    for name in shown[:2]:
        unit = "share" if name == "correct" else ""
        series = [Series("ensemble", "ensemble", [s["scores"][name] for s in systems])]
        plot = plots.bars(f"{labels[name]} by setting", names, series, labels[name].lower(), unit)
        panels.append(f'<figure class="panel"><h3>{html.escape(labels[name])} by setting</h3>{plot}</figure>')
    rows = []
    for name, s in zip(names, systems, strict=True):
        scores = [format_estimate(s["scores"][n], "share" if n == "correct" else "") for n in shown]
        cost = [f"{s['experts_per_step']:.2f}", f"{s['seconds_per_video']:.3g} s"]
        rows.append((name, [(value, False) for value in scores + cost]))
    table = _table([*(labels[n] for n in shown), "experts a step", "a video"], rows, "Scores by sampling setting")
    return (
        '<section id="sweep"><h2>How sampling settings change it</h2><p class="about">The same ensemble, prompts and '
        f"noise with other settings; {found['protocol']['prompts']} prompts.</p>"
        f'<div class="panels">{"".join(panels)}</div>{table}</section>'
    )


def open_questions(results: Mapping[str, Any]) -> list[str]:
    """Sentences on the limits of these results."""
    found = []
    for c in results["comparisons"]:
        if c["better"] and c["winner"] == "none":
            bounds = [c["difference"]["value"] + sign * Z95 * c["difference"]["stderr"] for sign in (-1, 1)]
            low, high = (f"{bound:.3g}".replace("-", "−") for bound in bounds)
            why = c["withheld"] or f"the 95 % interval of the difference, {low} to {high}, contains zero"
            found.append(f"Which model has the better {lower_first(c['label'])}: {why}.")
    main = main_comparison(results["comparisons"])
    if main and main["id"] == "frechet" and main["reference"]:
        share = main["reference"]["value"] / max(min(main[m]["value"] for m in MODELS), 1e-12)
        found.append(
            f"How far the videos are from real ones: at {main['reference']['n']} clips, {share:.0%} of the lower "
            "distance is that of real clips to other real ones. The kernel distance has no such bias."
        )
    found += [*results["left_out"], *results["notes"]]
    found.append(
        "How much another seed of training would change it: one training run of each model was compared, and the "
        "intervals cover the choice of clips only."
    )
    found.append("Nothing here was measured on other data, sizes or budgets.")
    return found


def lower_first(label: str) -> str:
    return label if label.startswith(("Frechet", "FVD", "CLIP")) else label[0].lower() + label[1:]


def scroll(table: str, label: str) -> str:
    """A table that scrolls sideways on narrow screens, and that the keyboard reaches."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label, quote=True)}">{table}</div>'
