"""`paris-jax status`: finished and missing steps of a run, and the next command."""

import shlex

from rich.console import Console
from rich.table import Table

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder, roles
from paris_jax.config.experiment import Experiment
from paris_jax.training import metrics


def status(run: RunFolder) -> list[tuple[str, str, str]]:
    """Prints the state of every step and the next command; returns (step, state, its command) for each."""
    experiment = Experiment.from_config(run.stored_config().config)
    clusters = experiment.clustering.num_clusters
    workdir = shlex.quote(f"--workdir={run}")
    rows = [
        ("prepare", _state(manifest.exists(run.data), run.data.exists()), f"prepare {workdir}"),
        ("cluster", _state(manifest.exists(run.partition), run.partition.exists()), f"cluster {workdir}"),
    ]
    for role in roles(clusters):
        newest = metrics.newest(run.metrics(role))
        reached = f"step {newest['step']} of {experiment.steps(role.kind)}" if newest else "begun"
        state = _state(manifest.exists(run.export(role)), run.role(role).exists(), reached)
        rows.append((f"train {role.name}", state, f"train {workdir} {role.arguments}"))
    rows.append(("assemble", _state(manifest.exists(run.ensemble), False), f"assemble {workdir}"))
    if experiment.data.heldout_fraction:  # without held-out clips, there is nothing to evaluate on
        rows.append(
            ("evaluate", _state(manifest.exists(run.evaluation), run.evaluation.exists()), f"evaluate {workdir}")
        )

    console = Console(highlight=False)
    table = Table("stage", "state", title=f"{run} ({experiment.name}, config {experiment.hash[:12]})")
    for stage, state, _ in rows:
        table.add_row(stage, f"[green]{state}" if state == "done" else f"[yellow]{state}")
    console.print(table)
    todo = [command for _, state, command in rows if state != "done"]
    after = f"next: paris-jax {todo[0]}" if todo else f"all done: see {run.evaluation / 'report.html'}"
    console.print(after, soft_wrap=True)
    return rows


def _state(done: bool, begun: bool, reached: str = "begun") -> str:
    return "done" if done else reached if begun else "missing"
