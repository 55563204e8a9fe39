"""results.json: its schema, and the sentence that names the winners.

    schema         "paris_jax/evaluation/1"
    experiment     name;  config_hash, evaluation_hash: what was trained, and how it was sampled and scored
    complete       false if a score had to be left out;  left_out: one sentence for each, with the reason
    protocol       name -> text or number: seeds, prompts, steps, guidance, counts, device, versions
    comparisons    list of {id, label, unit, better, ensemble, monolith, difference, winner, reference,
                   reference_label, note}
                     better: "lower", "higher", or null if neither direction is better;  unit: "", "share" or a name
                     difference: ensemble - monolith, paired clip by clip;  winner: "ensemble", "monolith" or "none"
                     reference: the score of real held-out clips (floor or ceiling), or null
    loss_by_time, error_by_time
                   {edges (B + 1), ensemble [B], monolith [B], difference [B]}
    loss_by_cluster
                   {clusters [K], ensemble [K], monolith [K], difference [K]}; null for clusters without held-out clips
    attribute_accuracy      {attribute: {ensemble, monolith, reference}}, or null without attributes
    router         {edges, accuracy [B], chance}: accuracy by time bin; chance is the share of the largest cluster
    expert_use     {clusters [K], by_step [S][K], by_cluster {cluster of the prompt: [K]}}: mean routing weights
    compute        see compute.py
    shown          list of {id, caption, cluster, asked, read {model: {attribute: value}}, use [K]}; videos: report.html

Every score is {"value", "stderr", "n"} (estimates.py); n counts clips. Models are "ensemble" and "monolith"; "real"
stands for the held-out clips themselves.
"""

from collections.abc import Mapping
from typing import Any, Literal

from paris_jax.evaluation.estimates import Estimate, winner

SCHEMA = "paris_jax/evaluation/1"
MODELS = ("ensemble", "monolith")
Comparison = dict[str, Any]


def compare(
    name: str,
    label: str,
    better: Literal["lower", "higher"] | None,
    by_model: Mapping[str, Estimate],
    difference: Estimate,
    *,
    unit: str = "",
    reference: Estimate | None = None,
    reference_label: str = "",
    note: str = "",
    smallest: float = 0.0,
) -> Comparison:
    """Returns one row of `comparisons` (fields: see the module); a difference of at most `smallest` has no winner."""
    won = winner(difference, better) if better and abs(difference["value"]) > smallest else "none"
    return {
        "id": name,
        "label": label,
        "unit": unit,
        "better": better,
        **{model: by_model[model] for model in MODELS},
        "difference": difference,
        "winner": {"first": "ensemble", "second": "monolith", "none": "none"}[won],
        "reference": reference,
        "reference_label": reference_label,
        "note": note,
    }


def headline(comparisons: list[Comparison]) -> str:
    """Returns one sentence on which model wins which scores, by the 95 % interval of the paired difference."""
    scored = [c for c in comparisons if c["better"]]
    if not scored:
        return "No score could be compared."
    won = {name: [_short(c) for c in scored if c["winner"] == name] for name in (*MODELS, "none")}
    first, second = sorted(MODELS, key=lambda model: -len(won[model]))
    if not won[first]:
        return f"No clear winner: ensemble and monolith are within error on all {len(scored)} scores."
    if len(won[first]) == len(scored):
        return f"The {first} wins on every score: {_join(won[first])}."
    sentence = f"The {first} wins on {_join(won[first])}"
    if won[second]:
        sentence += f", the {second} on {_join(won[second])}"
    return sentence + (f"; no clear winner on {_join(won['none'])}." if won["none"] else ".")


def format_estimate(estimate: Estimate | None, unit: str = "", signed: bool = False) -> str:
    """Formats value and standard error with as many digits as the error supports: "0.482 ± 0.006", "71.9 ± 4.6 %"."""
    if estimate is None:
        return "–"
    scale = 100 if unit == "share" else 1
    value, error = estimate["value"] * scale, estimate["stderr"] * scale
    digits = 1 if unit == "share" else decimals(error or abs(value) / 100)
    text = f"{value:{'+' if signed else ''}.{digits}f} ± {error:.{digits}f}"
    suffix = {"share": " points" if signed else " %"}.get(unit, "")
    return text.replace("-", "−") + suffix


def decimals(error: float) -> int:
    """Returns the number of decimals that shows two digits of `error`, at most 5."""
    for digits in range(5):
        if error * 10**digits >= 9.5:
            return digits
    return 5


def _short(c: Comparison) -> str:
    label = c["label"]
    return label if label.startswith("Frechet") else label[0].lower() + label[1:]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
