"""clusters_and_routing.ipynb, on few clips, with few steps."""

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executed(execute):
    return execute("clusters_and_routing", CLIPS=100, CANDIDATES=[2, 3], STEPS=3, SHOWN=2)


def test_every_cell_runs_without_error_or_warning(executed):
    executed.check_no_errors_or_warnings()


def test_numbers_of_clusters_are_compared_and_the_clusters_are_shown(executed):
    shown = "".join(text for texts in executed.outputs("text/html") for text in texts)
    assert "silhouette" in executed.printed + shown
    assert "<iframe sandbox=" in shown and "Cluster 2" in shown


def test_the_router_its_rules_and_temperatures_are_plotted(executed):
    assert [len(images) for images in executed.outputs("image/png")] == [1, 1, 1]


def test_every_loss_of_an_expert_is_sampled(executed):
    (lost,) = (text for texts in executed.outputs("text/html") for text in texts if "without expert 0" in text)
    assert lost.count("data:video/mp4") == 3 * 4
