"""`paris-jax` and `python -m paris_jax`: listens for signals before anything else is imported, then runs a command."""

import sys

from paris_jax import interrupts
from paris_jax.errors import Preempted


def main() -> None:
    interrupts.listen()
    try:
        from paris_jax import cli

        cli.start()
        code = cli.run(sys.argv[1:])
        has_abandoned_work = cli.has_abandoned_work()
        sys.stdout.flush()
    except Preempted as preempted:  # while modules were imported, or between the lines above
        print(f"preempted: {preempted}; run the same command again", file=sys.stderr)
        code, has_abandoned_work = interrupts.PREEMPTED, True
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        code, has_abandoned_work = interrupts.INTERRUPTED, True
    except BrokenPipeError:
        if not interrupts.is_output_closed():
            raise
        code, has_abandoned_work = interrupts.PIPE_CLOSED, True
    # The error stands last: threads of a failed write must not print behind it, and nobody waits for them.
    if code == interrupts.ERROR or has_abandoned_work:
        interrupts.exit_now(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
