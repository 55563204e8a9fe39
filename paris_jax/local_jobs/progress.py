"""Progress of all roles, read from their metrics: bars on a terminal, periodic lines elsewhere."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.config.experiment import Experiment
from paris_jax.local_jobs.launcher import Launcher
from paris_jax.training import metrics

LINE_EVERY = 15.0  # seconds between lines without a terminal


class RoleBars:
    """Progress bar of each role with its steps, loss and time per step; a context manager.

    `update` reads the roles' metrics again.
    """

    def __init__(
        self, console: Console, launcher: Launcher, experiment: Experiment, run: RunFolder, roles: Sequence[Role]
    ):
        self._console, self._launcher, self._run, self._roles = console, launcher, run, roles
        self._totals = {role.name: experiment.steps(role.kind) for role in roles}
        self._initial_steps = {role.name: self._step(role) for role in roles}  # steps of an earlier, interrupted run
        columns = (TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.completed}/{task.total}"))
        self._bars = Progress(*columns, TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console)
        self._tasks = {
            role.name: self._bars.add_task(
                role.name, total=self._totals[role.name], completed=self._initial_steps[role.name], note="waiting"
            )
            for role in roles
        }
        self._lined = time.perf_counter()

    def __enter__(self) -> "RoleBars":
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def update(self) -> None:
        states = [(role, *self._state(role)) for role in self._roles]
        for role, step, note in states:
            self._bars.update(self._tasks[role.name], completed=step, note=note)
        now = time.perf_counter()
        if not self._console.is_terminal and now - self._lined > LINE_EVERY:
            self._lined = now
            lines = [f"{role.name} {step}/{self._totals[role.name]} ({note})" for role, step, note in states]
            self._console.print(" | ".join(lines), soft_wrap=True)

    def _step(self, role: Role) -> int:
        line = metrics.newest(self._run.metrics(role))
        return int(line["step"]) if line else 0

    def _state(self, role: Role) -> tuple[int, str]:
        """Returns the role's newest step and its status text."""
        name = role.name
        if name not in self._launcher.began:
            return self._initial_steps[name], "waiting"
        line = metrics.newest(self._run.metrics(role))
        done = name in self._launcher.seconds
        if line is None or (line["step"] == self._initial_steps[name] and not done):
            return self._initial_steps[name], "starting"
        note = f"loss {line['loss']:.4f}, {line['seconds_per_step'] * 1e3:.0f} ms a step"
        return int(line["step"]), f"done, {note}" if done else note
