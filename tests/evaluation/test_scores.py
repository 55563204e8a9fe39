"""From what was sampled and read to results: who is compared with what."""

import numpy as np
import pytest

from paris_jax.evaluation import results, scores
from paris_jax.evaluation.metrics.flow_loss import Losses
from paris_jax.evaluation.metrics.frechet import frechet_distance


class FakeJudge:
    """Features are the clip's mean colours; reads "light" or "dark"."""

    def predict(self, videos):
        features = videos.mean((1, 2, 3))
        return features, [{"ground": "light" if f.mean() > 0 else "dark"} for f in features]


def classified(means: np.ndarray) -> scores.ClassifiedVideos:
    videos = np.broadcast_to(means[:, None, None, None, :], (len(means), 2, 4, 4, 3))
    return scores.ClassifiedVideos(FakeJudge(), videos)


@pytest.fixture
def sets():
    rng = np.random.default_rng(0)
    real, others = rng.normal(0, 0.3, (2, 64, 3))
    made = {"real": real, "ensemble": real + rng.normal(0, 0.05, real.shape), "monolith": real * 0.2 + 0.4}
    return {who: classified(means) for who, means in made.items()}, classified(others)


def test_frechet_has_a_floor_at_the_same_count_and_names_the_better_arm(sets):
    by_model, others = sets
    row = scores.frechet(by_model, others, "")
    assert row["label"] == "Frechet distance (shapes classifier)"
    assert row["winner"] == "ensemble"
    assert row["reference"]["value"] == pytest.approx(frechet_distance(by_model["real"].features, others.features))
    assert row["reference"]["n"] == row["ensemble"]["n"] == row["monolith"]["n"] == 64
    assert row["difference"]["value"] == pytest.approx(row["ensemble"]["value"] - row["monolith"]["value"])


def test_a_difference_within_the_error_of_the_floor_has_no_winner(sets):
    by_model, others = sets
    real = by_model["real"].features
    calmer = {"real": by_model["real"], "ensemble": classified(real * 0.99), "monolith": classified(real)}
    row = scores.frechet(calmer, others, "")
    assert 0 < abs(row["difference"]["value"]) < row["reference"]["stderr"]
    assert row["winner"] == "none"


def test_attribute_accuracy_has_the_real_clips_as_its_ceiling(sets):
    by_model, _ = sets
    asked = by_model["real"].read
    row, by_attribute = scores.attribute_accuracy(asked, by_model)
    assert row["reference"]["value"] == 1
    assert row["ensemble"]["value"] > row["monolith"]["value"]
    assert row["winner"] == "ensemble"
    assert by_attribute["ground"]["ensemble"] == row["ensemble"]  # the only attribute


def test_losses_are_paired_by_clip():
    hard = np.linspace(0.2, 2, 40)[:, None] + np.zeros((40, 4))
    made = {"ensemble": Losses(hard - 0.01, hard), "monolith": Losses(hard, hard)}
    loss, error = scores.flow(made)
    assert loss["winner"] == "ensemble"  # a small gap on every clip, however much the clips differ
    assert loss["difference"]["stderr"] < 1e-9 < loss["ensemble"]["stderr"]
    assert error["winner"] == "none"
    curves = scores.flow_curves(made, np.arange(40) % 2, 3)
    assert curves["loss_by_time"]["edges"] == [0, 0.25, 0.5, 0.75, 1]
    assert curves["loss_by_time"]["difference"][2]["value"] == pytest.approx(-0.01)
    assert curves["loss_by_cluster"]["ensemble"][2] is None


def test_router_accuracy_stands_beside_the_largest_cluster():
    clusters = np.array([0] * 7 + [1] * 3)
    probability = np.repeat(np.eye(2)[clusters][:, None], 4, axis=1)
    probability[:5, 3] = [0, 1]
    made = scores.router(probability, clusters)
    assert [e["value"] for e in made["accuracy"]] == [1, 1, 1, 0.5]
    assert made["chance"] == 0.7


def test_expert_use_by_step_and_by_cluster_of_the_prompt():
    routing = np.zeros((3, 4, 2), np.float32)
    routing[:, :3, 0] = 1
    routing[:, 3:, 1] = 1
    made = scores.expert_use(routing, [0, 2], np.array([0, 0, 2, 2]))
    assert made["by_step"] == [[0.75, 0.25]] * 3
    assert made["by_cluster"] == {"0": [1.0, 0.0], "2": [0.5, 0.5]}


def compared(value: float, stderr: float, n: int, smallest: float = 0.0) -> dict:
    by_model = {model: {"value": 1.0, "stderr": 0.1, "n": n} for model in results.MODELS}
    return results.compare(
        "loss", "Loss", "lower", by_model, {"value": value, "stderr": stderr, "n": n}, smallest=smallest
    )


def test_a_withheld_verdict_gives_the_reason():
    few = compared(-17.0, 1.0, 4)  # 17 standard errors
    assert few["winner"] == "none" and few["withheld"] == "4 clips are too few for a verdict, which needs 8"
    assert results.headline([few]) == "No verdict: 4 clips are too few for a verdict, which needs 8."
    within = compared(-5.0, 0.3, 96, smallest=6.0)
    assert within["winner"] == "none" and "within the error of real clips" in within["withheld"]


def test_a_verdict_decided_by_the_interval_is_not_withheld():
    assert compared(-17.0, 1.0, 96)["winner"] == "ensemble" and compared(-17.0, 1.0, 96)["withheld"] == ""
    unclear = compared(-1.0, 1.0, 4)
    assert unclear["winner"] == "none" and unclear["withheld"] == ""
    assert "No clear winner" in results.headline([unclear])
