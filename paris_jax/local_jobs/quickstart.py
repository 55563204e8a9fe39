"""`paris-jax quickstart`: every stage on this machine, the roles side by side, each a process of its own.

Stages are processes too, so that this one never holds a device that a role needs.
"""

import dataclasses
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import Role, RunFolder, roles
from paris_jax.config.experiment import Experiment
from paris_jax.errors import Preempted, UserError
from paris_jax.local_jobs.devices import Devices, find_devices
from paris_jax.local_jobs.launcher import Launcher, LocalJob
from paris_jax.local_jobs.progress import RoleBars

PROMPTS = (
    "a large red circle moving right fast on a white ground",
    "a large blue striped ball circling clockwise fast on a sandy ground",
    "a large yellow digit three drifting up left slowly on a black ground",
)
PROGRAM = (sys.executable, "-m", "paris_jax")


@dataclasses.dataclass(frozen=True)
class JobGroups:
    """The remaining work: stages before the roles, the roles, stages after them; and the completed stages."""

    before: list[LocalJob]
    roles: dict[Role, LocalJob]  # the longest first, so that none is left to run alone at the end
    after: list[LocalJob]
    done: list[str]


def quickstart(
    experiment: Experiment, run: RunFolder, config: Sequence[str] = (), devices: str = "auto", dry_run: bool = False
) -> None:
    """Runs prepare, cluster, train (every role), assemble, sample and evaluate; resumes where it stopped.

    Args:
      config: the flags that give a command this experiment; none where RUN/config.json holds it.
      devices: what to run on, see `find_devices`.
      dry_run: print the commands and their devices, run nothing.

    Raises:
      UserError: a role failed, with its own message.
      Preempted, KeyboardInterrupt: after SIGTERM or SIGINT, when every role has saved.
    """
    found = find_devices(devices)
    plan = make_plan(experiment, run, config)
    groups = found.groups(len(plan.roles))
    whole = dataclasses.replace(found, numbers=()) if found.kind == "cpu" else groups[0]
    if dry_run:
        _print_commands(plan, groups, whole)
        return
    run.claim(experiment.to_dict(), experiment.hash)
    console = Console(highlight=False)
    launcher = Launcher(PROGRAM, lambda text: console.print(text, soft_wrap=True))
    times: dict[str, float] = {}
    for name in plan.done:
        console.print(f"{name}: done already")
    with launcher.listening():
        for job in plan.before:
            _stage(job, launcher, whole, console, times)
        if plan.roles:
            _train(experiment, run, plan, launcher, groups, console, times)
        for job in plan.after:
            _stage(job, launcher, whole, console, times)
    console.rule("[bold]done")
    console.print(_table(times))
    if experiment.data.heldout_fraction:
        console.print(f"open {run.evaluation / 'report.html'}", soft_wrap=True)
    again = shlex.join(["paris-jax", "sample", f"--ensemble={run.ensemble}", f"--prompt={PROMPTS[0]}"])
    console.print(f"go on: {again}", soft_wrap=True)


def make_plan(experiment: Experiment, run: RunFolder, config: Sequence[str]) -> JobGroups:
    """The commands of every stage that is not done; the evaluation, which knows best whether it is, is always there."""
    workdir = f"--workdir={run}"
    stages = [("prepare", run.data), ("cluster", run.partition)]
    before = [LocalJob(name, (name, *config, workdir)) for name, folder in stages if not manifest.exists(folder)]
    *others, monolith = roles(experiment.clustering.num_clusters)
    todo = {
        role: LocalJob(role.name, ("train", *config, workdir, *role.arguments.split()), _log(experiment, run, role))
        for role in (monolith, *others)
        if not manifest.exists(run.export(role))
    }
    after = []
    if todo or not manifest.exists(run.ensemble):
        after.append(LocalJob("assemble", ("assemble", *config, workdir)))
    shown = run.samples / "quickstart.mp4"
    if experiment.data.source == "shapes" and (after or not shown.exists()):  # the prompts are about shapes
        prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
        encoders = [f"--{name}={folder}" for name, folder in experiment.encoders.items()]
        after.append(
            LocalJob(
                "sample",
                (
                    "sample",
                    f"--ensemble={run.ensemble}",
                    *encoders,
                    *prompts,
                    f"--out={shown}",
                    "--grid",
                    "--overwrite",
                ),
            )
        )
    if experiment.data.heldout_fraction:
        after.append(LocalJob("evaluate", ("evaluate", *config, workdir)))
    left = {job.name for job in (*before, *todo.values(), *after)}
    everything = ["prepare", "cluster", *(role.name for role in (monolith, *others)), "assemble"]
    return JobGroups(before, todo, after, [name for name in everything if name not in left])


