"""A sweep over runs: what is equal is made once, what is done is left, what is impossible is listed."""

import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from paris_jax.artifacts import manifest
from paris_jax.cli import run as paris_jax
from paris_jax.clustering import folders
from paris_jax.errors import UserError
from paris_jax.local_jobs.quickstart import make_plan
from paris_jax.sweeps import run as sweeps
from paris_jax.sweeps import table
from paris_jax.sweeps.points import make_points, shared_stages
from paris_jax.sweeps.table import Row, SweepTable

POINTS = """\
from paris_jax.config.overrides import axis, product, zipped

POINTS = product(
    axis("training.learning_rate", [1e-3, 1e-2]),
    zipped(axis("network.hidden", [32, 33]), axis("network.heads", [2, 2])),
)
"""


@pytest.fixture(scope="module")
def files(micro, tmp_path_factory):
    """The paths of the micro config and of a sweep over it, half of whose points are impossible."""
    folder = tmp_path_factory.mktemp("files")
    body = f"def get_config():\n    return ConfigDict({micro.to_dict()!r})\n"
    (folder / "config.py").write_text(f"from ml_collections import ConfigDict\n\n\n{body}")
    (folder / "points.py").write_text(POINTS)
    return str(folder / "config.py"), str(folder / "points.py")


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs the jobs of quickstart's plan here but trains nothing."""

    def quickstart(experiment, run, config, devices, dry_run, options, sample):
        plan = make_plan(experiment, run, config, options, sample)
        for job in (*plan.before, *(() if plan.roles else plan.after)):
            if paris_jax(job.arguments):
                raise SystemExit(1)

    monkeypatch.setattr(sweeps, "quickstart", quickstart)


def rows_of(folder):
    return list(csv.DictReader((folder / "table.csv").read_text().splitlines()))


def test_points_share_what_their_configs_have_in_common(files, tmp_path):
    config, _ = files
    (tmp_path / "points.py").write_text(
        "POINTS = [{'training.steps': 6}, {'training.steps': 7}, {'clustering.num_clusters': 2}, {'data.seed': 5},"
        " {'clustering.num_clusters': 2, 'training.steps': 9}]"
    )
    points = make_points(str(tmp_path / "points.py"), config, (), tmp_path / "sweep")
    first, second, two, seed, last = points
    assert shared_stages(points) == {
        first.name: (None, None),
        second.name: (first, first),
        two.name: (first, None),
        seed.name: (None, None),
        last.name: (first, two),
    }
    assert len({point.name for point in points}) == 5
    (tmp_path / "again.py").write_text("POINTS = [{'training.steps': 9, 'clustering.num_clusters': 2}]")
    (again,) = make_points(str(tmp_path / "again.py"), config, (), tmp_path / "sweep")
    assert again.name == last.name  # by what is overridden, not by its order or the file


