"""Writes report.html: one self-contained page, made from results.json and a few videos.

The fixed text is in report.html beside this file. Styles, script, plots and videos are inlined, and a content security
policy forbids every request, so the page looks the same by mail, from a bucket or in ten years.
"""

import html
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.data import pages
from paris_jax.evaluation import plots, report_sections
from paris_jax.evaluation.plots import Series
from paris_jax.evaluation.results import MODELS, Comparison, format_estimate, headline

ON_FIRST_SCREEN = 2  # clips
LABELS = {"real": "real clip", "ensemble": "ensemble", "monolith": "monolith"}  # the columns of videos, in order


def write_report(
    results: Mapping[str, Any], videos: Mapping[str, np.ndarray], path: epath.PathLike, fps: float
) -> None:
    """Writes the report as one HTML file.

    Args:
      results: contents of results.json, as described in results.py.
      videos: model ("real", "ensemble", "monolith") -> (n, T, H, W, 3) uint8, the n clips of results["shown"].
      path: path of the .html file.
      fps: frames per second of the videos.
    """
    manifest.write_atomically(path, render(results, videos, fps))


def render(results: Mapping[str, Any], videos: Mapping[str, np.ndarray], fps: float) -> str:
    """Returns the page as HTML text; see `write_report`."""
    compute, accuracy = results["compute"], results["attribute_accuracy"]
    experts = results["expert_use"]["clusters"]
    marks = [(f"expert {k}", _part(i)) for i, k in enumerate(experts)]
    return _template("report.html").substitute(
        style=pages.style(),
        script=pages.script(),
        experiment=html.escape(results["experiment"]),
        headline=html.escape(headline(results["comparisons"])),
        num_experts=len(compute["experts"]),
        number=report_sections.number(results),
        first_cards="".join(
            _card(i, clip, videos, fps, experts) for i, clip in enumerate(results["shown"][:ON_FIRST_SCREEN])
        ),
        same_compute="with the same training compute" if compute["equal"] else "with different training compute",
        prompts=html.escape(str(results["protocol"]["prompts"])),
        left_out="".join(f'<p class="warning">{html.escape(reason)}</p>' for reason in results["left_out"]),
        tiles="".join(_tile(c) for c in _first(results["comparisons"])),
        score_rows="".join(map(_score_row, results["comparisons"])),
        companion_rows="".join(map(_score_row, results["companions"])),
        ticks_explained=""
        if accuracy is None
        else "Under each, the predicted attributes: ✓ as in the prompt, ✗ otherwise.",
        more_clips=_more_clips(results["shown"], videos, fps, experts),
        attribute_accuracy="" if accuracy is None else _attribute_accuracy(accuracy),
        model_legend=plots.legend([(model, model) for model in MODELS]),
        expert_legend=plots.legend(marks),
        **_losses(results),
        **_routing(results, [name for name, _ in marks]),
        experts_alone=report_sections.experts(results),
        sweep=report_sections.sweep(results["sweep"]),
        open_questions="".join(f"<li>{html.escape(q)}</li>" for q in report_sections.open_questions(results)),
        compute_said=_compute_sentence(compute),
        compute_rows=_compute_rows(compute),
        protocol="".join(_entry(name, value) for name, value in results["protocol"].items()),
        config_hash=html.escape(results["config_hash"][:16]),
        schema=html.escape(results["schema"]),
    )


def _more_clips(shown: Sequence[Any], videos: Mapping[str, np.ndarray], fps: float, experts: Sequence[int]) -> str:
    """The clips that the first screen does not show; "" if it shows all."""
    cards = [_card(i, clip, videos, fps, experts) for i, clip in enumerate(shown) if i >= ON_FIRST_SCREEN]
    return _template("report_clips.html").substitute(cards="".join(cards)) if cards else ""


