"""quickstart.ipynb and train_an_expert.ipynb, on a few clips, for a few steps."""

import zipfile

import pytest

from paris_jax.artifacts import exported, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder

pytestmark = pytest.mark.slow
CLIPS = 80
CHANGES = [
    *("data.num_frames=4", "network.hidden=32", "network.heads=2", "clustering.num_clusters=2"),
    *("training.optimizer=adamw", "training.warmup_steps=2", "training.log_every_steps=4"),
    *("router_training.optimizer=adamw", "router_training.warmup_steps=2", "router_training.steps=8"),
    *("training.checkpoint_every_steps=8", "sampling.num_inference_steps=3"),
]


@pytest.fixture(scope="module")
def quickstart(execute):
    return execute("quickstart", CLIPS=CLIPS, STEPS=8, CHANGES=CHANGES)


@pytest.fixture(scope="module")
def contribution(execute, quickstart):
    """The owner is the run of the quickstart, whose clips are prepared and clustered already."""
    owner = str(quickstart.folder / "runs" / "notebook")
    return execute("train_an_expert", CLIPS=CLIPS, STEPS=8, CHANGES=CHANGES, OWNER=owner)


def test_quickstart_runs_without_error_or_warning(quickstart):
    quickstart.check_no_errors_or_warnings()


def test_quickstart_trains_every_role_and_plots_its_loss(quickstart):
    run = RunFolder(quickstart.folder / "runs" / "notebook")
    roles = [Role("expert", 0), Role("expert", 1), Role("router"), Role("monolith")]
    assert [manifest.exists(run.export(role)) for role in roles] == [True] * 4
    assert manifest.exists(run.ensemble)
    # Experts, router, monolith: one plot each, which was updated in place; then the routing of the samples.
    assert [len(images) for images in quickstart.outputs("image/png")] == [1, 1, 1, 1]


def test_quickstart_shows_clusters_and_both_models(quickstart):
    pages = ["".join(texts) for texts in quickstart.outputs("text/html")]
    (clusters,) = (page for page in pages if "<iframe" in page)
    assert "sandbox=" in clusters and "Cluster 1" in clusters
    (compared,) = (page for page in pages if ">monolith<" in page)
    assert compared.count("data:video/mp4") == 6


def test_a_contributor_needs_one_cluster_folder_and_sends_a_validated_network(contribution):
    contribution.check_no_errors_or_warnings()
    run, expert = RunFolder(contribution.folder / "runs" / "mine"), Role("expert", 1)
    assert [path.name for path in (run.partition / "clusters").iterdir()] == ["1"]
    assert not run.data.exists()
    assert exported.read(run.export(expert)).manifest.cluster == 1
    (table,) = (text for texts in contribution.outputs("text/plain") for text in texts if "probe" in text)
    assert table.count("passed") == 6 and "failed" not in table
    with zipfile.ZipFile(contribution.folder / "expert-1.zip") as archive:
        assert sorted(archive.namelist()) == ["manifest.json", "model.safetensors"]
        assert str(contribution.folder) not in archive.read("manifest.json").decode()
