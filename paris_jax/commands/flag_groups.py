"""The flags of every command: name, default and what they say in --help."""

from absl import flags

from paris_jax.artifacts.run_folder import ROLES

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
    "rows_at_once": (
        int,
        "samples, or branches of guidance, in one pass of an expert; 0 chooses, 1 takes least memory",
    ),
    "routed_by": (str, "what the router reads: prompt, branch or nothing"),
}
GIVEN_FLAGS = {
    "image": "picture that is the first frame",
    "last_image": "picture that is the last frame",
    "video": "video to go on from",
}
DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string, bool: flags.DEFINE_bool}


def config(values: flags.FlagValues) -> None:
    text = "config file, with its argument after a colon; --config.a.b=value changes a field"
    flags.DEFINE_string("config", None, text, flag_values=values)


def workdir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "run folder, local or gs://", flag_values=values)


def role(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("role", None, ROLES, "which network to train", flag_values=values)
    flags.DEFINE_integer("cluster", None, "the expert's cluster", flag_values=values)


def sweeping(values: flags.FlagValues) -> None:
    text = "a field and its values, as training.learning_rate=1e-4,1e-3; may be repeated"
    flags.DEFINE_multi_string("vary", [], text, flag_values=values)
    flags.DEFINE_integer("steps", 200, "of each short training", flag_values=values)


def training(values: flags.FlagValues) -> None:
    flags.DEFINE_string("profile_steps", None, "steps to record for xprof: 10:15", flag_values=values)


def joining(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "coordinator", None, "host:port of this job's process 0, where nothing tells", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "how many processes this job has", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0", flag_values=values)


def assembling(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("allow_missing", False, "admit the experts that are there", flag_values=values)
    text = "cluster:folder, the export of an expert of another run on the same clusters; may be repeated"
    flags.DEFINE_multi_string("expert", [], text, flag_values=values)


def sampling(values: flags.FlagValues) -> None:
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


def target(values: flags.FlagValues) -> None:
    flags.DEFINE_string("target", None, "a slice: v4:2x2x2, v5e:4x4, v5p:2x2x4, v6e:4x8 or cpu:8", flag_values=values)
    flags.DEFINE_enum("role", None, ROLES, "one role; by default all", flag_values=values)
    flags.DEFINE_float("share", 0.4, "of the chips' peak that steps are expected to reach", flag_values=values)
    flags.DEFINE_float("price", None, "of one chip for one hour, in your money", flag_values=values)
    flags.DEFINE_bool("search", True, "find the largest batch and the smallest slice too", flag_values=values)


def placing(values: flags.FlagValues) -> None:
    flags.DEFINE_string("devices", "auto", "auto (all there are), cpu, gpu:0,1 or tpu:0,1,2,3", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print the commands and their devices, run nothing", flag_values=values)


def processes(values: flags.FlagValues) -> None:
    flags.DEFINE_integer("processes", 1, "shards encoded at once, each by a process", flag_values=values)


def importing(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "source", "auto", "flux1-dev, opensora2, or auto: by the names of the tensors", flag_values=values
    )
    flags.DEFINE_string("out", None, "folder to write", flag_values=values)
    flags.DEFINE_enum("dtype", "", ("", "float32", "bfloat16"), "by default as published", flag_values=values)


def exporting(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "part", None, "RUN/experts/K/export, RUN/monolith/export or imported weights", flag_values=values
    )
    flags.DEFINE_string("layout", None, "diffusers (the default), bfl or opensora2", flag_values=values)
    flags.DEFINE_string("ensemble", None, "instead of a part: RUN/ensemble, as one folder", flag_values=values)
    flags.DEFINE_string("out", None, "safetensors file, or folder of the ensemble, to write", flag_values=values)
