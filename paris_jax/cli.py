"""The command line: flags in, one stage out.

Exit codes: 0 done, 75 preempted (run the same command again), 1 refused with one sentence, 130 interrupted.
"""

import dataclasses
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.logging import RichHandler

from paris_jax import __version__
from paris_jax.errors import Preempted, Refused, nearest
from paris_jax.experiment import Experiment
from paris_jax.run_folder import Role, RunFolder

PREEMPTED = 75


@dataclasses.dataclass(frozen=True)
class Command:
    """A stage: what it does, which flags it takes, and how to call it."""

    does: str
    examples: tuple[str, ...]
    define: tuple[Callable[[flags.FlagValues], None], ...]
    run: Callable[[flags.FlagValues], Any]


def _config(values: flags.FlagValues) -> None:
    config_flags.DEFINE_config_file(
        "config", None, "config file, with its argument after a colon; fields: --config.a.b=value", flag_values=values
    )


def _workdir(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "run folder, local or gs://", flag_values=values)


def _role(values: flags.FlagValues) -> None:
    flags.DEFINE_enum("role", None, ["expert", "monolith", "router"], "which network to train", flag_values=values)
    flags.DEFINE_integer("cluster", None, "the expert's cluster", flag_values=values)


def _assembling(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("allow_missing", False, "admit the experts that are there", flag_values=values)


def _sampling(values: flags.FlagValues) -> None:
    define = {"flag_values": values}
    flags.DEFINE_string("ensemble", None, "RUN/ensemble, or bundled:shapes", **define)
    flags.DEFINE_multi_string("prompt", [], "what to show; may be repeated", **define)
    flags.DEFINE_integer("num_steps", None, "solver steps", **define)
    flags.DEFINE_float("guidance", None, "guidance scale; 1 is none", **define)
    flags.DEFINE_string("routing", None, "top_k, full or threshold", **define)
    flags.DEFINE_integer("top_k", None, "experts a step", **define)
    flags.DEFINE_float("threshold", None, "smallest set of experts with this weight", **define)
    flags.DEFINE_list("experts", None, "forced cluster, or one for each step: 0,0,1,1", **define)
    flags.DEFINE_string("solver", None, "euler or heun", **define)
    flags.DEFINE_integer("seed", 0, "of the starting noise", **define)
    flags.DEFINE_string("out", None, "file to write: .mp4, .webm, .gif or .png", **define)


def _experiment(values: flags.FlagValues, run: RunFolder) -> Experiment:
    """The config given, or else the one the run folder was made with."""
    if values["config"].value is not None:
        return Experiment.from_config(values["config"].value)
    return Experiment.from_config(run.stored_config()["config"])


def _run(values: flags.FlagValues) -> RunFolder:
    if not values["workdir"].value:
        raise Refused("--workdir is missing; name the run folder, for example --workdir=runs/shapes")
    return RunFolder(values["workdir"].value)


def _prepare(values: flags.FlagValues) -> None:
    from paris_jax.stages.prepare import prepare

    run = _run(values)
    if values["config"].value is None and not run.config.exists():
        raise Refused("--config is missing; name a config file, for example --config=configs/shapes.py:tiny")
    prepare(_experiment(values, run), run)


def _cluster(values: flags.FlagValues) -> None:
    from paris_jax.stages.cluster import cluster

    run = _run(values)
    cluster(_experiment(values, run), run)


def _train(values: flags.FlagValues) -> None:
    from paris_jax.stages.train import train

    run = _run(values)
    if values["role"].value is None:
        raise Refused("--role is missing; it is expert (with --cluster=K), monolith or router")
    train(_experiment(values, run), run, Role(values["role"].value, values["cluster"].value))


def _assemble(values: flags.FlagValues) -> None:
    from paris_jax.stages.assemble import assemble

    run = _run(values)
    assemble(_experiment(values, run), run, values["allow_missing"].value)


def _sample(values: flags.FlagValues) -> None:
    from paris_jax.stages.sample import sample

    given = {name: values[name].value for name in values if name not in ("ensemble", "prompt", "out", "help", "h")}
    if not values["ensemble"].value:
        raise Refused("--ensemble is missing; name RUN/ensemble, or bundled:shapes")
    if given["experts"] is not None:
        given["experts"] = _schedule(given["experts"])
    sample(values["ensemble"].value, values["prompt"].value, values["out"].value, **given)


def _schedule(experts: list[str]) -> int | list[int]:
    try:
        schedule = [int(k) for k in experts]
    except ValueError:
        raise Refused(f"--experts={','.join(experts)}: must be cluster numbers, such as 1 or 0,0,1,1") from None
    return schedule[0] if len(schedule) == 1 else schedule


def _evaluate(values: flags.FlagValues) -> None:
    from paris_jax.stages.evaluate import evaluate

    run = _run(values)
    evaluate(_experiment(values, run), run)


def _status(values: flags.FlagValues) -> None:
    from paris_jax.stages.status import status

    status(_run(values))


def _quickstart(values: flags.FlagValues) -> None:
    from paris_jax.stages.quickstart import quickstart

    config = values["config"].value
    if config is None:
        config = embedded_config("tiny")
    quickstart(Experiment.from_config(config), RunFolder(values["workdir"].value or "runs/quickstart"))


def embedded_config(arg: str) -> Any:
    """`configs/shapes.py` of the checkout, or the copy that a wheel carries."""
    import runpy

    package = Path(__file__).parent
    for folder in (package.parent / "configs", package / "configs"):
        if (folder / "shapes.py").exists():
            return runpy.run_path(str(folder / "shapes.py"))["get_config"](arg)
    raise Refused("configs/shapes.py is not beside the package; give --config=F.py:arg")


_STAGE = "--config=configs/shapes.py:tiny --workdir=runs/shapes"
COMMANDS = {
    "quickstart": Command(
        "every stage below on this machine, on the embedded data",
        ("paris-jax quickstart", "paris-jax quickstart --workdir=runs/mine --config=configs/shapes.py:small"),
        (_config, _workdir),
        _quickstart,
    ),
    "prepare": Command("clips to latents, text and features", (f"paris-jax prepare {_STAGE}",), (_config, _workdir), _prepare),
    "cluster": Command(
        "features to K clusters, one data folder each", (f"paris-jax cluster {_STAGE}",), (_config, _workdir), _cluster
    ),
    "train": Command(
        "one expert, the monolith or the router",
        (f"paris-jax train {_STAGE} --role=expert --cluster=0", f"paris-jax train {_STAGE} --role=router"),
        (_config, _workdir, _role),
        _train,
    ),
    "assemble": Command(
        "admission of experts and router to RUN/ensemble",
        ("paris-jax assemble --workdir=runs/shapes",),
        (_config, _workdir, _assembling),
        _assemble,
    ),
    "sample": Command(
        "prompts to videos",
        (
            "paris-jax sample --ensemble=runs/shapes/ensemble --prompt='a large red circle moving right fast on a white ground'",
            "paris-jax sample --ensemble=bundled:shapes --prompt='...' --top_k=2 --num_steps=30 --out=two.gif",
        ),
        (_sampling,),
        _sample,
    ),
    "evaluate": Command(
        "ensemble and monolith side by side, to RUN/evaluation/report.html",
        ("paris-jax evaluate --workdir=runs/shapes", "paris-jax evaluate --workdir=runs/shapes --config.evaluation.clips=256"),
        (_config, _workdir),
        _evaluate,
    ),
    "status": Command(
        "what is done, what is missing, the next command", ("paris-jax status --workdir=runs/shapes",), (_workdir,), _status
    ),
}


def overview() -> str:
    lines = [f"paris-jax {__version__}: decentralized diffusion for video", ""]
    lines += [f"  paris-jax {name:<11} {command.does}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "'paris-jax COMMAND --help' shows a command's flags and examples."])


def help_of(name: str, values: flags.FlagValues) -> str:
    command = COMMANDS[name]
    lines = [f"paris-jax {name}: {command.does}", "", "Examples:", *(f"  {e}" for e in command.examples), "", "Flags:"]
    lines += [f"  --{flag:<14} {values[flag].help}" for flag in values if flag not in ("help", "h")]
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> tuple[str, flags.FlagValues]:
    """The command and its flags; refuses an unknown command, flag or value."""
    name = arguments[0]
    if name not in COMMANDS:
        raise Refused(f"{name!r} is not a command; commands are {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "", short_name="h", flag_values=values)
    for define in COMMANDS[name].define:
        define(values)
    try:
        rest = values([f"paris-jax {name}", *arguments[1:]])
    except (flags.Error, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise Refused(f"paris-jax {name}: {' '.join(str(error).split())}; see 'paris-jax {name} --help'") from error
    if len(rest) > 1:
        raise Refused(f"paris-jax {name}: {rest[1]!r} is not a flag; flags look like --name=value")
    return name, values


def start() -> None:
    """Logging, the compilation cache, and Grain's workers, once a process."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("paris_jax").setLevel(logging.INFO)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain and Orbax read absl flags of their own
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "paris_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        name, values = parse(arguments)
        if values["help"].value:
            print(help_of(name, values))
            return 0
        start()
        COMMANDS[name].run(values)
        return 0
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    except Preempted as preempted:
        print(f"preempted: {preempted}; run the same command again", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        print(f"refused: {error.strerror}: {error.filename or 'the run folder'}; make room or choose another --workdir, then run the same command again", file=sys.stderr)
        return 1


def main() -> None:
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
