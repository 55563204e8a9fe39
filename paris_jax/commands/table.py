"""Every command of `paris-jax`: what it does, its flags, and the stage it calls with them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

from paris_jax.artifacts.run_folder import ROLES, Role, RunFolder
from paris_jax.commands import flag_groups
from paris_jax.commands.flag_groups import GIVEN_FLAGS, SAMPLING_FLAGS
from paris_jax.config.experiment import Experiment
from paris_jax.config.files import EXAMPLE, change, embedded, load
from paris_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Call:
    """What was typed after a command: its flags, the fields of the config that they change ("a.b=value"), and files."""

    flags: flags.FlagValues
    changes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.flags[name].value

    @property
    def run(self) -> RunFolder:
        if not self["workdir"]:
            raise UserError("--workdir is missing; name the run folder, for example --workdir=runs/shapes")
        return RunFolder(self["workdir"])

    def experiment(self, run: RunFolder | None) -> Experiment:
        """The config given, or else the one the run folder was made with, with the changes."""
        if self["config"]:
            config = load(self["config"])
        elif run and run.config.exists():
            config = run.stored_config()["config"]
        else:
            where = f", and {run} has none yet" if run else ""
            raise UserError(f"--config is missing{where}; name a config file, such as {EXAMPLE}")
        change(config, self.changes)
        return Experiment.from_config(config)

    @property
    def role(self) -> Role:
        if self["role"] is None:
            raise UserError("--role is missing; it is expert (with --cluster=K), monolith or router")
        return Role(self["role"], self["cluster"])

    @property
    def config_flags(self) -> tuple[str, ...]:
        """The flags that give another command the same config."""
        given = (f"--config={self['config']}",) if self["config"] else ()
        return (*given, *(f"--config.{c}" for c in self.changes))


@dataclasses.dataclass(frozen=True)
class Command:
    """A stage: what it does, which flags it takes, and how to call it."""

    does: str
    examples: tuple[str, ...]
    define: tuple[Callable[[flags.FlagValues], None], ...]
    run: Callable[[Call], Any]
    takes_files: bool = False


def _prepare(call: Call) -> None:
    from paris_jax.data.preparation import prepare

    if call["processes"] < 1:
        raise UserError(f"--processes={call['processes']}: must be at least 1")
    prepare(call.experiment(call.run), call.run, call["processes"])


def _cluster(call: Call) -> None:
    from paris_jax.clustering.build import cluster

    cluster(call.experiment(call.run), call.run)


def _train(call: Call) -> None:
    from paris_jax.commands.train import train

    run, role = call.run, call.role
    train(call.experiment(run), run, role, _steps(call["profile_steps"]))


def _sweep(call: Call) -> None:
    from paris_jax.training.sweep import sweep

    run, role = call.run, call.role
    sweep(call.experiment(run), run, role, call["vary"], call["steps"])


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise UserError(f"--profile_steps={text}: must be the first step and the one after the last, such as 10:15")
    return int(first), int(end)


def _assemble(call: Call) -> None:
    from paris_jax.commands.assemble import assemble

    elsewhere = {}
    for given in call["expert"]:
        cluster, _, folder = given.partition(":")
        if not (cluster.isascii() and cluster.isdigit()) or not folder:
            raise UserError(f"--expert={given}: must be a cluster and a folder, such as 1:runs/other/experts/1/export")
        if int(cluster) in elsewhere:
            raise UserError(f"--expert={given}: cluster {cluster} is given twice; name one expert for each")
        elsewhere[int(cluster)] = folder
    assemble(call.experiment(call.run), call.run, call["allow_missing"], elsewhere)


def _sample(call: Call) -> None:
    from paris_jax.commands.sample import sample

    others = "num_steps", "frames", "height", "width", "broken", "preview_every", "video_frames", "fit"
    given = {name: call[name] for name in (*SAMPLING_FLAGS, *others)}
    lists = {"experts": (int, "0,0,1,1"), "seed": (int, "0,7"), "drop": (int, "1,2"), "times": (float, "1,0.9,0.6,0")}
    for name, (kind, example) in lists.items():
        given[name] = _numbers(name, call[name], kind, example)
    for name in ("experts", "seed"):
        given[name] = given[name][0] if given[name] is not None and len(given[name]) == 1 else given[name]
    if not call["ensemble"]:
        raise UserError("--ensemble is missing; name RUN/ensemble, or bundled:shapes")
    for name in ("negative", *GIVEN_FLAGS):
        given[name] = call[name][0] if len(call[name]) == 1 else call[name] or None
    keeping = {"mesh": _mesh(call["mesh"]), "weights": call["weights"], "offload": call["offload"]}
    keeping["encoders"] = {name: call[name] for name in ("vae", "t5", "clip") if call[name]}
    sample(call["ensemble"], call["prompt"], call["out"], keeping, **given)


def _mesh(sizes: list[str]) -> dict[str, int] | None:
    """A mesh as axes and sizes."""
    pairs = [size.partition(":") for size in sizes]
    if not all(size.isdigit() for _, _, size in pairs):
        raise UserError(f"--mesh={','.join(sizes)}: must be axes with their sizes, such as expert:3 or expert:3,fsdp:2")
    return {axis: int(size) for axis, _, size in pairs} or None


def _numbers(name: str, values: list[str] | None, kind: type, example: str) -> list[Any] | None:
    """A flag's list as numbers."""
    try:
        return None if values is None else [kind(value) for value in values]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"--{name}={','.join(values or [])}: must be {what}, such as {example}") from None


def _import(call: Call) -> None:
    from paris_jax.commands.import_weights import import_weights

    experiment = call.experiment(None) if call["config"] or call.changes else None
    import_weights(call["source"], call.files, call["out"], experiment, call["dtype"])


