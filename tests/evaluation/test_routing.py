"""The router's accuracy, confusion and calibration are the known ones for known probabilities."""

import numpy as np
import pytest

from paris_jax.evaluation.metrics import routing
from paris_jax.evaluation.metrics.flow_loss import Points

CLUSTERS = np.array([0, 0, 1, 2])
# Clip 1 is taken for cluster 2 in the second bin; all others are right.
PROBABILITY = np.array(
    [
        [[0.8, 0.1, 0.1], [0.6, 0.2, 0.2]],
        [[0.9, 0.05, 0.05], [0.2, 0.2, 0.6]],
        [[0.1, 0.8, 0.1], [0.1, 0.6, 0.3]],
        [[0.1, 0.1, 0.8], [0.2, 0.2, 0.6]],
    ]
)


def test_accuracy_is_that_of_each_bin():
    assert [e["value"] for e in routing.accuracy(PROBABILITY, CLUSTERS)] == [1.0, 0.75]


def test_confusion_has_own_clusters_in_rows():
    found = routing.confusion(PROBABILITY, CLUSTERS)
    assert found.sum((1, 2)).tolist() == [4, 4]
    np.testing.assert_array_equal(found[0], np.diag([2, 1, 1]))
    np.testing.assert_array_equal(found[1], [[1, 0, 1], [0, 1, 0], [0, 0, 1]])


def test_calibration_is_the_gap_of_confidence_and_accuracy():
    found = routing.calibration(PROBABILITY[:, 1], CLUSTERS)
    assert found["count"] == [4] and found["confidence"] == pytest.approx([0.6]) and found["accuracy"] == [0.75]
    assert found["error"] == pytest.approx(0.15)
    assert found["log_loss"] == pytest.approx(-np.log([0.6, 0.2, 0.6, 0.6]).mean())
    assert routing.calibration(PROBABILITY, CLUSTERS)["count"] == [4, 3, 1]


def test_a_router_with_the_true_frequencies_is_calibrated():
    rng = np.random.default_rng(0)
    probability = rng.dirichlet(np.ones(3), 20_000)
    clusters = np.array([rng.choice(3, p=p) for p in probability])
    assert routing.calibration(probability, clusters)["error"] < 0.02


def test_router_and_experts_are_measured_at_every_point():
    latents = np.random.default_rng(1).standard_normal((5, 1, 2, 2, 1)).astype(np.float32)
    points = Points.draw(latents, list("abcde"), 3, 0)
    calls = []

    def route(x, t, index):
        return np.stack([t, 0 * t, 1 - t], axis=1)

    experts = {0: lambda x, t, index: 0 * x, 2: lambda x, t, index: 0 * x + 1}
    found = routing.measure(route, experts, points, 3, batch=2, advance=lambda: calls.append(1))
    np.testing.assert_allclose(found.probability[..., 0], points.times)
    target = points.noise(3, 1) - latents[3]
    np.testing.assert_allclose(found.losses[:, 3, 1], [np.mean(target**2), np.mean((1 - target) ** 2)], rtol=1e-6)
    # Velocities 0 and 1 with weights t and 1 - t have a standard deviation of sqrt(t (1 - t)), their x0 t times that.
    t = points.times.astype(float)
    np.testing.assert_allclose(found.disagreement, t * np.sqrt(t * (1 - t)), rtol=1e-5)
    assert len(calls) == 9


def test_experts_by_cluster_and_the_oracle():
    losses = np.arange(2 * 4 * 1, dtype=float).reshape(2, 4, 1)  # experts of clusters 0 and 2
    clusters = np.array([0, 2, 2, 0])
    found = routing.experts_by_cluster(losses, clusters, 3)
    assert [[e and e["value"] for e in row] for row in found] == [[1.5, None, 1.5], [5.5, None, 5.5]]
    np.testing.assert_array_equal(routing.oracle_losses(losses, [0, 2], clusters)[:, 0], [0, 5, 6, 3])
    with pytest.raises(ValueError, match=r"clusters \[1\] have clips and no expert"):
        routing.oracle_losses(losses, [0, 2], np.array([0, 1, 2, 0]))


def test_entropy_of_use_is_one_for_equal_and_zero_for_single_use():
    assert routing.use_entropy(np.full((3, 2, 4), 0.25)) == pytest.approx(1)
    assert routing.use_entropy(np.eye(3)[[1, 1]][None]) == 0
