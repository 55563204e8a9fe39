"""The points of a sweep: their configs and run folders, and shared data.

SWEEP/runs/NAME/               the run folder of a point, named by the hash of its overrides
SWEEP/table.csv table.md plot.png
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.config import files, hashing, overrides
from paris_jax.config.experiment import Experiment
from paris_jax.errors import UserError

NAME_LENGTH = 10  # characters of the hash


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep.

    Attributes:
      changes: field -> value, as text.
      run: its run folder.
      experiment: its config; None where that is impossible.
      problem: why it is impossible.
    """

    changes: Mapping[str, str]
    run: RunFolder
    experiment: Experiment | None
    problem: str = ""

    @property
    def name(self) -> str:
        return self.run.path.name

    @property
    def settings(self) -> str:
        return ", ".join(f"{field}={value}" for field, value in self.changes.items())

    @property
    def config_flags(self) -> tuple[str, ...]:
        """The flags that set the point's overrides."""
        return tuple(f"--config.{field}={value}" for field, value in self.changes.items())

    @property
    def is_done(self) -> bool:
        """Whether the last stage has written its manifest."""
        if self.experiment is None:
            return False
        last = self.run.evaluation if self.experiment.data.heldout_fraction else self.run.ensemble
        return manifest.exists(last)

    @property
    def state(self) -> str:
        if self.problem:
            return f"impossible: {self.problem}"
        return "done" if self.is_done else "begun" if self.run.config.exists() else "missing"


def make_points(file: str, config: str, changes: Sequence[str], folder: epath.PathLike) -> list[Point]:
    """The points of a sweep's file.

    Args:
      file: a file that `overrides.load` reads.
      config: the config file that all points start from; `changes` hold for all of them.
      folder: of the sweep.

    Raises:
      UserError: an invalid file, a field that is set for all points and by one of them, or no possible point.
    """
    points = []
    for found in overrides.load(file):
        text = {field: overrides.to_text(value) for field, value in found.items()}
        if twice := {change.partition("=")[0] for change in changes} & text.keys():
            field = min(twice)
            raise UserError(f"--config.{field} is set by {file}, too; leave it out there or on the command line")
        name = hashing.hash_text(hashing.canonical_json(text))[:NAME_LENGTH]
        run, experiment, problem = RunFolder(epath.Path(folder) / "runs" / name), None, ""
        try:
            values = files.load(config)
            files.change(values, [*changes, *(f"{field}={value}" for field, value in text.items())])
            experiment = Experiment.from_config(values)
        except UserError as error:
            problem = str(error)
        points.append(Point(text, run, experiment, problem))
    if all(point.problem for point in points):
        raise UserError(f"{file}: no point is possible; the first: {points[0].problem}")
    return points


def shared_stages(points: Sequence[Point]) -> dict[str, tuple[Point | None, Point | None]]:
    """The points whose data and whose clusters each possible point uses: name -> (data, clusters), None for its own.

    Data are shared by points whose configs agree in all that `prepare` reads, and clusters by those that agree in what
    `cluster` reads, too. The first of such points makes them.
    """
    data: dict[str, Point] = {}
    clusters: dict[str, Point] = {}
    found = {}
    for point in points:
        if point.experiment is None:
            continue
        owners = (
            data.setdefault(point.experiment.prepared_hash, point),
            clusters.setdefault(point.experiment.data_hash, point),
        )
        found[point.name] = tuple(None if owner is point else owner for owner in owners)
    return found  # type: ignore[return-value]


def varied(points: Sequence[Point]) -> list[str]:
    """The fields in which points differ, in the order of the first use."""
    fields = dict.fromkeys(itertools.chain.from_iterable(point.changes for point in points))
    return [field for field in fields if len({point.changes.get(field) for point in points}) > 1]
