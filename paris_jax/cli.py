"""The command line: flags in, one stage out.

Exit codes: 0 done, 75 preempted (run the same command again), 1 refused with one sentence, 130 interrupted.
"""

import errno
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.logging import RichHandler

from paris_jax import __version__
from paris_jax.commands import flag_groups
from paris_jax.commands.table import COMMANDS, Call
from paris_jax.errors import DeviceLost, DeviceLostAgain, Preempted, UserError, nearest
from paris_jax.local_jobs.devices import keep_freed_memory
from paris_jax.training.distributed import has_abandoned_work

REFUSED, PREEMPTED = 1, 75


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
        raise UserError(f"{name!r} is not a command; commands are {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    values = flags.FlagValues()
    flags.DEFINE_bool("help", False, "", short_name="h", flag_values=values)
    for define in COMMANDS[name].define:
        define(values)
    takes_config = "config" in values
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


def start(name: str, call: Call) -> None:
    """Logging, the compilation cache, Grain's flags and the other processes of the job; once a process."""
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
    if flag_groups.joining in COMMANDS[name].define:
        from paris_jax.training.distributed import FLAGS, join_processes, with_flags

        told = with_flags({flag: call[flag] for flag in FLAGS})
        # Who samples on his own may do so among the many tasks of an allocation, too.
        if name == "train" or call["mesh"] or "JAX_COORDINATOR_ADDRESS" in told:
            join_processes(told)


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
    except (UserError, DeviceLostAgain) as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return REFUSED
    except Preempted as preempted:
        print(f"preempted: {preempted}; run the same command again", file=sys.stderr)
        if isinstance(preempted, DeviceLost):
            _leave(PREEMPTED)  # the end of a joined process waits for the others
        return PREEMPTED
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted; run the same command again to go on", file=sys.stderr)
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


def _unraisable(error: Any) -> None:
    """Of a checkpoint that could not be written, hundreds of parts report to nobody; it is told in a sentence."""
    if not (isinstance(error.exc_value, RuntimeError) and str(error.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(error)


def main() -> None:
    keep_freed_memory()
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGTERM, _stop)  # training replaces this by one that saves first
    code = run(sys.argv[1:])
    # The sentence stands last: threads of a failed write must not add their tracebacks, nor is anybody waited for.
    if code == REFUSED or has_abandoned_work():
        _leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
