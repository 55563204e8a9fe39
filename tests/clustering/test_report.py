"""The clustering report gives size, separation and purity of the clusters."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import silhouette_score

from paris_jax.clustering import clusters, report


@pytest.fixture
def described():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], [60, 40])
    features = np.eye(2, 4)[truth] * 20 + rng.normal(size=(100, 4))
    captions = [f"a {'red' if k == 0 else 'blue'} ball" for k in truth]
    attributes = [
        {"world": "flat" if k == 0 else "digits", "size": "large" if i % 2 else "small"} for i, k in enumerate(truth)
    ]
    partition, found = clusters.fit([f"c{i:03d}" for i in range(100)], features, num_clusters=2)
    heldout = {"validation": partition.assign(features[:5]), "test": partition.assign(features[90:])}
    return partition, features, report.report(partition, features, found, captions, attributes, heldout)


def test_counts_and_purity(described):
    _, _, data = described
    assert [c["clips"] for c in data["clusters"]] == [60, 40]
    assert [c["validation"] for c in data["clusters"]] == [5, 0]
    assert [c["test"] for c in data["clusters"]] == [0, 10]
    assert (data["validation"], data["test"]) == (5, 10)
    assert data["purity"] == {"size": 0.5, "world": 1.0}
    assert data["clusters"][1]["attributes"]["world"] == {"digits": 40}
    assert data["clusters"][1]["examples"] == ["a blue ball"]


def test_quality_measures_follow_their_definitions(described):
    partition, features, data = described
    rows = partition.standardise(features)
    labels = partition.assign(features)
    inertia = np.sum((rows - partition.centroids[labels]) ** 2)
    assert data["inertia"] == pytest.approx(inertia, rel=1e-3)
    assert data["explained"] == pytest.approx(1 - inertia / np.sum(rows**2), abs=1e-3)
    # The margin is the silhouette with distances to centroids instead of clips, so the two are close but not equal.
    assert data["margin"] == pytest.approx(silhouette_score(rows, labels), abs=0.15)
    expected = np.linalg.norm(partition.centroids[0] - partition.centroids[1])
    assert data["centroid_distances"][0][1] == pytest.approx(expected, abs=1e-3)


def test_report_is_json_and_prints_as_a_table(described):
    data = json.loads(json.dumps(described[2], allow_nan=False))
    out = io.StringIO()
    report.print_report(data, Console(file=out, width=100))
    assert "purity against world 100.0%" in out.getvalue()
    assert "a blue ball" in out.getvalue()


def test_report_of_one_cluster_without_attributes():
    features = np.random.default_rng(0).normal(size=(10, 3))
    partition, found = clusters.fit([str(i) for i in range(10)], features, num_clusters=1)
    data = report.report(
        partition,
        features,
        found,
        ["a"] * 10,
        [{}] * 10,
        {name: np.zeros(0, np.int32) for name in ("validation", "test")},
    )
    assert data["margin"] is None
    assert data["purity"] == {}
    report.print_report(data, Console(file=io.StringIO()))
