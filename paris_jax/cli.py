"""The command line: flags in, one stage out.

Exit codes: 0 done, 75 preempted (run the same command again), 1 refused with one sentence, 130 interrupted.
"""

import dataclasses
import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.logging import RichHandler

from paris_jax import __version__
from paris_jax.config_file import EXAMPLE, change, embedded, load
from paris_jax.errors import Lost, Preempted, Refused, nearest
from paris_jax.experiment import Experiment
from paris_jax.run_folder import KINDS, Role, RunFolder
from paris_jax.stages.devices import keep_freed_memory

REFUSED, PREEMPTED = 1, 75


@dataclasses.dataclass(frozen=True)
class Call:
    """What was typed after a command: its flags, and the fields of the config that they change ("a.b=value")."""

    flags: flags.FlagValues
    changes: tuple[str, ...] = ()

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


def _sampling(values: flags.FlagValues) -> None:
    flags.DEFINE_string("ensemble", None, "RUN/ensemble, or bundled:shapes", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "what to show; may be repeated", flag_values=values)
    flags.DEFINE_string("image", None, "first frame (not in this version yet)", flag_values=values)
    flags.DEFINE_integer("num_steps", None, "solver steps", flag_values=values)
    flags.DEFINE_float("guidance", None, "guidance scale; 1 is none", flag_values=values)
    flags.DEFINE_string("routing", None, "top_k, full or threshold", flag_values=values)
    flags.DEFINE_integer("top_k", None, "experts a step", flag_values=values)
    flags.DEFINE_float("threshold", None, "smallest set of experts with this weight", flag_values=values)
    flags.DEFINE_list("experts", None, "forced cluster, or one for each step: 0,0,1,1", flag_values=values)
    flags.DEFINE_string("solver", None, "euler or heun", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the starting noise", flag_values=values)
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

    assemble(call.experiment(call.run), call.run, call["allow_missing"])


def _sample(call: Call) -> None:
    from paris_jax.stages.sample import sample

    if call["image"]:
        raise Refused(f"--image={call['image']}: making videos from an image is not in this version yet; leave it out")
    apart = ("ensemble", "prompt", "image", "out", "help", "h")
    given = {name: call[name] for name in call.flags if name not in apart}
    if not call["ensemble"]:
        raise Refused("--ensemble is missing; name RUN/ensemble, or bundled:shapes")
    if given["experts"] is not None:
        given["experts"] = _schedule(given["experts"])
    sample(call["ensemble"], call["prompt"], call["out"], **given)


def _schedule(experts: list[str]) -> int | list[int]:
    try:
        schedule = [int(k) for k in experts]
    except ValueError:
        raise Refused(f"--experts={','.join(experts)}: must be cluster numbers, such as 1 or 0,0,1,1") from None
    return schedule[0] if len(schedule) == 1 else schedule


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
        ("paris-jax assemble --workdir=runs/shapes",),
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
    "status": Command(
        "what is done, what is missing, the next command",
        ("paris-jax status --workdir=runs/shapes",),
        (_workdir,),
        _status,
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


def parse(arguments: Sequence[str]) -> tuple[str, Call]:
    """The command and its flags; refuses an unknown command, flag or value."""
    name = arguments[0]
    if name not in COMMANDS:
        raise Refused(f"{name!r} is not a command; commands are {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "", short_name="h", flag_values=values)
    for define in COMMANDS[name].define:
        define(values)
    takes_config = "config" in values
    changes = [a for a in arguments[1:] if takes_config and a.startswith("--config.")]
    if half := next((c for c in changes if "=" not in c), None):
        raise Refused(f"paris-jax {name}: {half} has no value; write {half}=value")
    try:
        rest = values([f"paris-jax {name}", *(a for a in arguments[1:] if a not in changes)])
    except flags.UnrecognizedFlagError as error:
        flag = f"--{error.flagname}"
        near = nearest(flag, [f"--{known}" for known in values])
        raise Refused(f"paris-jax {name}: {flag} is unknown{near}; see 'paris-jax {name} --help'") from error
    except flags.Error as error:
        raise Refused(f"paris-jax {name}: {' '.join(str(error).split())}; see 'paris-jax {name} --help'") from error
    if len(rest) > 1:
        raise Refused(f"paris-jax {name}: {rest[1]!r} is not a flag; flags look like --name=value")
    return name, Call(values, tuple(c.removeprefix("--config.") for c in changes))


def start(name: str, call: Call) -> None:
    """Logging, the compilation cache, Grain's flags and, to train, the other hosts of the slice; once a process."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False, log_time_format="%H:%M:%S")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # The checkpoint writers' threads print a failure that is raised, and told in a sentence, anyway.
    handler.addFilter(lambda record: record.name not in ("absl", "asyncio"))
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    logging.getLogger("paris_jax").setLevel(logging.INFO)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain and Orbax read absl flags of their own
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "paris_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if name == "train":
        from paris_jax.training.hosts import FLAGS, join_hosts, told_by

        join_hosts(told_by({flag: call[flag] for flag in FLAGS}))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    try:
        name, call = parse(arguments)
        if call["help"]:
            print(help_of(name, call.flags))
            return 0
        start(name, call)
        COMMANDS[name].run(call)
        return 0
    except Refused as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return REFUSED
    except Preempted as preempted:
        print(f"preempted: {preempted}; run the same command again", file=sys.stderr)
        if isinstance(preempted, Lost):
            _leave(PREEMPTED)  # the end of a joined process waits for the others
        return PREEMPTED
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except MemoryError as error:
        said = f" ({error})" if str(error) else ""
        print(f"refused: There is not enough memory{said}; use smaller clips, batches or networks", file=sys.stderr)
        return REFUSED
    except ImportError as error:
        if not any("gs://" in str(argument) for argument in arguments):
            raise
        print(f"refused: gs:// needs the extra 'tpu' ({error}); pip install -e '.[tpu]'", file=sys.stderr)
        return REFUSED
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            remedy = "make room or choose another --workdir, then run the same command again"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
            remedy = "name a folder or file that can be made there"
        else:
            raise
        where = error.filename or "the run folder"
        print(f"refused: {error.strerror}: {where}; {remedy}", file=sys.stderr)
        return REFUSED


def _leave(code: int) -> None:
    """Ends this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _stop(*_: Any) -> None:
    raise Preempted("what was finished is kept")


def main() -> None:
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _stop)  # training replaces this by one that saves first
    code = run(sys.argv[1:])
    if code == REFUSED:
        _leave(code)  # the sentence stands last: threads of a failed write must not add their tracebacks to it
    sys.exit(code)


if __name__ == "__main__":
    main()
