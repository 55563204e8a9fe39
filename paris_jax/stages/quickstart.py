"""`paris-jax quickstart`: every stage on this machine, on the embedded data."""

import logging
import time

from rich.console import Console

from paris_jax.experiment import Experiment
from paris_jax.run_folder import RunFolder, roles
from paris_jax.stages.assemble import assemble
from paris_jax.stages.cluster import cluster
from paris_jax.stages.evaluate import evaluate
from paris_jax.stages.prepare import prepare
from paris_jax.stages.sample import sample
from paris_jax.stages.train import train

logger = logging.getLogger(__name__)

PROMPTS = (
    "a large red circle moving right fast on a white ground",
    "a large blue striped ball circling clockwise fast on a sandy ground",
    "a large yellow digit three drifting up left slowly on a black ground",
)


def quickstart(experiment: Experiment, run: RunFolder) -> None:
    """Runs prepare, cluster, train (every role), assemble, sample and evaluate; goes on where it was stopped."""
    console = Console(highlight=False)
    began = time.perf_counter()

    def heading(title: str) -> None:
        console.rule(f"[bold]{title}[/bold]  {time.perf_counter() - began:.0f} s")

    heading("prepare: clips to latents, words and features")
    prepare(experiment, run)
    heading("cluster: features to isolated data folders")
    cluster(experiment, run)
    for role in roles(experiment.partition.num_clusters):
        heading(f"train: {role.name}")
        train(experiment, run, role)
    heading("assemble: admission of the experts and the router")
    assemble(experiment, run)
    heading("sample")
    sample(str(run.ensemble), PROMPTS, str(run.samples / "quickstart.mp4"))
    heading("evaluate: ensemble and monolith side by side")
    evaluate(experiment, run)
    heading("done")
    console.print(f"open {run.evaluation / 'report.html'}", soft_wrap=True)
    console.print(f"go on: paris-jax sample --ensemble={run.ensemble} --prompt='{PROMPTS[0]}'", soft_wrap=True)
