"""The stages of a run as commands with their order, the same for every scheduler."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from paris_jax.artifacts.run_folder import Role, roles
from paris_jax.config.experiment import Experiment
from paris_jax.config.fields import problems_of, setting
from paris_jax.errors import UserError

FINISH_DATA = "finish data"
DATA_STAGES = ("prepare", FINISH_DATA, "cluster")
FINISH_STAGES = ("assemble", "evaluate")
PUBLISHED = ("hunyuan", "t5+clip", "dinov2")  # encoders that prepare runs on an accelerator


@dataclasses.dataclass(frozen=True)
class LauncherSettings:
    """Flags that every launcher has."""

    prepare_workers: int = setting(1, "workers of a job array that prepares the clips", at_least=1)
    problems = problems_of


@dataclasses.dataclass(frozen=True)
class Stage:
    """One `paris-jax` command of a run, as a job of its own."""

    name: str  # "expert 0"
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()  # names of the stages that must be done
    needs_accelerator: bool = False
    work: float = 0.0  # clips that are trained on; compares roles
    workers: int = 1  # of a job array, which share the stage's shards

    @property
    def slug(self) -> str:
        """The name as schedulers accept it: "expert-0"."""
        return self.name.replace(" ", "-")

    @property
    def is_role(self) -> bool:
        return self.arguments[0] == "train"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The stages of one run under the name that its jobs carry."""

    name: str
    workdir: str
    stages: tuple[Stage, ...]

    @property
    def roles(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in self.stages if stage.is_role)

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def job_name(self, stage: Stage) -> str:
        return f"{self.name}-{stage.slug}"

    def with_prepare_workers(self, count: int) -> "Plan":
        """The plan with a job array that prepares the clips, and a stage that writes the manifest of all workers.

        The last worker writes it, too, unless it does not yet see the files of another machine on a network disk.
        """
        takes_shared = any(flag.startswith("--data=") for flag in self.stages[0].arguments)
        if count == 1 or takes_shared:
            return self
        stages: list[Stage] = []
        for stage in self.stages:
            if stage.name == "prepare":
                array = (*stage.arguments, f"--shard=auto/{count}")
                stages.append(dataclasses.replace(stage, arguments=array, workers=count))
                stages.append(Stage(FINISH_DATA, (*stage.arguments, "--finish"), ("prepare",)))
            elif stage.name == "cluster":
                stages.append(dataclasses.replace(stage, after=(FINISH_DATA,)))
            else:
                stages.append(stage)
        return dataclasses.replace(self, stages=tuple(stages))

    def only(self, role: str) -> "Plan":
        """The plan of one role alone, "expert 0" or "router"; the whole plan for ""."""
        if not role:
            return self
        names = [stage.name for stage in self.roles]
        if role not in names:
            raise UserError(f"--role={role}: must be one of {', '.join(names)}")
        return dataclasses.replace(self, stages=(self.stage(role),))


def make_plan(
    experiment: Experiment,
    workdir: str,
    config: Sequence[str] = (),
    name: str = "",
    options: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Plan:
    """The stages of an experiment, in an order in which a single machine may run them.

    Args:
      config: the flags that pass the config to a command.
      name: prefix of the jobs; by default the last part of `workdir`.
      options: further flags of prepare and cluster, {"prepare": ("--data=OTHER/data",)}.
    """
    where, shared = f"--workdir={workdir}", tuple(options.get("prepare", ()))
    published = {experiment.codec.name, experiment.text.name, experiment.features.name} & set(PUBLISHED)
    trained = tuple(_role(experiment, role, (*config, where)) for role in roles(experiment.clustering.num_clusters))
    stages = [
        Stage("prepare", ("prepare", *config, where, *shared), needs_accelerator=bool(published and not shared)),
        Stage("cluster", ("cluster", *config, where, *options.get("cluster", ())), ("prepare",)),
        *trained,
        Stage("assemble", ("assemble", *config, where), tuple(s.name for s in trained if s.name != "monolith")),
    ]
    if experiment.data.heldout_fraction:
        after = ("assemble", "monolith")
        stages.append(Stage("evaluate", ("evaluate", *config, where), after, needs_accelerator=True))
    return Plan(name or _job_prefix(workdir), workdir, tuple(stages))


def _role(experiment: Experiment, role: Role, flags: Sequence[str]) -> Stage:
    settings = experiment.settings_of(role.kind)
    work = experiment.steps(role.kind) * settings.global_batch_size
    return Stage(role.name, ("train", *flags, *role.arguments.split()), ("cluster",), True, float(work))


def _job_prefix(workdir: str) -> str:
    """A name that DNS labels, SLURM and gcloud accept, from the last part of a path."""
    last = re.sub(r"[^a-z0-9]+", "-", workdir.rstrip("/").rpartition("/")[2].lower()).strip("-")
    return (last if last[:1].isalpha() else f"run-{last}".rstrip("-"))[:24].rstrip("-")


def spread(stages: Sequence[Stage], speeds: Sequence[float]) -> list[list[Stage]]:
    """Queues the stages on machines of these speeds: the longest first, each where it would end earliest."""
    queues: list[list[Stage]] = [[] for _ in speeds]
    busy = [0.0] * len(speeds)
    for stage in sorted(stages, key=lambda stage: -stage.work):
        place = min(range(len(speeds)), key=lambda k: busy[k] + stage.work / speeds[k])
        busy[place] += stage.work / speeds[place]
        queues[place].append(stage)
    return queues
