"""`paris-jax quickstart`: runs every stage on this machine, with the roles in parallel.

Each role and each stage is a separate process, so that this one never holds a device that a role needs.
"""

import dataclasses
import math
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from etils import epath
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
    """The remaining stages before the roles, the roles, the stages after them; and the names of completed ones."""

    before: list[LocalJob]  # on the embedded data, first of all videos of the ensemble that ships with the package
    roles: dict[Role, LocalJob]  # the longest first, so that it does not run alone at the end
    after: list[LocalJob]
    done: list[str]


def quickstart(
    experiment: Experiment,
    run: RunFolder,
    config: Sequence[str] = (),
    devices: str = "auto",
    dry_run: bool = False,
    options: Mapping[str, Sequence[str]] = MappingProxyType({}),
    sample: bool = True,
) -> None:
    """Runs prepare, cluster, train (every role), assemble, sample and evaluate; resumes where it stopped.

    Args:
      experiment: config of the run.
      run: run folder of all stages.
      config: config flags of the commands; empty if RUN/config.json holds the experiment.
      devices: devices to run on, see `find_devices`.
      dry_run: prints the commands and their devices instead of running them.
      options: further flags of prepare and cluster, {"prepare": ("--data=OTHER/data",)}.
      sample: also sample `PROMPTS`, where they suit the data.

    Raises:
      UserError: a role failed, or a stage was killed; the message is its error.
      SystemExit: a stage failed and has printed its error.
      Preempted, KeyboardInterrupt: every role has saved after SIGTERM or SIGINT.
    """
    available = find_devices(devices)
    plan = make_plan(experiment, run, config, options, sample)
    groups = available.groups(*_costs(experiment, list(plan.roles)))
    stage_devices = dataclasses.replace(available, numbers=()) if available.kind == "cpu" else groups[0]
    if dry_run:
        _print_commands(plan, groups, stage_devices)
        return
    run.claim(experiment.to_dict(), experiment.hash)
    console = Console(highlight=False)
    launcher = Launcher(PROGRAM, lambda text: console.print(text, soft_wrap=True))
    times: dict[str, float] = {}
    for name in plan.done:
        console.print(f"{name}: done already")
    with launcher.listening():
        for job in plan.before:
            _stage(job, launcher, stage_devices, console, times)
        if plan.roles:
            _train(experiment, run, plan, launcher, groups, console, times)
        for job in plan.after:
            _stage(job, launcher, stage_devices, console, times)
    console.rule("[bold]done")
    console.print(_table(times))
    if experiment.data.heldout_fraction:
        console.print(f"open {run.evaluation / 'report.html'}", soft_wrap=True)
    command = shlex.join(["paris-jax", "sample", f"--ensemble={run.ensemble}", f"--prompt={PROMPTS[0]}"])
    console.print(f"sample more: {command}", soft_wrap=True)


def make_plan(
    experiment: Experiment,
    run: RunFolder,
    config: Sequence[str],
    options: Mapping[str, Sequence[str]] = MappingProxyType({}),
    sample: bool = True,
) -> JobGroups:
    """Returns the commands of all stages that are not done, and of evaluate, which detects itself that it is done."""
    workdir = f"--workdir={run}"
    stages = [("prepare", run.data), ("cluster", run.partition)]
    before = [
        LocalJob(name, (name, *config, workdir, *options.get(name, ())), preflight=True)
        for name, folder in stages
        if not manifest.exists(folder)
    ]
    *others, monolith = roles(experiment.clustering.num_clusters)
    todo = {
        role: LocalJob(
            role.name, ("train", *config, workdir, *role.arguments.split()), _log(experiment, run, role), preflight=True
        )
        for role in (monolith, *others)
        if not manifest.exists(run.export(role))
    }
    shapes = sample and experiment.data.source == "shapes"  # the prompts are about shapes
    if shapes and todo and not _samples(run, "bundled").exists():
        before.insert(0, _sample("first videos", run, "bundled", "bundled:shapes"))
    after = []
    if todo or not manifest.exists(run.ensemble):
        after.append(LocalJob("assemble", ("assemble", *config, workdir), preflight=True))
    if shapes and (after or not _samples(run, "quickstart").exists()):
        folders = [f"--{name}={folder}" for name, folder in experiment.encoders.items()]
        after.append(_sample("sample", run, "quickstart", run.ensemble, *folders))
    if experiment.data.heldout_fraction:
        after.append(LocalJob("evaluate", ("evaluate", *config, workdir), preflight=True))
    remaining = {job.name for job in (*before, *todo.values(), *after)}
    names = ["prepare", "cluster", *(role.name for role in (monolith, *others)), "assemble"]
    return JobGroups(before, todo, after, [name for name in names if name not in remaining])