def _template(name: str) -> string.Template:
    return string.Template(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _part(index: int) -> str:
    return f"part{index % 8}"


def _first(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Returns the three scores shown at the top of the page."""
    return [c for c in comparisons if c["better"]][:3]


def _tile(c: Comparison) -> str:
    def figure(model: str) -> str:
        value, _, error = format_estimate(c[model], c["unit"]).partition(" ± ")
        percent = "\u2009%" if c["unit"] == "share" else ""
        return f'<dt class="{model}">{model}</dt><dd>{value}{percent}<small> ± {error.removesuffix(" %")}</small></dd>'

    return (
        f'<section class="tile"><h3>{html.escape(c["label"])}</h3><dl>{figure("ensemble")}{figure("monolith")}</dl>'
        f'{_pill(c)} <span class="note">{c["better"]} is better</span></section>'
    )


def _pill(c: Comparison) -> str:
    reason = f"<small>{html.escape(c['withheld'])}</small>" if c["withheld"] else ""
    return f'<span class="pill {c["winner"]}">{report_sections.verdict(c)}</span>{reason}'


def _score_row(c: Comparison) -> str:
    aside = [f"{c['better']} is better" if c["better"] else "no better direction", c["note"]]
    label = c["label"] + (f", {c['unit']}" if c["unit"] not in ("", "share") else "")
    reference = f"<small>{html.escape(c['reference_label'])}</small>" if c["reference"] else ""
    difference = f"<small>{format_estimate(c['difference'], c['unit'], signed=True)}</small>"
    pill = _pill(c) if c["better"] else '<span class="note">not scored</span>'
    picture = plots.interval(c["difference"], c["better"], c["winner"]) if c["better"] else ""
    return (
        f"<tr><td>{html.escape(label)}<small>{html.escape('; '.join(filter(None, aside)))}</small></td>"
        + "".join(f'<td class="number">{format_estimate(c[model], c["unit"])}</td>' for model in MODELS)
        + f'<td class="number">{format_estimate(c["reference"], c["unit"])}{reference}</td>'
        f'<td class="middle">{picture}{difference}</td>'
        f"<td>{pill}</td></tr>"
    )


def _card(
    index: int, clip: Mapping[str, Any], videos: Mapping[str, np.ndarray], fps: float, experts: Sequence[int]
) -> str:
    figures = []
    for model in (label for label in LABELS if label in videos):
        address = pages.video_address(np.asarray(videos[model][index]), fps)
        expected, predicted = clip["asked"], clip["read"].get(model)
        correct = sum(predicted[name] == value for name, value in expected.items()) if predicted else 0
        score = f"<span>{correct}/{len(expected)}</span>" if predicted else ""
        figures.append(
            f'<figure class="{model}"><video muted loop playsinline preload="auto" aria-label="{LABELS[model]}"'
            f' src="{address}"></video><figcaption><span>{LABELS[model]}</span>{score}</figcaption>'
            f"{_ticks(expected, predicted) if predicted else ''}</figure>"
        )
    experts_used = ", ".join(f"expert {k} {u:.0%}" for k, u in zip(experts, clip["use"], strict=True) if u >= 0.005)
    return (
        f'<article class="card"><h3>{html.escape(clip["caption"])}</h3><div class="row">{"".join(figures)}</div>'
        f'{_use_bar(clip["use"])}<p class="use-label">from cluster {clip["cluster"]}, sampled by {experts_used}</p>'
        "</article>"
    )


def _ticks(expected: Mapping[str, str], predicted: Mapping[str, str]) -> str:
    items = []
    for name, value in expected.items():
        style = "right" if predicted[name] == value else "wrong"
        title = html.escape(f"{name}: prompt {value}, predicted {predicted[name]}")
        items.append(f'<li class="{style}" title="{title}">{html.escape(predicted[name])}</li>')
    return f'<ul class="ticks">{"".join(items)}</ul>'


def _use_bar(use: Sequence[float]) -> str:
    parts = (f'<i class="{_part(i)}" style="width:{100 * u:.1f}%"></i>' for i, u in enumerate(use))
    return f'<div class="use">{"".join(parts)}</div>'


def _attribute_accuracy(by_attribute: Mapping[str, Any]) -> str:
    names = [name for name in by_attribute if name != "all"]
    columns = {"real clips": ("real", "reference"), **{model: (model, model) for model in MODELS}}
    series = [Series(label, style, [by_attribute[n][key] for n in names]) for label, (style, key) in columns.items()]
    rows = []
    for name, scores in by_attribute.items():
        cells = "".join(
            f'<td class="number">{format_estimate(scores[key], "share")}</td>' for _, key in columns.values()
        )
        rows.append(f"<tr><td>{'<b>all at once</b>' if name == 'all' else html.escape(name)}</td>{cells}</tr>")
    return _template("report_attributes.html").substitute(
        legend=plots.legend([(s.name, s.style) for s in series]),
        plot=plots.bars("Accuracy by attribute", names, series, "accuracy", "share"),
        rows="".join(rows),
    )


def _losses(results: Mapping[str, Any]) -> dict[str, str]:
    time, error, cluster = results["loss_by_time"], results["error_by_time"], results["loss_by_cluster"]
    return {
        "loss_by_time": plots.lines(
            "Flow loss by time", [Series(model, model, time[model]) for model in MODELS], time["edges"], "flow loss"
        ),
        "difference_legend": plots.legend(
            [("ensemble better", "ensemble"), ("monolith better", "monolith"), ("within error", "neutral")]
        ),
        "difference_by_time": plots.differences(
            "Flow loss by time, ensemble minus monolith", time["difference"], time["edges"], "ensemble − monolith"
        ),
        "error_by_time": plots.lines(
            "Velocity error by time",
            [Series(model, model, error[model]) for model in MODELS],
            error["edges"],
            "velocity error",
        ),
        "loss_by_cluster": plots.bars(
            "Flow loss by cluster",
            [f"cluster {k}" for k in cluster["clusters"]],
            [Series(model, model, cluster[model]) for model in MODELS],
            "flow loss",
        ),
    }


def _routing(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    router, use = results["router"], results["expert_use"]
    rows = []
    for cluster, row in use["by_cluster"].items():
        shares = " · ".join(f"{share:.0%}" for share in row)
        rows.append(f'<tr><td>cluster {cluster}</td><td>{_use_bar(row)}</td><td class="number">{shares}</td></tr>')
    series = Series("router", "ensemble", router["accuracy"])
    return {
        "router_plot": plots.lines(
            "Router accuracy by time", [series], router["edges"], "accuracy", "share", mark=router["chance"]
        ),
        "chance": f"{router['chance']:.0%}",
        "use_by_step": plots.shares("Expert use by step", names, use["by_step"], "solver step  (noise to clip)"),
        "use_by_cluster": "".join(rows),
    }


def _compute_sentence(compute: Mapping[str, Any]) -> str:
    if compute["equal"]:
        text = "The sum over the experts and the monolith’s are <b>equal</b>, to the last operation."
    else:
        text = f"<b>Not equal</b>: the experts spent {compute['ratio']:.4f} times the monolith’s compute."
    if compute["router"]:
        share = compute["router"]["total"] / compute["monolith"]["total"]
        text += f" The router’s training comes on top ({share:.1%} of the monolith’s) and is not in the sum."
    return text


def _compute_rows(compute: Mapping[str, Any]) -> str:
    def row(job: Mapping[str, Any], style: str = "") -> str:
        cells = (html.escape(job["name"]), f"{job['steps']:,}", f"{job['batch']:,}", f"{job['flops']:,}")
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells[1:])
        return f'<tr class="{style}"><td>{cells[0]}</td>{numbers}<td class="number">{job["total"]:,}</td></tr>'

    total = f'<td colspan="4">sum over the experts</td><td class="number">{compute["experts_total"]:,}</td>'
    rows = [*map(row, compute["experts"]), f'<tr class="sum">{total}</tr>', row(compute["monolith"], "sum")]
    return "".join(rows + ([row(compute["router"], "aside")] if compute["router"] else []))


def _entry(name: str, value: Any) -> str:
    return f"<dt>{html.escape(name)}</dt><dd>{html.escape(_format(value))}</dd>"


def _format(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_format(v)}" for k, v in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)