def _export(call: Call) -> None:
    from paris_jax.artifacts.publish import publish
    from paris_jax.commands.import_weights import export_weights

    if not call["ensemble"]:
        export_weights(call["part"], call["layout"] or "diffusers", call["out"])
        return
    for name in ("part", "layout"):
        if call[name]:
            raise UserError(f"--{name} is for a single network, --ensemble for a whole one: give one of them")
    if not call["out"]:
        raise UserError("--out is missing; name the folder to write, such as --out=published")
    publish(call["ensemble"], call["out"])


def _evaluate(call: Call) -> None:
    from paris_jax.evaluation.protocol import evaluate

    evaluate(call.experiment(call.run), call.run)


def _plan(call: Call) -> None:
    from paris_jax.planning.estimate import check_arguments, plan
    from paris_jax.planning.topologies import Topology

    if not call["target"]:
        raise UserError("--target is missing; name a slice, such as v5p:2x2x4, v6e:4x4, or cpu:8")
    roles = (call["role"],) if call["role"] else ROLES
    check_arguments(call["share"], call["price"])
    target = Topology.parse(call["target"])
    experiment = call.experiment(call.run if call["workdir"] else None)
    plan(experiment, target, roles, call["share"], call["price"], call["search"])


def _status(call: Call) -> None:
    from paris_jax.commands.status import status

    status(call.run)


def _quickstart(call: Call) -> None:
    from paris_jax.local_jobs.quickstart import quickstart

    run = RunFolder(call["workdir"] or "runs/quickstart")
    if not call["config"] and not run.config.exists():
        call.flags["config"].value = f"{embedded()}:tiny"
    quickstart(call.experiment(run), run, call.config_flags, call["devices"], call["dry_run"])


_STAGE = "--config=configs/shapes.py:tiny --workdir=runs/shapes"
COMMANDS = {
    "quickstart": Command(
        "every stage below on this machine, the roles side by side; by default on the embedded data",
        (
            "paris-jax quickstart",
            "paris-jax quickstart --config=configs/shapes.py:bundled --workdir=runs/bundled",
            "paris-jax quickstart --config=configs/shapes.py:bundled --workdir=runs/x --devices=gpu:0,1,2,3 --dry_run",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.placing),
        _quickstart,
    ),
    "prepare": Command(
        "clips to latents, text and features",
        (f"paris-jax prepare {_STAGE}",),
        (flag_groups.config, flag_groups.workdir, flag_groups.processes),
        _prepare,
    ),
    "cluster": Command(
        "features to K clusters, one data folder each",
        (f"paris-jax cluster {_STAGE}",),
        (flag_groups.config, flag_groups.workdir),
        _cluster,
    ),
    "train": Command(
        "one expert, the monolith or the router",
        (f"paris-jax train {_STAGE} --role=expert --cluster=0", f"paris-jax train {_STAGE} --role=router"),
        (
            flag_groups.config,
            flag_groups.workdir,
            flag_groups.role,
            flag_groups.training,
            flag_groups.joining,
        ),
        _train,
    ),
    "sweep": Command(
        "a few steps with each of several settings: the learning-rate finder",
        (
            "paris-jax sweep --workdir=runs/shapes --role=expert --cluster=0 --steps=200",
            "paris-jax sweep --workdir=runs/shapes --role=router --vary=router_training.optimizer=adamw,muon",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.role, flag_groups.sweeping),
        _sweep,
    ),
    "assemble": Command(
        "admission of experts and router to RUN/ensemble",
        (
            "paris-jax assemble --workdir=runs/shapes",
            "paris-jax assemble --workdir=runs/shapes --expert=1:runs/noise/experts/1/export",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.assembling),
        _assemble,
    ),
    "sample": Command(
        "prompts to videos",
        (
            "paris-jax sample --ensemble=runs/shapes/ensemble --prompt='a large red circle moving right on white'",
            "paris-jax sample --ensemble=bundled:shapes --prompt='...' --top_k=2 --num_steps=30 --out=two.gif",
        ),
        (flag_groups.sampling, flag_groups.joining),
        _sample,
    ),
    "evaluate": Command(
        "ensemble and monolith side by side, to RUN/evaluation/report.html",
        (
            "paris-jax evaluate --workdir=runs/shapes",
            "paris-jax evaluate --workdir=runs/shapes --config.evaluation.clips=256",
        ),
        (flag_groups.config, flag_groups.workdir),
        _evaluate,
    ),
    "plan": Command(
        "whether it fits on a slice that is not here, and what the run would take",
        (
            "paris-jax plan --config=configs/paris2.py --target=v5p:2x2x4 --role=expert",
            "paris-jax plan --config=configs/shapes.py:small --target=v6e:2x2 --price=2.70",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.target),
        _plan,
    ),
    "import": Command(
        "published weights of FLUX.1-dev, Open-Sora 2.0 or of our own layouts, to start training from",
        (
            "paris-jax import --source=flux1-dev flux1-dev.safetensors --out=weights/flux1-dev",
            "paris-jax import --source=opensora2 FILE --config=configs/paris2.py:opensora2 --out=weights/opensora2",
        ),
        (flag_groups.config, flag_groups.importing),
        _import,
        takes_files=True,
    ),
    "export": Command(
        "a trained network under the names that others read, or an ensemble as one folder to publish",
        (
            "paris-jax export --part=runs/shapes/experts/0/export --layout=diffusers --out=expert0.safetensors",
            "paris-jax export --ensemble=runs/shapes/ensemble --out=published",
        ),
        (flag_groups.exporting,),
        _export,
    ),
    "status": Command(
        "what is done, what is missing, the next command",
        ("paris-jax status --workdir=runs/shapes",),
        (flag_groups.workdir,),
        _status,
    ),
}
