"""`paris-jax sweep`: over whole runs, over the sampling of a finished one, or short trainings of one role."""

from typing import Any, Protocol

from absl.flags import FlagValues

from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.commands import flag_groups
from paris_jax.config.experiment import Experiment
from paris_jax.config.files import EXAMPLE
from paris_jax.errors import UserError
from paris_jax.sweeps import run as sweeps
from paris_jax.training.sweep import sweep


class Arguments(Protocol):
    """The flags of the command (`commands.table.Call`)."""

    def __getitem__(self, name: str) -> Any: ...
    @property
    def flags(self) -> FlagValues: ...
    @property
    def changes(self) -> tuple[str, ...]: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def run(self) -> RunFolder: ...
    @property
    def role(self) -> Role: ...
    def experiment(self, run: RunFolder | None) -> Experiment: ...


def sweep_role(call: Arguments) -> None:
    """Short trainings of one role.

    Raises:
      UserError: flags of sweeps over runs.
    """
    _refuse(
        call, ("metric", "on", "dry_run"), "are for a sweep over runs, which takes a file such as configs/sweeps/..."
    )
    run, role = call.run, call.role
    sweep(call.experiment(run), run, role, call["vary"], call["steps"])


def sweep_points(call: Arguments) -> None:
    """A sweep's file: over whole runs or, if it varies sampling alone, over a finished ensemble.

    Raises:
      UserError: flags of short trainings, or no config to start from.
    """
    file, *words = call.files
    _refuse(call, ("role", "cluster", "vary"), f"are for short trainings of one role, without the file {file}")
    settings = flag_groups.launcher_settings(call.flags)
    if (words or settings) and not call["on"]:
        given = words[0] if words else f"--{next(iter(settings))}"
        raise UserError(f"{given} is for a launcher; name it with --on=slurm, tpu_vm, gke or skypilot")
    if not call["config"] and sweeps.only_sampling(file):
        if call["on"] or call["dry_run"]:
            raise UserError("--on and --dry_run are for sweeps that train; this one varies sampling alone")
        sweeps.sweep_sampling(call.experiment(call.run), call.run, file, call["metric"])
        return
    if not call["config"]:
        raise UserError(f"--config is missing: name the config file that all points start from, such as {EXAMPLE}")
    place = sweeps.Place(call["devices"], call["on"] or "", tuple(words), settings, call["dry_run"])
    sweeps.run_sweep(file, sweeps.Base(call["config"], call.changes), call.run.path, place, call["metric"])


def _refuse(call: Arguments, names: tuple[str, ...], reason: str) -> None:
    """Raises UserError if one of these flags is set."""
    for name in names:
        if call[name] not in (None, [], False):
            raise UserError(f"--{name}: --{', --'.join(names)} {reason}")
