"""`paris-jax launch`: starts the stages of a run on SLURM, Cloud TPU, GKE or SkyPilot."""

from collections.abc import Sequence
from typing import Any

from paris_jax.config.experiment import Experiment
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.stages import make_plan
from paris_jax.launchers.table import LAUNCHERS, find_action, make_settings


def launch(
    launcher: str,
    words: tuple[str, ...],
    experiment: Experiment,
    workdir: str,
    config: Sequence[str],
    given: dict[str, Any],
    *,
    name: str = "",
    role: str = "",
    follow: bool = False,
    dry_run: bool = False,
) -> None:
    """Runs one action of a launcher.

    Args:
      launcher: a name of `LAUNCHERS`.
      words: the action, or nothing where the launcher has a default.
      config: the flags that pass the experiment's config to a command.
      given: the launcher's settings that were given as flags.
      name: prefix of the jobs' names; by default from `workdir`.
      role: one role, "expert 0", instead of all.
      dry_run: print every command and manifest instead.

    Raises:
      UserError: an unknown action or setting, a missing program, or a command that failed.
    """
    action, settings = find_action(launcher, words), make_settings(launcher, given)
    plan = make_plan(experiment, workdir, config, name)
    plan.only(role)  # refuses an unknown role
    LAUNCHERS[launcher].launch(action, plan, settings, Commands(dry_run), role, follow)
