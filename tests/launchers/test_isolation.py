"""Experts of strangers: other users, no network, killed and started again, one lost; the rest become an ensemble."""

import dataclasses
import hashlib
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.clustering.build import cluster
from paris_jax.commands.assemble import assemble
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import prepare
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.errors import UserError
from tests.conftest import micro_config
from tests.launchers.isolation import Teams, is_possible

ROLES = [Role("expert", k) for k in range(3)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not is_possible(), reason="needs root on Linux, unshare, setpriv and a Python that others may run"
    ),
]


def experiment() -> Experiment:
    """The micro experiment, with experts that train for seconds after their first checkpoint."""
    config = micro_config()
    config.training.update(steps=120, checkpoint_every_steps=10, log_every_steps=10)
    return Experiment.from_config(config)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same data, with one expert trained and left alone, in this process."""
    run, made = RunFolder(tmp_path_factory.mktemp("undisturbed") / "run"), experiment()
    prepare(made, run)
    cluster(made, run)
    copy = RunFolder(run.path.parent / "trained")
    shutil.copytree(run.path, copy.path)
    train(made, copy, ROLES[0])
    train(made, copy, Role("router"))
    return run, copy


@pytest.fixture(scope="module")
def teams(undisturbed):
    """All experts were killed while they trained; all but the last were started again and ended."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders cannot be entered by other users
        Path(folder).chmod(0o755)
        made = Teams(undisturbed[0], Path(folder) / "teams", ROLES)
        reached = [made.probe(role) for role in ROLES]
        started = {role: made.start(role) for role in ROLES}
        for role, process in started.items():
            made.kill_in_training(role, process)
        again = {role: made.start(role) for role in ROLES[:-1]}
        said = {role: made.finish(role, process) for role, process in again.items()}
        codes = [process.returncode for process in again.values()]
        shutil.copytree(undisturbed[1].role(Role("router")), made.run.role(Role("router")))
        yield made, reached, said, codes


def weights(run, role):
    return hashlib.sha256((run.export(role) / "model.safetensors").read_bytes()).hexdigest()


def test_no_expert_can_read_the_others_or_reach_a_network(teams):
    assert teams[1] == ["", "", ""]


def test_killed_experts_resume_and_end(teams):
    _, _, said, codes = teams
    assert codes == [0, 0]
    assert all("resumes from step" in text for text in said.values())


def test_an_isolated_and_killed_expert_is_that_of_an_undisturbed_job(teams, undisturbed):
    assert weights(teams[0].run, ROLES[0]) == weights(undisturbed[1], ROLES[0])


def test_assembly_waits_for_a_lost_expert_then_continues_with_allow_missing(teams):
    run, made = teams[0].run, experiment()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"Expert 2 is not trained: .* or assemble without with --allow_missing"):
        assemble(made, run, wait=0.5)
    assert time.monotonic() - began >= 0.5
    assert not (run.ensemble / "manifest.json").exists()
    assemble(made, run, allow_missing=True, wait=0.5)
    ensemble = Ensemble.load(run.ensemble)
    assert list(ensemble.clusters) == [0, 1]


def test_the_lost_experts_checkpoint_is_still_there_for_another_day(teams):
    lost = dataclasses.replace(ROLES[2])
    assert any(path.name.isdigit() for path in teams[0].run.checkpoints(lost).iterdir())
