"""Every command of `paris-jax`: what it does, its flags, and the stage it calls with them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from absl import flags

from paris_jax.config_file import EXAMPLE, change, embedded, load
from paris_jax.errors import Refused
from paris_jax.experiment import Experiment
from paris_jax.run_folder import KINDS, Role, RunFolder


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
            raise Refused("--workdir is missing; name the run folder, for example --workdir=runs/shapes")
        return RunFolder(self["workdir"])

    def experiment(self, run: RunFolder | None) -> Experiment:
        """The config given, or else the one the run folder was made with, with the changes."""
        if self["config"]:
            config = load(self["config"])
        elif run and run.config.exists():
            config = run.stored_config()["config"]
        else:
            where = f", and {run} has none yet" if run else ""
            raise Refused(f"--config is missing{where}; name a config file, such as {EXAMPLE}")
        change(config, self.changes)
        return Experiment.from_config(config)

    @property
    def role(self) -> Role:
        if self["role"] is None:
            raise Refused("--role is missing; it is expert (with --cluster=K), monolith or router")
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


# Fields of the ensemble's own settings (`ensemble.settings.Sampling`), which flags change.
SAMPLING_FLAGS: dict[str, tuple[type, str]] = {
    "solver": (str, "euler, heun, ab2, dpm++2m or ancestral"),
    "guidance": (float, "guidance scale; 1 is none"),
    "guidance_method": (str, "classifier_free or projected"),
    "guidance_low": (float, "guided at times from here ..."),
    "guidance_high": (float, "... to here; the others cost half"),
    "guidance_rescale": (float, "classifier_free: share brought back to the spread without guidance"),
    "guidance_momentum": (float, "projected: of the earlier steps"),
    "guidance_radius": (float, "projected: the longest change of one latent"),
    "guidance_parallel": (float, "projected: share kept along the prediction"),
    "guidance_image": (float, "by frames that are given; 1 is none"),
    "guidance_oscillation": (str, "text, image or both: from step 10 on, guided at every other step"),
    "guidance_ramp": (bool, "guidance by the image grows along the frames"),
    "routing": (str, "top_k, full or threshold"),
    "top_k": (int, "experts a step"),
    "threshold": (float, "smallest set of experts with this weight"),
    "temperature": (float, "of the router: above 1 more even, towards 0 one expert"),
    "routed_by": (str, "what the router reads: prompt, branch or nothing"),
}


GIVEN_FLAGS = {
    "image": "picture that is the first frame",
    "last_image": "picture that is the last frame",
    "video": "video to go on from",
}
DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string, bool: flags.DEFINE_bool}


def _config(values: flags.FlagValues) -> None:
    text = "config file, with its argument after a colon; --config.a.b=value changes a field"
    flags.DEFINE_string("config", None, text, flag_values=values)


def _workdir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "run folder, local or gs://", flag_values=values)


def _role(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("role", None, KINDS, "which network to train", flag_values=values)
    flags.DEFINE_integer("cluster", None, "the expert's cluster", flag_values=values)


def _sweeping(values: flags.FlagValues) -> None:
    text = "a field and its values, as training.learning_rate=1e-4,1e-3; may be repeated"
    flags.DEFINE_multi_string("vary", [], text, flag_values=values)
    flags.DEFINE_integer("steps", 200, "of each short training", flag_values=values)


def _training(values: flags.FlagValues) -> None:
    flags.DEFINE_string("profile_steps", None, "steps to record for xprof: 10:15", flag_values=values)
    flags.DEFINE_string(
        "coordinator", None, "host:port of this job's process 0, where nothing tells", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "how many processes this job has", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)


def _assembling(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("allow_missing", False, "admit the experts that are there", flag_values=values)
    text = "cluster:folder, the export of an expert of another run on the same clusters; may be repeated"
    flags.DEFINE_multi_string("expert", [], text, flag_values=values)


def _sampling(values: flags.FlagValues) -> None:
    flags.DEFINE_string("ensemble", None, "RUN/ensemble, or bundled:shapes", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "what to show; may be repeated", flag_values=values)
    flags.DEFINE_multi_string(
        "negative", [], "what to lead away from: one for all prompts, or one each", flag_values=values
    )
    for name, text in GIVEN_FLAGS.items():
        flags.DEFINE_multi_string(name, [], f"{text}; one for all prompts, or one each", flag_values=values)
    flags.DEFINE_integer("video_frames", None, "how many of --video are kept, its last ones", flag_values=values)
    flags.DEFINE_enum(
        "fit", None, ("crop", "letterbox"), "where an image has another aspect than the video", flag_values=values
    )
    flags.DEFINE_integer("num_steps", None, "solver steps", flag_values=values)
    flags.DEFINE_list("times", None, "the steps' times from 1 to 0 instead: 1,0.9,0.6,0", flag_values=values)
    flags.DEFINE_list("experts", None, "forced cluster, or one for each step: 0,0,1,1", flag_values=values)
    flags.DEFINE_list("seed", ["0"], "of the noise; several: one for each prompt", flag_values=values)
    flags.DEFINE_list("drop", [], "clusters to do without", flag_values=values)
    flags.DEFINE_string(
        "broken", "refuse", "where an expert's values are not finite: refuse or drop", flag_values=values
    )
    flags.DEFINE_list("mesh", [], "devices: expert:3,fsdp:2 gives each expert two", flag_values=values)
    flags.DEFINE_enum("weights", "auto", ("auto", "int8"), "int8 takes half the memory, or less", flag_values=values)
    for name, what in (("vae", "HunyuanVideo's VAE"), ("t5", "T5"), ("clip", "CLIP")):
        flags.DEFINE_string(name, None, f"folder of {what}, where it was trained with that", flag_values=values)
    flags.DEFINE_bool("offload", False, "keep the experts in the host's memory", flag_values=values)
    flags.DEFINE_integer("preview_every", 0, "steps after which a preview is written; 0 is never", flag_values=values)
    for axis in ("frames", "height", "width"):
        flags.DEFINE_integer(axis, None, f"{axis} of the videos; by default as trained", flag_values=values)
    for name, (kind, text) in SAMPLING_FLAGS.items():
        define = DEFINE[kind]
        define(name, None, text, flag_values=values)
    flags.DEFINE_string("out", None, "file to write: .mp4, .webm, .gif or .png", flag_values=values)


def _target(values: flags.FlagValues) -> None:
    flags.DEFINE_string("target", None, "a slice: v4:2x2x2, v5e:4x4, v5p:2x2x4, v6e:4x8 or cpu:8", flag_values=values)
    flags.DEFINE_enum("role", None, KINDS, "one role; by default all", flag_values=values)
    flags.DEFINE_float("share", 0.4, "of the chips' peak that steps are expected to reach", flag_values=values)
    flags.DEFINE_float("price", None, "of one chip for one hour, in your money", flag_values=values)
    flags.DEFINE_bool("search", True, "find the largest batch and the smallest slice too", flag_values=values)


def _placing(values: flags.FlagValues) -> None:
    flags.DEFINE_string("devices", "auto", "auto (all there are), cpu, gpu:0,1 or tpu:0,1,2,3", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the commands and their devices, run nothing", flag_values=values)


def _processes(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("processes", 1, "shards encoded at once, each by a process", flag_values=values)


def _prepare(call: Call) -> None:
    from paris_jax.stages.prepare import prepare

    if call["processes"] < 1:
        raise Refused(f"--processes={call['processes']}: must be at least 1")
    prepare(call.experiment(call.run), call.run, call["processes"])


def _cluster(call: Call) -> None:
    from paris_jax.stages.cluster import cluster

    cluster(call.experiment(call.run), call.run)


def _train(call: Call) -> None:
    from paris_jax.stages.train import train

    run, role = call.run, call.role
    train(call.experiment(run), run, role, _steps(call["profile_steps"]))


def _sweep(call: Call) -> None:
    from paris_jax.stages.sweep import sweep

    run, role = call.run, call.role
    sweep(call.experiment(run), run, role, call["vary"], call["steps"])


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdigit() and end.isdigit() and int(first) < int(end)):
        raise Refused(f"--profile_steps={text}: must be the first step and the one after the last, such as 10:15")
    return int(first), int(end)


def _assemble(call: Call) -> None:
    from paris_jax.stages.assemble import assemble

    elsewhere = {}
    for given in call["expert"]:
        cluster, _, folder = given.partition(":")
        if not (cluster.isascii() and cluster.isdigit()) or not folder:
            raise Refused(f"--expert={given}: must be a cluster and a folder, such as 1:runs/other/experts/1/export")
        if int(cluster) in elsewhere:
            raise Refused(f"--expert={given}: cluster {cluster} is given twice; name one expert for each")
        elsewhere[int(cluster)] = folder
    assemble(call.experiment(call.run), call.run, call["allow_missing"], elsewhere)


def _sample(call: Call) -> None:
    from paris_jax.stages.sample import sample

    others = "num_steps", "frames", "height", "width", "broken", "preview_every", "video_frames", "fit"
    given = {name: call[name] for name in (*SAMPLING_FLAGS, *others)}
    lists = {"experts": (int, "0,0,1,1"), "seed": (int, "0,7"), "drop": (int, "1,2"), "times": (float, "1,0.9,0.6,0")}
    for name, (kind, example) in lists.items():
        given[name] = _numbers(name, call[name], kind, example)
    for name in ("experts", "seed"):
        given[name] = given[name][0] if given[name] is not None and len(given[name]) == 1 else given[name]
    if not call["ensemble"]:
        raise Refused("--ensemble is missing; name RUN/ensemble, or bundled:shapes")
    for name in ("negative", *GIVEN_FLAGS):
        given[name] = call[name][0] if len(call[name]) == 1 else call[name] or None
    keeping = {"mesh": _mesh(call["mesh"]), "weights": call["weights"], "offload": call["offload"]}
    keeping["encoders"] = {name: call[name] for name in ("vae", "t5", "clip") if call[name]}
    sample(call["ensemble"], call["prompt"], call["out"], keeping, **given)


def _mesh(sizes: list[str]) -> dict[str, int] | None:
    """A mesh as axes and sizes."""
    pairs = [size.partition(":") for size in sizes]
    if not all(size.isdigit() for _, _, size in pairs):
        raise Refused(f"--mesh={','.join(sizes)}: must be axes with their sizes, such as expert:3 or expert:3,fsdp:2")
    return {axis: int(size) for axis, _, size in pairs} or None


def _numbers(name: str, values: list[str] | None, kind: type, example: str) -> list[Any] | None:
    """A flag's list as numbers."""
    try:
        return None if values is None else [kind(value) for value in values]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise Refused(f"--{name}={','.join(values or [])}: must be {what}, such as {example}") from None


