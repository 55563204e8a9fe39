"""The clustering report gives size, separation and purity of the clusters."""

import io
import json

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import silhouette_score

from paris_jax.clustering import clusters, report
from paris_jax.clustering.clusters import Method
from paris_jax.clustering.heldout import TEST, VALIDATION
from paris_jax.clustering.report import Report

IDS = [f"c{i:03d}" for i in range(100)]


@pytest.fixture
def described():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1], [60, 40])
    features = np.eye(2, 4)[truth] * 20 + rng.normal(size=(100, 4))
    captions = [f"a {'red' if k == 0 else 'blue'} ball" for k in truth]
    attributes = [
        {"world": "flat" if k == 0 else "digits", "size": "large" if i % 2 else "small"} for i, k in enumerate(truth)
    ]
    partition, found = clusters.fit([f"c{i:03d}" for i in range(100)], features, Method(2))
    made = Report(partition)
    for part in (slice(0, 33), slice(33, 100)):
        made.add(
            features[part], found[part], np.zeros(100, np.uint8)[part], IDS[part], captions[part], attributes[part]
        )
    for split, part in ((VALIDATION, slice(0, 5)), (TEST, slice(90, 100))):
        splits = np.full(part.stop - part.start, split)
        made.add(features[part], partition.assign(features[part]), splits, IDS[part], captions[part], attributes[part])
    return partition, features, made.to_json()


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
    partition, found = clusters.fit(IDS[:10], features, Method(1))
    made = Report(partition)
    made.add(features, found, np.zeros(10, np.uint8), IDS[:10], ["a"] * 10, [{}] * 10)
    data = made.to_json()
    assert data["margin"] is None
    assert data["purity"] == {}
    report.print_report(data, Console(file=io.StringIO()))


def test_distinctive_words_are_those_of_the_cluster(described):
    words = [[w["word"] for w in c["words"]] for c in described[2]["clusters"]]
    assert words == [["red"], ["blue"]]
    assert described[2]["clusters"][0]["words"][0] | {"word": ""} == {"word": "", "share": 1.0, "others": 0.0}
