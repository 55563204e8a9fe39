"""`paris-jax validate`: every check of an exported network or an ensemble, as a table."""

from collections.abc import Sequence

from etils import epath
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paris_jax.artifacts import ensemble_manifest, manifest, signatures
from paris_jax.artifacts.exported import ExportedNetwork
from paris_jax.artifacts.run_folder import RunFolder, find_run_folder
from paris_jax.artifacts.schemas import NetworkManifest
from paris_jax.artifacts.validation import Check, Validation
from paris_jax.errors import UserError, printable
from paris_jax.training import claims

COLOURS = {"passed": "green", "failed": "red", "not run": "yellow"}


def validate(
    path: str, probe: bool = True, keys: Sequence[epath.PathLike] = (), data: epath.PathLike | None = None
) -> list[Check]:
    """Checks the exported network or the ensemble at `path`, prints the table and returns its rows.

    Args:
      probe: also run every network once.
      keys: PEM files of public keys, one of which must have signed the ensemble, or each of its networks.
      data: held-out clips (`claims.heldout_folder`) on which every network must have the loss that it claims; by
        default those of the run folder that `path` lies in, for networks that claim one.

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
            part = check_network(validation, folder, folder.name, keys, data, find_run_folder(folder))
            if probe:
                validation.sample(part, folder.name)
        else:
            _validate_ensemble(folder, validation, probe, keys, data)
    finally:
        show(path, validation)
    return validation.checks


def check_network(
    validation: Validation,
    folder: epath.Path,
    name: str,
    keys: Sequence[epath.PathLike],
    data: epath.PathLike | None,
    run: RunFolder | None,
) -> ExportedNetwork:
    """Checks one network: its signature where there are keys, its files, and its claimed loss where there are clips.

    Args:
      data: held-out clips on which it must have the loss that it must claim.
      run: a run folder whose held-out clips are used instead, if the network claims a loss.
    """
    if keys:
        with validation.check(name, "signature") as detail:
            detail.append(signatures.verify(folder, keys))
    part = validation.network(folder, name)
    claimed = part.manifest.heldout
    split = claimed.split if claimed else "validation"
    if not data and claimed and run and manifest.exists(run.partition / split):
        data = run.path
    if data:
        with validation.check(name, "held-out") as detail:
            detail.append(claims.check(part, claims.heldout_folder(data, split)))
    else:
        why = "its clips are not at hand (--data)" if claimed else "no loss is claimed"
        validation.checks.append(Check(name, "held-out", "not run", why))
    return part


def _validate_ensemble(
    folder: epath.Path,
    validation: Validation,
    probe: bool,
    keys: Sequence[epath.PathLike],
    data: epath.PathLike | None,
) -> None:
    if keys and signatures.exists(folder):
        with validation.check("ensemble", "signature") as detail:
            detail.append(signatures.verify(folder, keys))
        keys = ()  # its manifest names the manifest of every network by its hash
    with validation.check("ensemble", "manifest") as detail:
        folders = ensemble_manifest.folders(folder)
        detail.append(f"{len(folders) - 1} experts and the router")
    run = find_run_folder(folder)
    parts = {name: check_network(validation, where, name, keys, data, run) for name, where in folders.items()}
    with validation.check("ensemble", "together") as detail:
        found = ensemble_manifest.join(folder, parts)
        detail.append(f"{', '.join(ensemble_manifest.SHARED)} are the same")
    validation.peers(found.experts)
    if probe:
        for name, part in parts.items():
            validation.sample(part, name)


def show(title: str, validation: Validation) -> None:
    """Prints the checks that were made."""
    Console(highlight=False).print(table(title, validation.checks))


def table(title: str, checks: Sequence[Check]) -> Table:
    """The checks as a table; text of strangers stays text."""
    shown = Table("network", "check", "outcome", "found", title=Text(printable(title)))
    for check in checks:
        outcome = Text(check.outcome, COLOURS[check.outcome])
        shown.add_row(Text(printable(check.subject)), check.name, outcome, Text(printable(check.detail)))
    return shown
