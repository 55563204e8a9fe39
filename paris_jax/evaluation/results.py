"""results.json: its schema, and the sentence that names the winners.

    schema         "paris_jax/evaluation/2"
    experiment     name;  config_hash, evaluation_hash: of the training, and of sampling and scoring
    complete       false if a score had to be left out;  left_out: one sentence for each, with the reason
    notes          sentences on companions that are left out, and on degenerate videos
    protocol       name -> text or number: seeds, prompts, steps, guidance, counts, device, versions
    sweep          scores of sampling settings (systems.py), or null
    comparisons    list of {id, label, unit, better, ensemble, monolith, difference, winner, withheld, reference,
                   reference_label, note}
                     better: "lower", "higher", or null if neither direction is better;  unit: "", "share" or a name
                     difference: ensemble - monolith, paired clip by clip;  winner: "ensemble", "monolith" or "none"
                     withheld: why there is no winner though the interval excludes 0; "" otherwise
                     reference: the score of real held-out clips (floor or ceiling), or null
    companions     more rows of the same form, which the headline does not count
    loss_by_time, error_by_time
                   {edges (B + 1), ensemble [B], monolith [B], difference [B]}
    loss_by_cluster
                   {clusters [K], ensemble [K], monolith [K], difference [K]}; null for clusters without held-out clips
    attribute_accuracy      {attribute: {ensemble, monolith, reference}}, or null without attributes
    router         {edges, accuracy [B], chance, confusion [B][K][K], calibration [B], calibration_all}: by time bin;
                   chance is the share of the largest cluster; confusion counts clips by own and most likely cluster;
                   calibration: {error, log_loss, confidence, accuracy, count} (metrics/routing.py)
    experts        {experts [E], clusters [K], loss [E][K], oracle, routed, disagreement [B]}: held-out flow loss of
                   each expert on each cluster, of the expert of each clip's own cluster, and of the routed ensemble;
                   disagreement: weighted standard deviation of the experts' x0; null with one expert
    expert_use     {clusters [K], by_step [S][K], by_cluster {cluster of the prompt: [K]}}: mean routing weights
    compute        see compute.py
    shown          list of {id, caption, cluster, asked, read {model: {attribute: value}}, use [K]}; videos: report.html

Every score is {"value", "stderr", "n"} (estimates.py); n counts clips. Models are "ensemble" and "monolith"; "real"
stands for the held-out clips themselves.
"""

from collections.abc import Mapping
from typing import Any, Literal

from paris_jax.evaluation.estimates import FEWEST, Z95, Estimate, winner

SCHEMA = "paris_jax/evaluation/2"
MODELS = ("ensemble", "monolith")
Comparison = dict[str, Any]
Direction = Literal["lower", "higher"] | None


def compare(
    name: str,
    label: str,
    better: Direction,
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
    withheld = _withheld(difference, smallest) if better and won == "none" else ""
    return {
        "id": name,
        "label": label,
        "unit": unit,
        "better": better,
        **{model: by_model[model] for model in MODELS},
        "difference": difference,
        "winner": {"first": "ensemble", "second": "monolith", "none": "none"}[won],
        "withheld": withheld,
        "reference": reference,
        "reference_label": reference_label,
        "note": note,
    }


def _withheld(difference: Estimate, smallest: float) -> str:
    """Why a difference that its interval tells from 0 has no winner; "" if the interval contains 0."""
    if not abs(difference["value"]) > Z95 * difference["stderr"]:
        return ""
    if difference["n"] < FEWEST:
        return f"{difference['n']} clips are too few for a verdict, which needs {FEWEST}"
    if abs(difference["value"]) <= smallest:
        return "the difference is within the error of real clips against real clips"
    return ""


def headline(comparisons: list[Comparison]) -> str:
    """Returns one sentence on which model wins which scores, by the 95 % interval of the paired difference."""
    scored = [c for c in comparisons if c["better"]]
    if not scored:
        return "No score could be compared."
    won = {name: [_short(c) for c in scored if c["winner"] == name] for name in (*MODELS, "none")}
    first, second = sorted(MODELS, key=lambda model: -len(won[model]))
    withheld = sorted({c["withheld"] for c in scored if c["withheld"]})
    if not won[first] and withheld:
        return f"No verdict: {'; '.join(withheld)}."
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