def test_a_dry_run_prints_every_command_and_writes_nothing(files, tmp_path, capsys):
    config, points = files
    folder = tmp_path / "sweep"
    assert paris_jax(["sweep", points, f"--config={config}", f"--workdir={folder}", "--devices=cpu", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "# point 1 of 4" in shown and "--config.training.learning_rate=0.01" in shown
    first = make_points(points, config, (), folder)[0].run
    assert f"--data={first.path}/data" in shown and f"--partition={first.partition}" in shown
    assert not folder.exists()


def test_a_sweep_shares_resumes_and_tabulates(files, micro, trained, tmp_path, capfd, in_this_process):
    """The first point is trained already; the others' preparation and clusters come from it."""
    config, _ = files
    points, folder = tmp_path / "points.py", tmp_path / "sweep"
    rate = micro.training.learning_rate
    points.write_text(
        "from paris_jax.config.overrides import axis\n"
        f"POINTS = [*axis('training.learning_rate', [{rate}, {2 * rate}]), {{'network.hidden': 33}}]\n"
    )
    command = ["sweep", str(points), f"--config={config}", f"--workdir={folder}"]
    first, second, third = (Path(point.run.path) for point in make_points(str(points), config, (), folder))
    shutil.copytree(trained.path, first, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    assert paris_jax(command) == 0
    rows = rows_of(folder)
    assert [row["run"] for row in rows] == [first.name, second.name, third.name]
    assert [row["state"].partition(":")[0] for row in rows] == ["done", "begun", "impossible"]
    assert "hidden" in rows[2]["state"] and rows[2]["loss"] == "" and not third.exists()
    found = json.loads((first / "evaluation" / "results.json").read_text())
    (loss,) = (c for c in found["comparisons"] if c["id"] == "loss")
    assert float(rows[0]["loss"]) == loss["ensemble"]["value"]
    assert float(rows[0]["loss_stderr"]) == loss["ensemble"]["stderr"]
    assert float(rows[0]["loss.monolith"]) == loss["monolith"]["value"]
    assert "**" in (folder / "table.md").read_text()
    shared = json.loads((second / "data.json").read_text())["path"]
    assert shared == str(first / "data") and not (second / "data").exists()
    for name in (folders.CENTROIDS, "clusters/0/manifest.json"):
        assert (first / "partition" / name).exists() and (second / "partition" / name).exists()
    read = [(run / "partition" / folders.CENTROIDS).read_bytes() for run in (first, second)]
    assert read[0] == read[1]

    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert paris_jax([*command, "--metric=error.difference", "--metric=experts.routed"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    assert math.isfinite(float(rows_of(folder)[0]["experts.routed"]))
    assert paris_jax([*command, "--metric=eror"]) == 1
    assert "did you mean 'error'" in capfd.readouterr().err


def test_a_launcher_gets_a_point_when_what_it_shares_is_there(files, clustered, tmp_path, capsys):
    config, points = files
    folder = tmp_path / "sweep"
    command = ["sweep", points, f"--config={config}", f"--workdir={folder}", "--on=slurm", "--gpus=4", "--dry_run"]
    assert paris_jax(command) == 0
    shown = capsys.readouterr().out
    made = make_points(points, config, (), folder)
    assert f"sweep-{made[0].name}-expert-0" in shown and "--gpus-per-node=4" in shown
    assert f"waits for the data of {made[0].name} and the clusters of {made[0].name}" in shown
    assert made[2].name not in shown.partition("waits for")[2]

    shutil.copytree(clustered.path / "data", made[0].run.path / "data")
    shutil.copytree(clustered.path / "partition", made[0].run.partition)
    assert paris_jax(command) == 0
    shown = capsys.readouterr().out
    assert "waits" not in shown
    assert f"--data={made[0].run.path}/data" in shown and f"--partition={made[0].run.partition}" in shown


def test_sampling_alone_is_swept_on_a_finished_ensemble(finished, tmp_path, capsys):
    (tmp_path / "points.py").write_text(
        "def sweep(add):\n    for k in (1, 2):\n        add(sampling__top_k=k, sampling__guidance_scale=float(k))\n"
    )
    assert paris_jax(["sweep", str(tmp_path / "points.py"), f"--workdir={finished}", "--metric=correct"]) == 0
    folder = finished.path / "sweeps" / "sampling"
    assert [(row["top_k"], row["guidance_scale"]) for row in rows_of(folder)] == [("1", "1.0"), ("2", "2.0")]
    assert manifest.exists(folder)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ((), "--config is missing"),
        (("--config={config}", "--gpus=4"), "--gpus is for a launcher"),
        (("--config={config}", "submit"), "submit is for a launcher"),
        (("--config={config}", "--role=router"), "are for short trainings of one role"),
        (("--config={config}", "--config.training.learning_rate=1"), "training.learning_rate is set by"),
        (("--config={config}", "--on=slurm", "--project=p"), "--project is not a flag of --on=slurm"),
    ],
)
def test_wrong_flags_are_refused_and_nothing_is_written(files, tmp_path, capsys, flags, sentence):
    config, points = files
    given = [flag.format(config=config) for flag in flags]
    assert paris_jax(["sweep", points, f"--workdir={tmp_path / 'sweep'}", *given]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line and not (tmp_path / "sweep").exists()


def test_a_sweep_without_a_possible_point_is_refused(files, tmp_path):
    (tmp_path / "points.py").write_text("POINTS = [{'network.hiden': 32}, {'network.hiden': 48}]")
    with pytest.raises(UserError, match=r"no point is possible; the first: .*hiden.*did you mean"):
        make_points(str(tmp_path / "points.py"), files[0], (), tmp_path / "sweep")


def test_a_failed_point_is_listed_and_the_others_run(files, tmp_path, capfd, in_this_process):
    config, _ = files
    (tmp_path / "points.py").write_text("POINTS = [{'clustering.num_clusters': 40}, {'training.steps': 4}]")
    folder = tmp_path / "sweep"
    flags = ["--config.data.heldout_fraction=0", "--config.router_training.steps=4"]
    command = ["sweep", str(tmp_path / "points.py"), f"--config={config}", f"--workdir={folder}", *flags]
    assert paris_jax(command) == 1
    assert "1 of 2 points failed; the first, " in capfd.readouterr().err.splitlines()[-1]
    assert [row["state"].partition(":")[0] for row in rows_of(folder)] == ["failed", "begun"]


def test_text_of_strangers_stays_text_in_the_table(tmp_path):
    rows = (Row("a", {"data.path": "<script>|x"}, "failed: a\nb\x1b[2J", {"loss": (2.0, 0.1)}),
            Row("b", {"data.path": "y"}, "done", {"loss": (1.0, math.nan)}))  # fmt: skip
    found = SweepTable(("data.path",), ("loss",), rows, lower=True)
    text = table.to_markdown(found)
    assert "\\<script\\>\\|x" in text and "\x1b" not in text and len(text.splitlines()) == 4
    assert found.best is rows[1] and "2 ± 0.2" in text
    assert list(csv.DictReader(table.to_csv(found).splitlines()))[1]["loss_stderr"] == ""
