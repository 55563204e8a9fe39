"""The report over several K follows the definitions of its measures and finds the number of separate groups."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, silhouette_score

from paris_jax import cli
from paris_jax.artifacts import manifest
from paris_jax.clustering import choose_k as module
from paris_jax.clustering.choose_k import choose_k, rand_index, silhouette
from paris_jax.commands.table import COMMANDS
from paris_jax.errors import UserError
from tests.clustering.test_build import experiment, files, prepared


def test_measures_match_scikit_learn():
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 4, 60)
    rows += labels[:, None]
    labels[:1] = 4  # alone in its cluster
    assert silhouette(rows, labels) == pytest.approx(silhouette_score(rows, labels), abs=1e-3)
    other = rng.integers(0, 3, 60)
    assert rand_index(labels, other) == pytest.approx(adjusted_rand_score(labels, other), abs=1e-9)
    assert rand_index(labels, (labels + 2) % 5) == 1
    assert rand_index(np.zeros(9, int), np.zeros(9, int)) == 1


@pytest.mark.parametrize("batch_size", [0, 32])
def test_the_number_of_separate_groups_stands_out(tmp_path, batch_size):
    made_for = experiment(batch_size=batch_size)
    run = prepared(tmp_path, made_for)
    before = files(run.path)
    found = {row["num_clusters"]: row for row in choose_k(made_for, run, [2, 3, 5])}
    assert max(found, key=lambda k: found[k]["silhouette"]) == 3
    assert found[3]["stability"] == 1 and found[3]["purity"] == {"world": 1.0}
    assert found[2]["purity"]["world"] < 1 and found[5]["stability"] < 1
    assert found[2]["inertia"] > found[3]["inertia"] > found[5]["inertia"]
    written = run.path / "sweeps" / "num_clusters" / module.RESULTS
    assert manifest.read_json(written) == list(found.values())
    assert files(run.path) == before | {str(written.relative_to(run.path)): written.read_bytes()}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--choose_k=2,x"], "--choose_k=2,x: must be numbers of clusters"),
        (["--choose_k=2,500"], "--choose_k=500: must be from 2 to 97"),
        (["--choose_k=1"], "--choose_k=1: must be from 2"),
        (["--choose_k=2", "--partition=x"], "give one of them"),
    ],
)
def test_other_values_are_refused(tmp_path, flags, said):
    run = prepared(tmp_path, experiment())
    name, call = cli.parse(["cluster", f"--workdir={run}", *flags])
    with pytest.raises(UserError, match=said):
        COMMANDS[name].run(call)