def _samples(run: RunFolder, name: str) -> epath.Path:
    return run.samples / f"{name}.mp4"


def _sample(name: str, run: RunFolder, video: str, ensemble: epath.PathLike, *flags: str) -> LocalJob:
    """The job that samples one grid of `PROMPTS`."""
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    out = f"--out={_samples(run, video)}"
    return LocalJob(name, ("sample", f"--ensemble={ensemble}", *flags, *prompts, out, "--grid", "--overwrite"))


def _costs(experiment: Experiment, todo: Sequence[Role]) -> tuple[list[float], int]:
    """The clips that each role trains on, and a number that divides all their batches."""
    settings = [experiment.settings_of(role.kind) for role in todo]
    work = [float(experiment.steps(r.kind) * s.global_batch_size) for r, s in zip(todo, settings, strict=True)]
    return work, math.gcd(*(s.global_batch_size for s in settings))


def _log(experiment: Experiment, run: RunFolder, role: Role) -> Path:
    """Returns a role's log file: in its folder or, as files in a bucket cannot be appended to, in the temporary one."""
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
    sizes = [str(len(group.numbers)) for group in groups]
    each = f", {sizes[0] if len(set(sizes)) == 1 else ' + '.join(sizes)} {kind}(s) each" if groups[0].numbers else ""
    schedule = f"{len(groups)} side by side{each}" if len(groups) > 1 else "in turn"
    console.rule(f"[bold]train[/bold]: {len(plan.roles)} isolated processes, {schedule}  {sum(times.values()):.0f} s")
    began = time.perf_counter()
    with RoleBars(console, launcher, experiment, run, list(plan.roles)) as bars:
        launcher.run_side_by_side(list(plan.roles.values()), groups, bars.update)
    _check(launcher)
    times["train"] = time.perf_counter() - began
    for job in plan.roles.values():
        console.print(
            f"{job.name} was trained in {launcher.seconds[job.name]:.0f} s; its log: {job.log}", soft_wrap=True
        )


def _check(launcher: Launcher) -> None:
    """Raises the error of a launcher that stopped early."""
    failure = launcher.failure
    if failure and (failure.job.log or failure.code < 0):
        log = f" (its log: {failure.job.log})" if failure.job.log else ""
        raise UserError(f"{failure}{log}; fix that, then run the same command again: completed work is saved")
    if failure:
        raise SystemExit(1)  # the stage has printed its error on this terminal
    if launcher.stopped_by == signal.SIGINT:
        raise KeyboardInterrupt
    if launcher.stopped_by:
        raise Preempted("all running jobs have saved their state")


def _table(times: dict[str, float]) -> Table:
    table = Table("stage", "seconds")
    table.columns[1].justify = "right"
    for name, seconds in times.items():
        table.add_row(name, f"{seconds:.0f}")
    table.add_section()
    table.add_row("all", f"{sum(times.values()):.0f}")
    return table


def _print_commands(plan: JobGroups, groups: Sequence[Devices], stage_devices: Devices) -> None:
    jobs = list(plan.roles.values())
    blocks = [[job.command_on(stage_devices) for job in plan.before]]
    if jobs:
        commands = [job.command_on(devices) for devices, job in zip(groups, jobs, strict=False)]
        title = f"# {len(groups)} side by side:" if len(groups) > 1 else "# in turn:"
        blocks.append([title, *commands])
        if waiting := jobs[len(groups) :]:
            comment = ["# then, each on the next free group of devices:"] if len(groups) > 1 else []
            rest = [str(job) if len(groups) > 1 else job.command_on(groups[0]) for job in waiting]
            blocks[-1] += [*comment, *rest]
    blocks.append([job.command_on(stage_devices) for job in plan.after])
    print("\n\n".join("\n".join(block) for block in blocks if block))
