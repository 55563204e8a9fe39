"""Cloud TPU VMs: slices as queued resources; roles queue over the slices and train detached from this terminal."""

import concurrent.futures
import dataclasses
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence

from paris_jax.config.fields import setting
from paris_jax.errors import UserError
from paris_jax.launchers.accelerators import parse_type
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.stages import DATA_STAGES, FINISH_STAGES, LauncherSettings, Plan, Stage, spread

ACTIONS = {
    "create": "requests the slices that are not there and waits until they are active",
    "install": "copies this checkout's commit to every worker and installs it",
    "data": "runs prepare and cluster on the first worker of the first slice",
    "train": "starts the roles, detached; those of one slice train in turn",
    "status": "prints the state of the slices, of their queues and of the run",
    "logs": "prints the end of the logs; --follow with --slice=N follows one",
    "stop": "stops training; the running roles save first",
    "finish": "runs assemble and evaluate on the first worker of the first slice",
    "delete": "releases the slices",
}
DEFAULT_ACTION = ""
POLL = 30.0  # seconds between looks at a slice that is being created


@dataclasses.dataclass(frozen=True)
class Settings(LauncherSettings):
    """Flags of this launcher; types, zones and runtimes are lists that the slices go round."""

    project: str = setting("", "Google Cloud project")
    slices: int = setting(0, "number of slices; 0: one for each role", at_least=0)
    type: str = setting("", "accelerator type of each slice: v5litepod-16, or v5litepod-16,v6e-8 for mixed ones")
    zones: str = setting("", "zone of each slice: us-central1-a,europe-west4-b")
    runtime: str = setting("", "software version of each slice; by default that of its type")
    spot: bool = setting(False, "slices (or nodes) that may be taken away, at a lower price")
    slice: int = setting(-1, "one slice, from 0; -1: all", at_least=-1)


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice and the roles that it trains, in turn."""

    name: str
    project: str
    zone: str
    type: str
    runtime: str
    queue: tuple[Stage, ...] = ()

    @property
    def devices(self) -> int:
        """JAX devices of all its hosts."""
        return parse_type(self.type)[1]

    @property
    def speed(self) -> float:
        return self.devices * parse_type(self.type)[0].speed

    @property
    def place(self) -> list[str]:
        return [f"--project={self.project}", f"--zone={self.zone}"]


def make_slices(plan: Plan, settings: Settings) -> list[Slice]:
    """The slices with their queues: the longest roles first, each where it would end earliest."""
    for name in ("project", "type", "zones"):
        if not getattr(settings, name):
            raise UserError(f"--{name} is missing; see ./launch/tpu_vm.sh --help")
    if not plan.workdir.startswith("gs://"):
        raise UserError(f"--workdir={plan.workdir}: must be a gs:// folder, which every slice can reach")
    count = settings.slices or len(plan.roles)

    def round_robin(text: str, k: int) -> str:
        values = [value.strip() for value in text.split(",")]
        return values[k % len(values)]

    made = []
    for k in range(count):
        kind = round_robin(settings.type, k)
        runtime = round_robin(settings.runtime, k) if settings.runtime else parse_type(kind)[0].runtime
        made.append(Slice(f"{plan.name}-{k}", settings.project, round_robin(settings.zones, k), kind, runtime))
    queues = spread(plan.roles, [each.speed for each in made])
    return [dataclasses.replace(each, queue=tuple(queue)) for each, queue in zip(made, queues, strict=True)]


def launch(
    action: str, plan: Plan, settings: Settings, commands: Commands, role: str = "", follow: bool = False
) -> None:
    """Runs one action; `role` leaves the other roles out of the queues, which stay those of the whole plan."""
    commands.require("gcloud", "install the Google Cloud CLI and log in")
    every = [
        dataclasses.replace(each, queue=tuple(stage for stage in each.queue if role in ("", stage.name)))
        for each in make_slices(plan, settings)
    ]
    if settings.slice >= len(every):
        raise UserError(f"--slice={settings.slice}: the slices are 0 to {len(every) - 1}")
    chosen = every if settings.slice < 0 else [every[settings.slice]]
    if role:
        chosen = [each for each in chosen if each.queue]
    if action in ("data", "finish"):
        if action == "data" and settings.prepare_workers > 1:
            _prepare_on_slices(plan, every, settings.prepare_workers, commands)
        names = DATA_STAGES if action == "data" else FINISH_STAGES
        commands.must_run(_on_cpu(chosen[0], [stage for stage in plan.stages if stage.name in names]))
        return
    if action == "install":
        archive = ["git", "archive", "--format=tar.gz", "--prefix=paris_jax/", f"--output={_archive(plan)}", "HEAD"]
        commands.must_run(archive)
    if action == "logs" and follow and len(chosen) > 1:
        raise UserError("--follow shows one log: name its slice with --slice=N, or its role with --role")
    steps = {
        "create": lambda each: create(each, settings.spot, commands),
        "install": lambda each: _install(each, _archive(plan), commands),
        "train": lambda each: _train(each, commands),
        "status": lambda each: _say_state(each, commands),
        "logs": lambda each: commands.run(_ssh(each, "0", f"launch/detached.sh logs{' --follow' * follow}")),
        "stop": lambda each: commands.run(_ssh(each, "all", "launch/detached.sh stop")),
        "delete": lambda each: commands.run(
            ["gcloud", "compute", "tpus", "queued-resources", "delete", each.name, *each.place, "--force", "--quiet"]
        ),
    }
    _each(action, chosen, steps[action], commands)


def _each(action: str, chosen: Sequence[Slice], step: Callable[[Slice], bool], commands: Commands) -> None:
    """Runs a step for every slice, at once; a failure on one does not stop the others."""
    if commands.dry_run:
        for each in chosen:
            step(each)
        return
    with concurrent.futures.ThreadPoolExecutor(max(1, len(chosen))) as pool:
        succeeded = list(pool.map(step, chosen))
    failed = [each.name for each, good in zip(chosen, succeeded, strict=True) if not good]
    if failed:
        raise UserError(
            f"{action} failed for {', '.join(failed)}; see the lines above, then run the same command again"
        )


def create(each: Slice, spot: bool, commands: Commands, pause: Callable[[float], None] = time.sleep) -> bool:
    """Requests a slice unless there is one, and waits until it is active."""
    request = ["gcloud", "compute", "tpus", "queued-resources", "create", each.name, *each.place]
    request += [f"--node-id={each.name}", f"--accelerator-type={each.type}", f"--runtime-version={each.runtime}"]
    if commands.dry_run:
        commands.say(
            f"# unless this prints a state; then repeated until it prints ACTIVE:\n{shlex.join(_describe(each))}"
        )
    elif commands.read(_describe(each)):
        commands.say(f"[{each.name}] is requested already")
        request = []
    if request and not commands.run([*request, *(["--spot"] if spot else [])]):
        return False
    while not commands.dry_run:
        state = commands.read(_describe(each))
        if state == "ACTIVE" or state in (None, "FAILED", "SUSPENDED", "SUSPENDING"):
            commands.say(f"[{each.name}] {state or 'cannot be read'}")
            return state == "ACTIVE"
        commands.say(f"[{each.name}] {state}")
        pause(POLL)
    return True


def _describe(each: Slice) -> list[str]:
    command = ["gcloud", "compute", "tpus", "queued-resources", "describe", each.name, *each.place]
    return [*command, "--format=value(state.state)"]


def _ssh(each: Slice, workers: str, command: str, folder: str = "paris_jax") -> list[str]:
    """The command that runs a shell command in the checkout on the workers of a slice."""
    inside = f"cd {folder} && {command}" if folder else command
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", each.name, *each.place]
    return [*ssh, f"--worker={workers}", f"--command={inside}"]


def _archive(plan: Plan) -> str:
    return f"{plan.name}-checkout.tar.gz"


def _install(each: Slice, archive: str, commands: Commands) -> bool:
    copy = ["gcloud", "compute", "tpus", "tpu-vm", "scp", archive, f"{each.name}:", *each.place, "--worker=all"]
    unpack = f"tar xzf {archive} && cd paris_jax && ./launch/install.sh tpu evaluation"
    return commands.run(copy) and commands.run(_ssh(each, "all", unpack, folder=""))


def _train(each: Slice, commands: Commands) -> bool:
    """Starts the queue on every worker: all run the same stages in the same order, and JAX joins them."""
    if not each.queue:
        commands.say(f"# {each.name}: no role is left for it")
        return True
    stages = " ".join(shlex.quote(shlex.join(stage.arguments)) for stage in each.queue)
    return commands.run(_ssh(each, "all", f"launch/detached.sh start tpu:{each.devices} {stages}"))


def _on_cpu(each: Slice, stages: Sequence[Stage]) -> list[str]:
    """Data stages run in one process, on the CPU: on a slice of several workers, the TPU would wait for the others."""
    return _ssh(each, "0", " && ".join(f"launch/job.sh cpu exit {shlex.join(stage.arguments)}" for stage in stages))


def _prepare_on_slices(plan: Plan, every: Sequence[Slice], count: int, commands: Commands) -> None:
    """Prepares the shards of worker k on the first host of slice k, at once; `prepare` then finds them."""
    if count > len(every):
        raise UserError(f"--prepare_workers={count}: must be at most {len(every)}, the number of slices")
    stage = plan.stage("prepare")

    def prepare(each: Slice) -> bool:
        arguments = (*stage.arguments, f"--shard={every.index(each)}/{count}")
        return commands.run(_on_cpu(each, [dataclasses.replace(stage, arguments=arguments)]))

    _each("data", every[:count], prepare, commands)


def _say_state(each: Slice, commands: Commands) -> bool:
    queue = ", ".join(stage.name for stage in each.queue)
    if commands.dry_run:
        return commands.run(_describe(each)) and commands.run(_ssh(each, "0", "launch/detached.sh status"))
    state = commands.read(_describe(each)) or "absent"
    commands.say(f"[{each.name}] {state}; its roles: {queue or 'none'}")
    if state != "ACTIVE":
        return True
    status = subprocess.run(_ssh(each, "0", "launch/detached.sh status"), capture_output=True, text=True, check=False)
    commands.say(f"[{each.name}] {status.stdout.strip() or 'its worker does not answer'}")
    return True
