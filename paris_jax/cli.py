"""The command line: parses flags, runs one command, and turns its errors into sentences and exit codes.

Exit codes: 0 done, 75 preempted (run the same command again), 1 a user's error in one sentence, 130 interrupted.
"""

import functools
import io
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from paris_jax import __version__
from paris_jax.commands import flag_groups
from paris_jax.commands.table import COMMANDS, Call, print_config
from paris_jax.errors import REMEDIES, DeviceLost, DeviceLostAgain, Preempted, UserError, nearest, printable
from paris_jax.interrupts import ERROR, INTERRUPTED, PREEMPTED, exit_now

OUTPUT_FLAGS = ("workdir", "out", "out_dir")  # name files and folders that are written
HELP_WIDTH = 26  # of the column of flag names


def overview() -> str:
    lines = [f"paris-jax {__version__}: decentralized diffusion for video", ""]
    lines += [f"  paris-jax {name:<11} {command.does}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "'paris-jax COMMAND --help' shows a command's flags and examples."])


def help_of(name: str, values: flags.FlagValues) -> str:
    """The help of a command: examples, and every flag with its default."""
    command = COMMANDS[name]
    lines = [f"paris-jax {name}: {command.does}", "", "Examples:", *(f"  {e}" for e in command.examples), "", "Flags:"]
    for flag in values:
        if flag != "h":
            default = values[flag].default
            shown = "" if default in (None, False, [], "") else f" [default: {_shown(default)}]"
            text = values[flag].help.partition(";\n")[0]  # absl adds how to repeat a flag
            lines.append(f"  --{flag:<{HELP_WIDTH}} {text}{shown}")
    if "config" in values:
        lines += ["", "--print_config lists the fields that --config.SECTION.FIELD=value sets; so does docs/config.md."]
    return "\n".join(lines)


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, list) else str(default)


