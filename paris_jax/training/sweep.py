"""`paris-jax sweep`: short trainings of one role with several settings, on the same clips and noise.

With learning rates, it is a learning-rate finder. Nothing is exported; the best setting belongs in the config.
"""

import dataclasses
import itertools
import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.config import files, hashing
from paris_jax.config.experiment import Experiment
from paris_jax.data.records import read_null
from paris_jax.errors import UserError
from paris_jax.training import failures, metrics, state, train
from paris_jax.training.job import Job, batch_iterator, check_role, cluster_folders, make_job, read_cluster

logger = logging.getLogger(__name__)
FACTORS = (1 / 27, 1 / 9, 1 / 3, 1.0, 3.0, 9.0)  # of the config's learning rate, the default of --vary
VARIED = ("training.", "router_training.", "network.", "router.", "diffusion.")  # fields that need no other data
SWEEP_METRIC = 0.25  # last fraction of the steps, whose mean loss is compared


@dataclasses.dataclass(frozen=True)
class Variant:
    """One combination of settings."""

    changes: tuple[str, ...]  # "training.learning_rate=0.001"
    experiment: Experiment

    @property
    def name(self) -> str:
        return ", ".join(self.changes)


def variants(experiment: Experiment, role: Role, vary: Sequence[str], steps: int) -> list[Variant]:
    """All combinations of the varied fields, each with `steps` steps.

    Args:
      vary: "training.learning_rate=1e-4,1e-3": a field and its values. Empty: learning rates around the config's.

    Raises:
      UserError: an unknown field, a field of the data, or an impossible value.
    """
    section, settings = "router_training" if role.kind == "router" else "training", experiment.settings_of(role.kind)
    if not vary:
        vary = [f"{section}.learning_rate={','.join(f'{settings.learning_rate * factor:.4g}' for factor in FACTORS)}"]
    axes = []
    for text in vary:
        field, equals, values = text.partition("=")
        if not (equals and values and field.startswith(VARIED)):
            raise UserError(
                f"--vary={text}: must be FIELD=VALUE,VALUE,... with a field of {', '.join(v[:-1] for v in VARIED)}, "
                "such as training.learning_rate=1e-4,1e-3; changes of the data need a run folder of their own"
            )
        axes.append([f"{field}={value}" for value in values.split(",")])
    # Warm-up and final decay are shortened in proportion.
    warmup = min(settings.warmup_steps * steps // experiment.steps(role.kind), steps - 1)
    short = (
        f"{section}.steps={steps}",
        f"{section}.warmup_steps={warmup}",
        f"{section}.log_every_steps={max(1, steps // 40)}",
    )
    short += (f"{section}.checkpoint_every_steps={steps}",)
    made = []
    for changes in itertools.product(*axes):
        config = experiment.to_dict()
        files.change(config, [*short, *changes])
        made.append(Variant(changes, Experiment.from_config(config)))
    same = len(made) - len({_of_role(variant.experiment, role) for variant in made})
    if same:
        raise UserError(
            f"--vary={' --vary='.join(vary)}: {same} of the {len(made)} trainings of {role.name} would be the same as "
            f"another one; vary what {'the router' if role.kind == 'router' else 'experts and monolith'} learn from "
            f"({section}, {'router' if role.kind == 'router' else 'network'}, diffusion), each value once"
        )
    return made


def _of_role(experiment: Experiment, role: Role) -> str:
    """Hash of an experiment without the fields of other roles."""
    other = ("training", "network") if role.kind == "router" else ("router_training", "router")
    default = Experiment()
    return dataclasses.replace(experiment, **{name: getattr(default, name) for name in other}).hash


def sweep(experiment: Experiment, run: RunFolder, role: Role, vary: Sequence[str], steps: int) -> dict[str, Any]:
    """Trains every variant into RUN/sweeps and prints its final loss.

    All variants see the same clips, timesteps and noise. A finished variant is not trained again, an interrupted one
    resumes.

    Returns:
      {"role", "steps", "variants": [{"changes", "loss"}], "best"}, also written to RUN/sweeps/ROLE/results.json; a loss
      is None where it was not finite.
    """
    if steps < 4:
        raise UserError(f"--steps={steps}: must be at least 4")
    check_role(experiment, role)
    with locks.only_writer(run.sweep(role)):
        return _sweep(experiment, run, role, vary, steps)


def _sweep(experiment: Experiment, run: RunFolder, role: Role, vary: Sequence[str], steps: int) -> dict[str, Any]:
    found = variants(experiment, role, vary, steps)
    folders = cluster_folders(experiment, run, role)
    data = [read_cluster(folder, experiment, run) for folder in folders]
    outcomes = []
    # Refuses an impossible variant before any is trained.
    jobs = [_job(variant, run, role, data[0]) for variant in found]
    for variant, job in zip(found, jobs, strict=True):
        loss = _train(job, folders)
        logger.info("%s: %s", variant.name, "not finite" if loss is None else f"loss {loss:.4f}")
        outcomes.append({"changes": list(variant.changes), "loss": loss})
    finite = [entry for entry in outcomes if entry["loss"] is not None]
    best = min(finite, key=lambda entry: entry["loss"])["changes"] if finite else None
    results = {"role": role.name, "steps": steps, "variants": outcomes, "best": best}
    manifest.write_json(run.sweep(role) / "results.json", results)
    _show(results)
    return results


def _job(variant: Variant, run: RunFolder, role: Role, data: Any) -> Job:
    """The job of a variant, in a folder named by its settings and initial weights."""
    job = make_job(variant.experiment, run, role, data)
    key = variant.experiment.hash
    if job.settings.init_from:
        key = hashing.hash_text(
            f"{key} {hashing.canonical_json(state.weight_hashes(job.settings.init_from, job.config))}"
        )
    return dataclasses.replace(job, name=variant.name, folder=run.sweep(role) / key[:12], steps=job.settings.steps)


def _train(job: Job, clusters: Sequence[epath.Path]) -> float | None:
    """The mean loss of the last steps, or None where it is not finite."""
    result = job.folder / "result.json"
    if result.exists():
        return manifest.read_json(result, dict[Literal["loss"], float | None]).get("loss")
    try:
        train.train(dataclasses.replace(job, null=read_null(clusters[0])), batch_iterator(job, clusters))
        lines = metrics.read(job.folder / "metrics.jsonl")
        loss = float(np.mean([line["loss"] for line in lines if line["step"] > (1 - SWEEP_METRIC) * job.steps]))
    except failures.NonFiniteLoss:
        loss = None
    manifest.write_json(result, {"loss": loss})
    return loss


def _show(results: dict[str, Any]) -> None:
    table = Table(title=f"{results['role']} after {results['steps']} steps: loss over the last {SWEEP_METRIC:.0%}")
    for heading in ("settings", "loss", ""):
        table.add_column(heading)
    for entry in sorted(results["variants"], key=lambda e: math.inf if e["loss"] is None else e["loss"]):
        loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
        table.add_row(", ".join(entry["changes"]), loss, "best" if entry["changes"] == results["best"] else "")
    console = Console()
    console.print(table)
    if results["best"]:
        flags = " ".join(f"--config.{change}" for change in results["best"])
        console.print(f"To use it, in a run folder of its own: {flags}", soft_wrap=True)
