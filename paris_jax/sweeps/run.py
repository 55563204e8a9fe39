"""`paris-jax sweep FILE`: runs every point of a sweep here or by a launcher, and tabulates the results."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.config import overrides
from paris_jax.config.experiment import Experiment
from paris_jax.errors import UserError, printable
from paris_jax.evaluation import protocol, systems
from paris_jax.evaluation.features import WeightFiles
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.stages import make_plan
from paris_jax.launchers.table import LAUNCHERS, find_action, make_settings
from paris_jax.local_jobs.quickstart import quickstart
from paris_jax.sweeps import table
from paris_jax.sweeps.points import Point, make_points, shared_stages

logger = logging.getLogger(__name__)
SAMPLING = "sampling."  # fields that a finished ensemble takes, too


@dataclasses.dataclass(frozen=True)
class Base:
    """The common start of all points: a config file and changes of it."""

    config: str
    changes: tuple[str, ...] = ()

    def flags(self, point: Point) -> tuple[str, ...]:
        """The flags that pass the point's config to a command."""
        return (f"--config={self.config}", *(f"--config.{change}" for change in self.changes), *point.config_flags)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where points run: on devices of this machine, or by an action of a launcher with its settings."""

    devices: str = "auto"
    launcher: str = ""
    words: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dry_run: bool = False


def only_sampling(file: str) -> bool:
    """Whether the points of a file differ in sampling alone, so that a finished ensemble can be swept."""
    return all(field.startswith(SAMPLING) for point in overrides.load(file) for field in point)


def sweep_sampling(experiment: Experiment, run: RunFolder, file: str, metrics: Sequence[str]) -> None:
    """Scores a finished ensemble with the sampling settings of every point, as `evaluate --vary` does.

    Writes RUN/sweeps/sampling.

    Raises:
      UserError: no ensemble, an unknown setting or metric.
    """
    if not manifest.exists(run.ensemble):
        raise UserError(
            f"{file} varies sampling alone, and {run.ensemble} is not there; name a finished run with --workdir, or "
            "vary another field, too"
        )
    compared = []
    for point in overrides.load(file):
        texts = [f"{name.removeprefix(SAMPLING)}={overrides.to_text(value)}" for name, value in point.items()]
        compared += systems.systems([str(run.ensemble)], texts)
    folder = run.path / protocol.SWEEP
    found = systems.evaluate_systems(experiment, run, compared, WeightFiles(), folder)
    with locks.only_writer(folder):
        scored = table.of_systems(found, metrics)
        table.write(folder, scored)
        table.show(folder, scored)


def run_sweep(file: str, base: Base, folder: epath.PathLike, place: Place, metrics: Sequence[str]) -> None:
    """Runs all points that are not done, then writes and prints the table.

    Points run one after another on this machine; a launcher gets all jobs of a point at once. Points that use the data
    of another one that a launcher still prepares are left for the next call.

    Raises:
      UserError: an invalid file, field, metric or setting; points that failed, after all others have run.
      Preempted, KeyboardInterrupt: the running point has saved; the same command resumes.
    """
    points = make_points(file, base.config, base.changes, folder)
    failed: dict[str, str] = {}
    with locks.only_writer(folder):
        for _ in _start(points, base, place, failed):
            table.write(folder, table.of_runs(points, metrics, failed))
        if not place.dry_run:
            found = table.of_runs(points, metrics, failed)
            table.write(folder, found)
            table.show(folder, found)
    if failed:
        name, problem = next(iter(failed.items()))
        raise UserError(f"{len(failed)} of {len(points)} points failed; the first, {name}: {problem}")


def _start(points: Sequence[Point], base: Base, place: Place, failed: dict[str, str]) -> Iterator[Point]:
    """Starts all points that are not done; yields each that has ended here, and notes errors of those that failed."""
    shared = shared_stages(points)
    for number, point in enumerate(points, 1):
        if point.experiment is None or point.is_done:
            logger.info("%s (%s): %s", point.name, point.settings, point.state)
            continue
        options = _options(point, *shared[point.name])
        print(printable(f"{'# ' * place.dry_run}point {number} of {len(points)}, {point.name}: {point.settings}"))
        if place.launcher:
            _launch(point, base, place, options, shared[point.name])
            continue
        flags = base.flags(point)
        try:
            quickstart(point.experiment, point.run, flags, place.devices, place.dry_run, options, sample=False)
        except UserError as error:
            failed[point.name] = str(error)
        except SystemExit:
            failed[point.name] = "a stage failed; its error is above"
        if point.name in failed:
            logger.warning("%s failed: %s", point.name, failed[point.name])
        if not place.dry_run:
            yield point


def _options(point: Point, data: Point | None, clusters: Point | None) -> dict[str, tuple[str, ...]]:
    """Further flags of the stages that use another point's data or clusters."""
    options = {}
    if data:
        options["prepare"] = (f"--data={data.run.path / 'data'}",)
    if clusters:
        options["cluster"] = (f"--partition={clusters.run.partition}",)
    return options


def _launch(
    point: Point,
    base: Base,
    place: Place,
    options: Mapping[str, tuple[str, ...]],
    shared: tuple[Point | None, Point | None],
) -> None:
    """Hands the jobs of a point to a launcher, unless its shared data are not complete yet."""
    assert point.experiment is not None
    data, clusters = shared
    waits = [f"the data of {data.name}"] if data and not manifest.exists(data.run.data) else []
    waits += [f"the clusters of {clusters.name}"] if clusters and not manifest.exists(clusters.run.partition) else []
    if waits:
        print(f"{'# ' * place.dry_run}waits for {' and '.join(waits)}; run the same command again when they are done")
        return
    action, settings = find_action(place.launcher, place.words), make_settings(place.launcher, dict(place.settings))
    name = f"sweep-{point.name}"
    plan = make_plan(point.experiment, str(point.run), base.flags(point), name, options)
    LAUNCHERS[place.launcher].launch(action, plan, settings, Commands(place.dry_run))
