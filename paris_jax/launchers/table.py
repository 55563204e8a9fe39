"""The table of launchers: where a run's stages can be started."""

import dataclasses
from types import ModuleType
from typing import Any

from paris_jax.errors import UserError, nearest
from paris_jax.launchers import gke, skypilot, slurm, tpu_vm

# Each module has ACTIONS, DEFAULT_ACTION, Settings, and launch(action, plan, settings, commands, role, follow).
LAUNCHERS: dict[str, ModuleType] = {"slurm": slurm, "tpu_vm": tpu_vm, "gke": gke, "skypilot": skypilot}


def settings_fields() -> dict[str, tuple[dataclasses.Field, tuple[str, ...]]]:
    """Every launcher setting with the launchers that have it."""
    found: dict[str, tuple[dataclasses.Field, tuple[str, ...]]] = {}
    for name, module in LAUNCHERS.items():
        for field in dataclasses.fields(module.Settings):
            first, users = found.get(field.name, (field, ()))
            found[field.name] = (first, (*users, name))
    return found


def make_settings(launcher: str, given: dict[str, Any]) -> Any:
    """The settings of a launcher from the flags that were given; refuses those of other launchers by name."""
    module = LAUNCHERS[launcher]
    own = {field.name for field in dataclasses.fields(module.Settings)}
    for name in given:
        if name not in own:
            raise UserError(f"--{name} is not a flag of --on={launcher}, which has {', '.join(sorted(own))}")
    settings = module.Settings(**given)
    if problems := [f"--{problem}" for problem in settings.problems()]:
        raise UserError("; ".join(problems))
    return settings


def find_action(launcher: str, words: tuple[str, ...]) -> str:
    """The action that a command line names, or the launcher's default."""
    module = LAUNCHERS[launcher]
    action = words[0] if words else module.DEFAULT_ACTION
    if len(words) > 1 or action not in module.ACTIONS:
        listed = "; ".join(f"{name} {does}" for name, does in module.ACTIONS.items())
        said = f"{' '.join(words)!r} is not an action" if words else "the action is missing"
        raise UserError(f"--on={launcher}: {said}{nearest(action, module.ACTIONS)}; actions are: {listed}")
    return action