def _importing(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "source", "auto", "flux1-dev, opensora2, or auto: by the names of the tensors", flag_values=values
    )
    flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    flags.DEFINE_enum("dtype", "", ("", "float32", "bfloat16"), "by default as published", flag_values=values)


def _exporting(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "part", None, "RUN/experts/K/export, RUN/monolith/export or imported weights", flag_values=values
    )
    flags.DEFINE_string("layout", "diffusers", "diffusers, bfl or opensora2", flag_values=values)
    flags.DEFINE_string("out", None, "safetensors file to write", flag_values=values)


def _import(call: Call) -> None:
    from paris_jax.stages.import_weights import import_weights

    experiment = call.experiment(None) if call["config"] or call.changes else None
    import_weights(call["source"], call.files, call["out"], experiment, call["dtype"])


def _export(call: Call) -> None:
    from paris_jax.stages.import_weights import export_weights

    export_weights(call["part"], call["layout"], call["out"])


def _evaluate(call: Call) -> None:
    from paris_jax.stages.evaluate import evaluate

    evaluate(call.experiment(call.run), call.run)


def _plan(call: Call) -> None:
    from paris_jax.stages.plan import check, plan
    from paris_jax.training.slices import Slice

    if not call["target"]:
        raise Refused("--target is missing; name a slice, such as v5p:2x2x4, v6e:4x4, or cpu:8")
    roles = (call["role"],) if call["role"] else KINDS
    check(call["share"], call["price"])
    target = Slice.parse(call["target"])
    experiment = call.experiment(call.run if call["workdir"] else None)
    plan(experiment, target, roles, call["share"], call["price"], call["search"])


