"""The table of commands: their descriptions, flags and functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

from paris_jax.artifacts.run_folder import ROLES, Role, RunFolder
from paris_jax.commands import flag_groups
from paris_jax.config.experiment import Experiment
from paris_jax.config.files import EXAMPLE, change, embedded, load
from paris_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a command: its flags, changes of the config ("a.b=value"), and files."""

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
        """The config of --config, or else the run folder's own, with the changes."""
        if self["config"]:
            config = load(self["config"])
        elif run and run.config.exists():
            config = run.stored_config().config
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
        """The flags that pass the same config to another command."""
        named = (f"--config={self['config']}",) if self["config"] else ()
        return (*named, *(f"--config.{c}" for c in self.changes))


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its description, its flags, and the function it runs."""

    does: str
    examples: tuple[str, ...]
    define: tuple[Callable[[flags.FlagValues], None], ...]
    run: Callable[[Call], Any]  # imports its modules itself, so that --help loads no JAX
    takes_files: bool = False


def _prepare(call: Call) -> None:
    from paris_jax.data.parts import Part
    from paris_jax.data.preparation import prepare, share

    if call["num_workers"] < 1:
        raise UserError(f"--num_workers={call['num_workers']}: must be at least 1")
    if sum(map(bool, (call["shard"], call["finish"], call["data"]))) > 1:
        raise UserError("--shard, --finish and --data exclude each other; give one of them")
    experiment = call.experiment(call.run)
    if call["data"]:
        share(experiment, call.run, call["data"])
        return
    options = {"decoders": call["decode_workers"], "strict": call["strict"], "finish_only": call["finish"]}
    options["part"] = Part.parse(call["shard"]) if call["shard"] else None
    prepare(experiment, call.run, call["num_workers"], **options)


def _cluster(call: Call) -> None:
    if not call["choose_k"]:
        from paris_jax.clustering.build import cluster

        cluster(call.experiment(call.run), call.run, call["partition"])
        return
    from paris_jax.clustering.choose_k import choose_k

    if call["partition"]:
        raise UserError("--partition gives clusters, --choose_k compares numbers of them: give one of them")
    candidates = call["choose_k"]
    if not all(number.isascii() and number.isdigit() for number in candidates):
        raise UserError(f"--choose_k={','.join(candidates)}: must be numbers of clusters, such as 2,3,4,8")
    choose_k(call.experiment(call.run), call.run, sorted({int(number) for number in candidates}))


def _train(call: Call) -> None:
    from paris_jax.commands.train import train

    run, role = call.run, call.role
    train(call.experiment(run), run, role, _step_range(call["profile_steps"]))


def _sweep(call: Call) -> None:
    from paris_jax.commands.sweep import sweep_points, sweep_role

    if call.files:
        sweep_points(call)
    else:
        sweep_role(call)


def _step_range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise UserError(f"--profile_steps={text}: must be the first step and the one after the last, such as 10:15")
    return int(first), int(end)


def _assemble(call: Call) -> None:
    from paris_jax.commands.assemble import assemble

    elsewhere = {}
    for argument in call["expert"]:
        cluster, _, folder = argument.partition(":")
        if not (cluster.isascii() and cluster.isdigit()) or not folder:
            raise UserError(f"--expert={argument}: must be a cluster and a folder, such as 1:runs/x/experts/1/export")
        if int(cluster) in elsewhere:
            raise UserError(f"--expert={argument}: cluster {cluster} is given twice; name one expert for each")
        elsewhere[int(cluster)] = folder
    keys = call["public_key"]
    assemble(call.experiment(call.run), call.run, call["allow_missing"], elsewhere, call["wait"], keys)


def _loading(call: Call) -> dict[str, Any]:
    """The keyword arguments of `Ensemble.load`."""
    if not call["ensemble"]:
        raise UserError("--ensemble is missing; name RUN/ensemble, or bundled:shapes")
    options = {name: call[name] for name in ("weights_dtype", "compute_dtype", "offload")}
    encoders = {name: call[name] for name in ("vae", "t5", "clip") if call[name]}
    return options | {"mesh": _mesh(call["mesh"]), "encoders": encoders}


def _sample(call: Call) -> None:
    from paris_jax.commands.sample import Output, sample

    options = _loading(call)
    sample(
        call["ensemble"],
        call["prompt"],
        Output(call["out"] or "", call["out_dir"] or "", call["grid"], call["overwrite"]),
        options,
        call["prompts_file"],
        call["batch_size"],
        call["verbose"],
        **flag_groups.sampling_params(call.flags),
    )


def _serve(call: Call) -> None:
    from paris_jax.commands.serve import limits_of, serve

    serve(call["ensemble"], call["host"], call["port"], limits_of(call), load=_loading(call))


def _mesh(sizes: list[str]) -> dict[str, int] | None:
    """A mesh as axes and sizes."""
    pairs = [size.partition(":") for size in sizes]
    if not all(size.isdigit() for _, _, size in pairs):
        raise UserError(f"--mesh={','.join(sizes)}: must be axes with their sizes, such as expert:3 or expert:3,fsdp:2")
    return {axis: int(size) for axis, _, size in pairs} or None


def _import(call: Call) -> None:
    from paris_jax.commands.import_weights import import_i3d, import_weights

    if call["source"] == "i3d":
        import_i3d(call.files, call["out"])
        return
    experiment = call.experiment(None) if call["config"] or call.changes else None
    import_weights(call["source"], call.files, call["out"], experiment, call["dtype"])


def _export(call: Call) -> None:
    from paris_jax.commands.export import export

    names = ("network", "ensemble", "layout", "out", "heldout", "sign_key")
    export(**{name: call[name] for name in names})


def _evaluate(call: Call) -> None:
    from paris_jax.commands.evaluate import evaluate

    evaluate(call)


def _plan(call: Call) -> None:
    if call["data"]:
        from paris_jax.planning.data import plan_data

        experiment = call.experiment(call.run if call["workdir"] else None)
        plan_data(experiment, call["prepare_workers"], call["decode_workers"], call["json"])
        return
    from paris_jax.planning.estimate import check_arguments, plan
    from paris_jax.planning.topologies import Topology

    if not call["target"]:
        raise UserError("--target is missing; name a topology, such as v5p:2x2x4, v6e:4x4, h100:8, or cpu:8")
    roles = (call["role"],) if call["role"] else ROLES
    check_arguments(call["mfu"], call["price"])
    target = Topology.parse(call["target"])
    experiment = call.experiment(call.run if call["workdir"] else None)
    plan(experiment, target, roles, call["mfu"], call["price"], call["search"], call["json"])


def _validate(call: Call) -> None:
    from paris_jax.commands.validate import validate

    if len(call.files) != 1:
        raise UserError("Name one network or ensemble: paris-jax validate RUN/experts/0/export, or RUN/ensemble")
    validate(call.files[0], call["probe"], call["public_key"], call["data"])


def _status(call: Call) -> None:
    from paris_jax.commands.status import status

    status(call.run)


def _launch(call: Call) -> None:
    from paris_jax.commands.launch import launch

    if call["on"] is None:
        raise UserError("--on is missing; it is slurm, tpu_vm, gke or skypilot")
    if not call["workdir"]:
        raise UserError("--workdir is missing; name the run folder that all jobs reach, such as gs://bucket/run")
    experiment = call.experiment(None if call["config"] else call.run)
    given = flag_groups.launcher_settings(call.flags)
    options = {name: call[name] for name in ("name", "role", "follow", "dry_run")}
    launch(call["on"], call.files, experiment, call["workdir"], call.config_flags, given, **options)


def _quickstart(call: Call) -> None:
    from paris_jax.local_jobs.quickstart import quickstart

    run = _quickstart_folder(call)
    quickstart(call.experiment(run), run, call.config_flags, call["devices"], call["dry_run"])


def _quickstart_folder(call: Call) -> RunFolder:
    """The run folder of quickstart; without --config, a new one gets the embedded experiment."""
    run = RunFolder(call["workdir"] or "runs/quickstart")
    if not call["config"] and not run.config.exists():
        call.flags["config"].value = f"{embedded()}:tiny"
    return run


def print_config(name: str, call: Call) -> None:
    """Prints the config that a command would run with."""
    from paris_jax.config import reference

    run = _quickstart_folder(call) if name == "quickstart" else None
    if run is None and "workdir" in call.flags and call["workdir"]:
        run = RunFolder(call["workdir"])
    reference.print_config(call.experiment(run))


EXAMPLE_CONFIG = "configs/shapes.py:tiny"
_RUN = "--config=configs/shapes.py:tiny --workdir=runs/shapes"
COMMANDS = {
    "quickstart": Command(
        "all commands below on this machine, by default on the embedded data",
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
        (
            f"paris-jax prepare {_RUN}",
            f"paris-jax prepare {_RUN} --shard=0/8",
            "paris-jax prepare --config=configs/shapes.py:tiny --workdir=runs/four --data=runs/shapes/data"
            " --config.clustering.num_clusters=4",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.checking, flag_groups.workers),
        _prepare,
    ),
    "cluster": Command(
        "features to K clusters, one data folder each",
        (f"paris-jax cluster {_RUN}", f"paris-jax cluster {_RUN} --choose_k=2,3,4,8"),
        (flag_groups.config, flag_groups.workdir, flag_groups.checking, flag_groups.clustering),
        _cluster,
    ),
    "train": Command(
        "one expert, the monolith or the router",
        (f"paris-jax train {_RUN} --role=expert --cluster=0", f"paris-jax train {_RUN} --role=router"),
        (
            flag_groups.config,
            flag_groups.workdir,
            flag_groups.checking,
            flag_groups.role,
            flag_groups.training,
            flag_groups.joining,
        ),
        _train,
    ),
    "sweep": Command(
        "runs that differ in some fields, with one table; with --role, short trainings of one network",
        (
            f"paris-jax sweep configs/sweeps/num_clusters.py --config={EXAMPLE_CONFIG} --workdir=sweeps/k",
            f"paris-jax sweep configs/sweeps/num_clusters.py --config={EXAMPLE_CONFIG} --workdir=/shared/k --on=slurm",
            "paris-jax sweep configs/sweeps/top_k_by_guidance.py --workdir=runs/shapes",
            "paris-jax sweep --workdir=runs/shapes --role=expert --cluster=0 --steps=200",
            "paris-jax sweep --workdir=runs/shapes --role=router --vary=router_training.optimizer=adamw,muon",
        ),
        (
            flag_groups.config,
            flag_groups.workdir,
            flag_groups.role,
            flag_groups.sweeping,
            flag_groups.placing,
            flag_groups.launchers,
        ),
        _sweep,
        takes_files=True,
    ),
    "assemble": Command(
        "validates experts and router and writes RUN/ensemble",
        (
            "paris-jax assemble --workdir=runs/shapes",
            "paris-jax assemble --workdir=runs/shapes --expert=1:runs/noise/experts/1/export",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.checking, flag_groups.assembling),
        _assemble,
    ),
    "validate": Command(
        "every check of an exported network or an ensemble, as a table",
        (
            "paris-jax validate runs/shapes/ensemble",
            "paris-jax validate runs/shapes/experts/0/export --data=runs/shapes --public_key=team0.pub.pem",
        ),
        (flag_groups.validating,),
        _validate,
        takes_files=True,
    ),
    "sample": Command(
        "prompts to videos",
        (
            "paris-jax sample --ensemble=runs/shapes/ensemble --prompt='a large red circle moving right on white'",
            "paris-jax sample --ensemble=bundled:shapes --prompt='a red ball' --top_k=2 --out=two.gif",
        ),
        (flag_groups.loading, flag_groups.sampling, flag_groups.joining),
        _sample,
    ),
    "serve": Command(
        "a page in the browser that samples an ensemble",
        (
            "paris-jax serve --ensemble=bundled:shapes",
            "paris-jax serve --ensemble=runs/shapes/ensemble --port=8000 --max_steps=50",
        ),
        (flag_groups.loading, flag_groups.serving),
        _serve,
    ),
    "evaluate": Command(
        "ensemble and monolith side by side; any videos by FVD; ensembles and sampling settings",
        (
            "paris-jax evaluate --workdir=runs/shapes",
            "paris-jax evaluate --generated=samples --reference=videos --num_clips=2048",
            "paris-jax evaluate --workdir=runs/shapes --vary=top_k=1,2,3 --vary=num_inference_steps=10,20",
            "paris-jax evaluate --workdir=runs/shapes --ensemble=runs/shapes/ensemble --ensemble=bundled:shapes",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.evaluating, flag_groups.checking),
        _evaluate,
    ),
    "plan": Command(
        "memory, time and price of a run on a topology that is not attached",
        (
            "paris-jax plan --config=configs/paris2.py --target=v5p:2x2x4 --role=expert",
            "paris-jax plan --config=configs/shapes.py:small --target=v6e:2x2 --price=2.70",
            "paris-jax plan --config=configs/shapes.py:small --data --prepare_workers=16",
            "paris-jax plan --config=configs/paris2.py --target=h200:8 --config.training.global_batch_size=96",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.target),
        _plan,
    ),
    "launch": Command(
        "starts all stages on SLURM, Cloud TPU, GKE or SkyPilot",
        (
            "paris-jax launch --on=slurm --config=configs/shapes.py:h200 --workdir=/shared/shapes --gpus=8 --dry_run",
            "paris-jax launch --on=gke train --workdir=gs://bucket/run --image=IMAGE --accelerator=v5e:4x4 --dry_run",
        ),
        (flag_groups.config, flag_groups.workdir, flag_groups.launching, flag_groups.launchers),
        _launch,
        takes_files=True,
    ),
    "import": Command(
        "published weights of FLUX.1-dev or Open-Sora 2.0, to sample from or to start training from",
        (
            "paris-jax import --source=flux1-dev flux1-dev.safetensors --out=weights/flux1-dev",
            "paris-jax import --source=opensora2 FILE --config=configs/paris2.py:opensora2 --out=weights/opensora2",
            "paris-jax import --source=i3d i3d_torchscript.pt --out=weights/i3d.safetensors",
        ),
        (flag_groups.config, flag_groups.importing),
        _import,
        takes_files=True,
    ),
    "export": Command(
        "a trained network in another layout, an ensemble as one folder to publish, claimed losses, signatures",
        (
            "paris-jax export --network=runs/shapes/experts/0/export --layout=diffusers --out=expert0.safetensors",
            "paris-jax export --ensemble=runs/shapes/ensemble --out=published --sign_key=key.pem",
            "paris-jax export --network=runs/shapes/experts/0/export --heldout=runs/shapes --sign_key=key.pem",
        ),
        (flag_groups.exporting,),
        _export,
    ),
    "status": Command(
        "finished and missing steps of a run, and the next command",
        ("paris-jax status --workdir=runs/shapes",),
        (flag_groups.workdir,),
        _status,
    ),
}
