"""Commands of other programs: run them, or print them exactly as they would be run."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence

from paris_jax.errors import UserError


class Commands:
    """Runs the command-line tool of a scheduler; with `dry_run`, prints every command that would change something."""

    def __init__(self, dry_run: bool = False):
        self.dry_run = dry_run

    def require(self, program: str, remedy: str) -> None:
        """Raises UserError where a program is missing; a dry run needs none."""
        if not self.dry_run and not shutil.which(program):
            raise UserError(f"{program} was not found; {remedy}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def run(self, command: Sequence[str], stdin: str = "") -> bool:
        """Runs a command, with its output on this terminal; returns whether it succeeded."""
        if self.dry_run:
            text = shlex.join(command)
            self.say(f"{text} <<'END'\n{stdin}END" if stdin else text)
            return True
        return subprocess.run(command, input=stdin or None, text=True, check=False).returncode == 0

    def must_run(self, command: Sequence[str], stdin: str = "") -> None:
        if not self.run(command, stdin):
            raise UserError(f"'{shlex.join(command[:4])} ...' failed; its error is above")

    def read(self, command: Sequence[str]) -> str | None:
        """The output of a command that only looks; None where it fails. A dry run prints it and reads "" ."""
        if self.dry_run:
            self.say(shlex.join(command))
            return ""
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None