def _status(call: Call) -> None:
    from paris_jax.stages.status import status

    status(call.run)


def _quickstart(call: Call) -> None:
    from paris_jax.stages.quickstart import quickstart

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
        (_config, _workdir, _placing),
        _quickstart,
    ),
    "prepare": Command(
        "clips to latents, text and features",
        (f"paris-jax prepare {_STAGE}",),
        (_config, _workdir, _processes),
        _prepare,
    ),
    "cluster": Command(
        "features to K clusters, one data folder each", (f"paris-jax cluster {_STAGE}",), (_config, _workdir), _cluster
    ),
    "train": Command(
        "one expert, the monolith or the router",
        (f"paris-jax train {_STAGE} --role=expert --cluster=0", f"paris-jax train {_STAGE} --role=router"),
        (_config, _workdir, _role, _training),
        _train,
    ),
    "sweep": Command(
        "a few steps with each of several settings: the learning-rate finder",
        (
            "paris-jax sweep --workdir=runs/shapes --role=expert --cluster=0 --steps=200",
            "paris-jax sweep --workdir=runs/shapes --role=router --vary=router_training.optimizer=adamw,muon",
        ),
        (_config, _workdir, _role, _sweeping),
        _sweep,
    ),
    "assemble": Command(
        "admission of experts and router to RUN/ensemble",
        (
            "paris-jax assemble --workdir=runs/shapes",
            "paris-jax assemble --workdir=runs/shapes --expert=1:runs/noise/experts/1/export",
        ),
        (_config, _workdir, _assembling),
        _assemble,
    ),
    "sample": Command(
        "prompts to videos",
        (
            "paris-jax sample --ensemble=runs/shapes/ensemble --prompt='a large red circle moving right on white'",
            "paris-jax sample --ensemble=bundled:shapes --prompt='...' --top_k=2 --num_steps=30 --out=two.gif",
        ),
        (_sampling,),
        _sample,
    ),
    "evaluate": Command(
        "ensemble and monolith side by side, to RUN/evaluation/report.html",
        (
            "paris-jax evaluate --workdir=runs/shapes",
            "paris-jax evaluate --workdir=runs/shapes --config.evaluation.clips=256",
        ),
        (_config, _workdir),
        _evaluate,
    ),
    "plan": Command(
        "whether it fits on a slice that is not here, and what the run would take",
        (
            "paris-jax plan --config=configs/paris2.py --target=v5p:2x2x4 --role=expert",
            "paris-jax plan --config=configs/shapes.py:small --target=v6e:2x2 --price=2.70",
        ),
        (_config, _workdir, _target),
        _plan,
    ),
    "import": Command(
        "published weights of FLUX.1-dev, Open-Sora 2.0 or of our own layouts, to start training from",
        (
            "paris-jax import --source=flux1-dev flux1-dev.safetensors --out=weights/flux1-dev",
            "paris-jax import --source=opensora2 Open_Sora_v2.safetensors --out=weights/opensora2",
        ),
        (_config, _importing),
        _import,
        takes_files=True,
    ),
    "export": Command(
        "a trained network under the names that others read",
        ("paris-jax export --part=runs/shapes/experts/0/export --layout=diffusers --out=expert0.safetensors",),
        (_exporting,),
        _export,
    ),
    "status": Command(
        "what is done, what is missing, the next command",
        ("paris-jax status --workdir=runs/shapes",),
        (_workdir,),
        _status,
    ),
}