def parse(arguments: Sequence[str]) -> tuple[str, Call]:
    """The command and its flags; refuses an unknown command, flag or value."""
    name = arguments[0]
    if name not in COMMANDS:
        raise UserError(f"{name!r} is not a command; commands are {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    values = flags.FlagValues()
    flag_groups.common(values)
    for define in COMMANDS[name].define:
        define(values)
    takes_config = "config" in values
    try:
        arguments = [name, *values.read_flags_from_files(list(arguments[1:]), force_gnu=True)]  # of --flagfile=FILE
    except (flags.Error, OSError) as error:
        raise UserError(
            f"paris-jax {name}: {' '.join(str(error).split())}; name a file with one flag a line"
        ) from error
    changes = [a for a in arguments[1:] if takes_config and a.startswith("--config.")]
    if half := next((c for c in changes if "=" not in c), None):
        raise UserError(f"paris-jax {name}: {half} has no value; write {half}=value")
    try:
        rest = values([f"paris-jax {name}", *(a for a in arguments[1:] if a not in changes)])
    except flags.UnrecognizedFlagError as error:
        flag = f"--{error.flagname}"
        near = nearest(flag, [f"--{known}" for known in values])
        raise UserError(f"paris-jax {name}: {flag} is unknown{near}; see 'paris-jax {name} --help'") from error
    except flags.Error as error:
        raise UserError(f"paris-jax {name}: {' '.join(str(error).split())}; see 'paris-jax {name} --help'") from error
    if len(rest) > 1 and not COMMANDS[name].takes_files:
        raise UserError(f"paris-jax {name}: {rest[1]!r} is not a flag; flags look like --name=value")
    return name, Call(values, tuple(c.removeprefix("--config.") for c in changes), tuple(rest[1:]))


def start_logging(verbose: bool) -> None:
    """Log lines on stderr: with colours on a terminal, one unwrapped line each in a file."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        console = Console(stderr=True)
        handler: logging.Handler = RichHandler(
            console=console, show_path=False, show_level=False, log_time_format="%H:%M:%S"
        )
        logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    else:
        handler = logging.StreamHandler()
        logging.basicConfig(
            level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[handler]
        )
    handler.addFilter(_escape_control_characters)
    # Orbax's writer threads log a failure that is also raised, and reported in a sentence.
    handler.addFilter(lambda record: record.name not in ("absl", "asyncio"))
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    logging.getLogger("paris_jax").setLevel(logging.DEBUG if verbose else logging.INFO)


def _escape_control_characters(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


def start_jax(name: str, call: Call) -> None:
    """The compilation cache, Grain's flags, and the other processes of the job; once per process."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain and Orbax read absl flags of their own
    from paris_jax.models.compilation import keep_compiled_programs

    keep_compiled_programs()
    if flag_groups.joining in COMMANDS[name].define:
        from paris_jax.training.distributed import FLAGS, join_processes, with_flags

        environment = with_flags({flag: call[flag] for flag in FLAGS})
        # `sample` without a mesh runs alone, even as one of many tasks of an allocation.
        if name == "train" or call["mesh"] or "JAX_COORDINATOR_ADDRESS" in environment:
            join_processes(environment)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(overview())
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    call = None
    try:
        name, call = parse(arguments)
        if call["help"]:
            print(help_of(name, call.flags))
        elif "print_config" in call.flags and call["print_config"]:
            print_config(name, call)
        else:
            start_logging(call["verbose"])
            start_jax(name, call)
            if "preflight" in call.flags and call["preflight"]:
                from paris_jax.launchers.preflight import preflight

                # A role may have the right to write its own folder only.
                output = call.run.role(call.role) if name == "train" else call.run.path
                preflight(call["preflight"], output, arguments)
            COMMANDS[name].run(call)
        return 0
    except (UserError, DeviceLostAgain) as error:
        return _error(error)
    except Preempted as preempted:
        print(printable(f"preempted: {preempted}; run the same command again"), file=sys.stderr)
        if isinstance(preempted, DeviceLost):
            exit_now(PREEMPTED)  # a joined process would wait for the others at exit
        return PREEMPTED
    except KeyboardInterrupt as interrupt:
        print(printable(str(interrupt)) or "interrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED
    except MemoryError as error:
        detail = f" ({error})" if str(error) else ""
        return _error(f"There is not enough memory{detail}; use smaller clips, batches or networks")
    except ImportError as error:
        if not any("gs://" in str(argument) for argument in arguments):
            raise
        return _error(f"gs:// needs the extra 'tpu' ({error}); pip install -e '.[tpu]'")
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.errno not in REMEDIES:
            raise
        place = _flag_of(error.filename, call) if call else ""
        remedy = REMEDIES[error.errno].format(place=f"another {place}" if place else "another place")
        return _error(f"{error.strerror}{f': {error.filename}' if error.filename else ''}; {remedy}")


def _flag_of(path: object, call: Call) -> str:
    """The flag of a command that names a path, or the innermost folder above it; "" for none."""
    named = [(Path(call[flag]).absolute(), f"--{flag}") for flag in OUTPUT_FLAGS if flag in call.flags and call[flag]]
    within = [(len(place.parts), flag) for place, flag in named if Path(str(path)).absolute().is_relative_to(place)]
    return max(within, default=(0, ""))[1]


def _error(message: object) -> int:
    print(printable(f"error: {message}"), file=sys.stderr)
    return ERROR


def _unraisable(hook: Callable[[Any], Any], error: Any) -> None:
    """Silences the many unraisable errors of one checkpoint that could not be written; the command reports it once."""
    if not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == "Event loop is closed"):
        hook(error)


def has_abandoned_work() -> bool:
    """Whether an interruptible call is still running in its thread (`training.distributed`)."""
    distributed = sys.modules.get("paris_jax.training.distributed")
    return bool(distributed and distributed.has_abandoned_work())


def start() -> None:
    """Prepares this process: once, before its command runs."""
    from paris_jax.local_jobs.devices import keep_freed_memory

    keep_freed_memory()
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows ASCII only gets escapes for the rest
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
