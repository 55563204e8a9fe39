"""`paris-jax validate`: every check of an exported network or an ensemble, as a table."""

from collections.abc import Sequence

from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paris_jax.artifacts import ensemble_manifest, manifest
from paris_jax.artifacts.schemas import NetworkManifest
from paris_jax.artifacts.validation import Check, Validation
from paris_jax.errors import UserError, printable

COLOURS = {"passed": "green", "failed": "red", "not run": "yellow"}


def validate(path: str, probe: bool = True) -> list[Check]:
    """Checks the exported network or the ensemble at `path`, prints the table and returns its rows.

    Args:
      probe: also run every network once.

    Raises:
      UserError: the first check that failed.
    """
    folder, validation = ensemble_manifest.resolve(path), Validation()
    if not manifest.exists(folder):
        raise UserError(
            f"There is no exported network or ensemble at {path}; name RUN/experts/0/export or RUN/ensemble"
        )
    try:
        if manifest.read_kind(folder) == manifest.kind(NetworkManifest):
            part = validation.network(folder, folder.name)
            if probe:
                validation.sample(part, folder.name)
        else:
            _validate_ensemble(folder, validation, probe)
    finally:
        Console(highlight=False).print(table(path, validation.checks))
    return validation.checks


def _validate_ensemble(folder: epath.Path, validation: Validation, probe: bool) -> None:
    with validation.check("ensemble", "manifest") as detail:
        folders = ensemble_manifest.folders(folder)
        detail.append(f"{len(folders) - 1} experts and the router")
    parts = {name: validation.network(where, name) for name, where in folders.items()}
    with validation.check("ensemble", "together") as detail:
        found = ensemble_manifest.join(folder, parts)
        detail.append(f"{', '.join(ensemble_manifest.SHARED)} are the same")
    validation.peers(found.experts)
    if probe:
        for name, part in parts.items():
            validation.sample(part, name)


def table(title: str, checks: Sequence[Check]) -> Table:
    """The checks as a table; text of strangers stays text."""
    shown = Table("network", "check", "outcome", "found", title=Text(printable(title)))
    for check in checks:
        outcome = Text(check.outcome, COLOURS[check.outcome])
        shown.add_row(Text(printable(check.subject)), check.name, outcome, Text(printable(check.detail)))
    return shown
