"""SLURM: one job for each stage, ordered by dependencies, each queued at most once."""

import dataclasses
import shlex
from collections.abc import Iterator

from paris_jax.config.fields import setting
from paris_jax.errors import UserError
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.stages import LauncherSettings, Plan, Stage

ACTIONS = {
    "submit": "queues every stage that is not queued yet",
    "status": "prints the queued and running jobs",
    "logs": "prints the last lines of the jobs' logs",
    "stop": "cancels the jobs; those that train save first",
}
DEFAULT_ACTION = "submit"
LOGS = "slurm-{}-*.log"


@dataclasses.dataclass(frozen=True)
class Settings(LauncherSettings):
    """Flags of this launcher."""

    nodes: int = setting(1, "nodes of each role", at_least=1)
    gpus: int = setting(1, "GPUs, and so processes, of each of these nodes", at_least=1)
    sbatch: str = setting("", "further options of every sbatch, such as --partition=gpu --time=24:00:00")


def launch(
    action: str, plan: Plan, settings: Settings, commands: Commands, role: str = "", follow: bool = False
) -> None:
    # Jobs that are shown or stopped may have been submitted as an array.
    plan = plan.with_prepare_workers(settings.prepare_workers if action == "submit" else 2).only(role)
    if action == "submit":
        commands.require("sbatch", "run this on a login node of the SLURM cluster")
        if commands.dry_run:
            commands.say(script(plan, settings))
        elif not commands.run(["bash"], script(plan, settings) + "\n"):
            raise UserError("a job could not be submitted; the error of sbatch is above")
        return
    names = ",".join(plan.job_name(stage) for stage in plan.stages)
    if action == "status":
        commands.must_run(["squeue", "--me", f"--name={names}", "--format=%.10i %.24j %.10T %.12M %R"])
    elif action == "logs":
        patterns = " ".join(LOGS.format(shlex.quote(plan.job_name(stage))) for stage in plan.stages)
        commands.run(["bash", "-c", f"shopt -s nullglob; tail -n 20 {'-F ' * follow}{patterns} </dev/null"])
    else:
        # A job that saves after SIGTERM would put itself back into the queue.
        commands.must_run(["bash", "-c", "\n".join(_stop(names))])


def _stop(names: str) -> Iterator[str]:
    yield f"jobs=$(squeue --me --noheader --name={shlex.quote(names)} --format=%A)"
    yield 'for job in $jobs; do scontrol update "jobid=$job" requeue=0; done'
    yield '[ -z "$jobs" ] || scancel --signal=TERM $jobs'
    yield '[ -z "$jobs" ] || scancel --state=PENDING $jobs'


FUNCTIONS = """\
set -euo pipefail
# queued NAME: prints the number of the job of this name that has not ended.
queued() { squeue --me --noheader --name="$1" --states=PENDING,RUNNING,SUSPENDED --format=%A | head -n 1; }
# submit VARIABLE NAME OPTION...: submits a job unless one of its name is queued, and notes the job's number.
submit() {
  local id
  id=$(queued "$2")
  if [ -n "$id" ]; then
    echo "$2 is queued already ($id)"
  else
    id=$(sbatch --parsable --job-name="$2" "${@:3}")
  fi
  printf -v "$1" %s "${id%%;*}"
}
"""


def script(plan: Plan, settings: Settings) -> str:
    """The bash script that submits the jobs; it leaves out those that are queued or running already."""
    lines, names = [], {stage.name for stage in plan.stages}
    for stage in plan.stages:
        # A single role waits for the stages before it only where they are queued.
        earlier = [name for name in stage.after if name not in names]
        lines += [f"{_variable(name)}=$(queued {shlex.quote(f'{plan.name}-{name}')})" for name in earlier]
        after = [f'--dependency="afterok:{":".join(f"${_variable(name)}" for name in stage.after)}"'] * bool(
            stage.after
        )
        if earlier:
            after = [f"${{{_variable(name)}:+--dependency=afterok:${_variable(name)}}}" for name in earlier]
        lines.append(_submit(plan, stage, after, settings))
    return "\n".join([FUNCTIONS, *lines, f'echo "Submitted; the last job is ${_variable(plan.stages[-1].name)}"'])


def _submit(plan: Plan, stage: Stage, after: list[str], settings: Settings) -> str:
    """The line that submits one stage. JAX expects one process for each GPU, each of which sees all of its node."""
    nodes, gpus = (settings.nodes, settings.gpus) if stage.is_role else (1, int(stage.needs_accelerator))
    options = [f"--nodes={nodes}", f"--ntasks-per-node={max(gpus, 1)}"]
    options += [f"--gpus-per-node={gpus}"] if gpus else []
    options += [f"--array=0-{stage.workers - 1}"] if stage.workers > 1 else []
    # --signal: a job that nears its time limit saves. --requeue: SLURM brings preempted jobs back.
    options += ["--requeue", "--open-mode=append", "--signal=TERM@120", "--output=slurm-%x-%j.log"]
    words = [f"submit {_variable(stage.name)} {shlex.quote(plan.job_name(stage))}", *options]
    if after:
        words += [*after, "--kill-on-invalid-dep=yes"]
    if settings.sbatch:
        words.append(settings.sbatch)
    devices = f"gpu:{nodes * gpus}" if gpus else "cpu"
    return " ".join([*words, f"launch/slurm_job.sh {devices}", shlex.join(stage.arguments)])


def _variable(name: str) -> str:
    return name.replace(" ", "_")