def _log(experiment: Experiment, run: RunFolder, role: Role) -> Path:
    """Where a role's output goes: into its folder or, where that is a bucket, which cannot be added to, into /tmp."""
    if "://" not in str(run):
        return Path(run.log(role))
    return Path(tempfile.gettempdir()) / f"paris_jax-{experiment.hash[:12]}" / f"{role.name.replace(' ', '-')}.log"


def _stage(job: LocalJob, launcher: Launcher, devices: Devices, console: Console, times: dict[str, float]) -> None:
    console.rule(f"[bold]{job.name}[/bold]  {sum(times.values()):.0f} s")
    launcher.run(job, devices)
    _check(launcher)
    times[job.name] = launcher.seconds[job.name]


def _train(
    experiment: Experiment,
    run: RunFolder,
    plan: JobGroups,
    launcher: Launcher,
    groups: Sequence[Devices],
    console: Console,
    times: dict[str, float],
) -> None:
    kind = {"cpu": "core", "gpu": "GPU", "tpu": "chip"}[groups[0].kind]
    each = f", {len(groups[0].numbers)} {kind}(s) each" if groups[0].numbers else ""
    how = f"{len(groups)} side by side{each}" if len(groups) > 1 else "in turn"
    console.rule(f"[bold]train[/bold]: {len(plan.roles)} isolated processes, {how}  {sum(times.values()):.0f} s")
    began = time.perf_counter()
    with RoleBars(console, launcher, experiment, run, list(plan.roles)) as bars:
        launcher.run_side_by_side(list(plan.roles.values()), groups, bars.update)
    _check(launcher)
    times["train"] = time.perf_counter() - began
    for job in plan.roles.values():
        console.print(
            f"{job.name} is trained in {launcher.seconds[job.name]:.0f} s; its log: {job.log}", soft_wrap=True
        )


def _check(launcher: Launcher) -> None:
    """Raises the failure that ended a launcher early."""
    failure = launcher.failure
    if failure and (failure.job.log or failure.code < 0):
        log = f" (its log: {failure.job.log})" if failure.job.log else ""
        raise UserError(f"{failure}{log}; when that is mended, run the same command again: the rest is saved")
    if failure:
        raise SystemExit(1)  # it has said why on this terminal
    if launcher.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if launcher.stopped_by:
        raise Preempted("everything that was running has saved its state")


def _table(times: dict[str, float]) -> Table:
    table = Table("stage", "seconds")
    table.columns[1].justify = "right"
    for name, seconds in times.items():
        table.add_row(name, f"{seconds:.0f}")
    table.add_section()
    table.add_row("all", f"{sum(times.values()):.0f}")
    return table


def _print_commands(plan: JobGroups, groups: Sequence[Devices], whole: Devices) -> None:
    jobs = list(plan.roles.values())
    blocks = [[f"{whole} {job}" for job in plan.before]]
    if jobs:
        commands = [f"{devices} {job}" for devices, job in zip(groups, jobs, strict=False)]
        title = f"# {len(groups)} side by side:" if len(groups) > 1 else "# in turn:"
        blocks.append([title, *commands])
        if waiting := jobs[len(groups) :]:
            then = ["# then, each on the devices of the first that is done:"] if len(groups) > 1 else []
            same = "" if len(groups) > 1 else f"{groups[0]} "
            blocks[-1] += [*then, *(f"{same}{job}" for job in waiting)]
    blocks.append([f"{whole} {job}" for job in plan.after])
    print("\n\n".join("\n".join(block) for block in blocks if block))
