"""Short trainings that compare settings: the same data for all, nothing trained twice, the best one named."""

import dataclasses
import json
import logging

import numpy as np
import pytest

from paris_jax.artifacts.run_folder import Role
from paris_jax.errors import UserError
from paris_jax.training import metrics
from paris_jax.training.sweep import sweep, variants

EXPERT = Role("expert", 0)


def test_the_learning_rate_that_learns_most_is_found(micro, run, capsys, caplog):
    """Of three rates, one that moves nothing, one that learns and one that breaks the network."""
    vary = ["training.learning_rate=1e-9,3e-3,1e9"]
    found = sweep(micro, run, EXPERT, vary, steps=40)
    slow, good, broken = (entry["loss"] for entry in found["variants"])
    assert good < 0.97 * slow and (broken is None or broken > slow)
    assert found["best"] == ["training.learning_rate=3e-3"]
    assert json.loads((run.sweep(EXPERT) / "results.json").read_text()) == found
    assert "--config.training.learning_rate=3e-3" in capsys.readouterr().out
    assert not run.export(EXPERT).exists() and not run.checkpoints(EXPERT).exists()

    lines = {path: metrics.read(path) for path in run.sweep(EXPERT).glob("*/metrics.jsonl")}
    first = sorted(each[0]["loss"] for each in lines.values())[:2]
    np.testing.assert_allclose(first[0], first[1], rtol=1e-6)  # the same clips, times and noise, before any update
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert sweep(micro, run, EXPERT, vary[:1], steps=40) == found  # nothing that ended is trained again
    assert "the data keep" not in caplog.text


def test_settings_are_combined_and_kept_in_proportion(micro):
    made = variants(
        micro, Role("router"), ["router_training.global_batch_size=4,8", "router.preset=tiny,small"], steps=6
    )
    assert [variant.name for variant in made] == [
        "router_training.global_batch_size=4, router.preset=tiny",
        "router_training.global_batch_size=4, router.preset=small",
        "router_training.global_batch_size=8, router.preset=tiny",
        "router_training.global_batch_size=8, router.preset=small",
    ]
    settings = made[1].experiment.router_training
    assert (settings.steps, settings.warmup_steps, settings.global_batch_size) == (
        6,
        1,
        4,
    )  # two of twelve were the warm-up
    assert len({variant.experiment.hash for variant in made}) == 4


def test_by_default_learning_rates_around_the_configs_are_tried(micro):
    made = variants(micro, EXPERT, [], steps=50)
    rates = [variant.experiment.training.learning_rate for variant in made]
    np.testing.assert_allclose(rates, np.array([1 / 27, 1 / 9, 1 / 3, 1, 3, 9]) * 1e-3, rtol=0.02)


@pytest.mark.parametrize(
    "vary, sentence",
    [
        ("data.seed=1,2", r"--vary=data.seed=1,2: must be FIELD=VALUE"),
        ("training.learning_rate", r"--vary=training.learning_rate: must be"),
        ("training.learning_rat=1,2", r"training.learning_rat is unknown; .* \(did you mean 'learning_rate'\?\)"),
        ("training.learning_rate=fast", r"training.learning_rate='fast': must be a float"),
    ],
)
def test_fields_that_cannot_be_varied_are_refused(vary, sentence, micro, run):
    with pytest.raises(UserError, match=sentence):
        sweep(micro, run, EXPERT, [vary], steps=8)
    assert not run.sweep(EXPERT).exists()


@pytest.mark.parametrize(
    "role, vary",
    [
        (Role("router"), "training.learning_rate=1e-4,1e-3"),
        (EXPERT, "router_training.learning_rate=1e-4,1e-3"),
        (EXPERT, "training.grad_accum_steps=1,2"),
        (EXPERT, "training.learning_rate=1e-3,0.001"),
    ],
)
def test_trainings_that_would_be_the_same_are_refused(role, vary, micro):
    with pytest.raises(UserError, match=r"1 of the 2 trainings of (router|expert 0) would be the same"):
        variants(micro, role, [vary], steps=8)


def test_a_sweep_starts_from_the_weights_that_training_would_start_from(micro, run, trained):
    def loss(start):
        experiment = dataclasses.replace(micro, training=dataclasses.replace(micro.training, init_from=str(start)))
        return sweep(experiment, run, EXPERT, ["training.learning_rate=1e-9"], steps=8)["variants"][0]["loss"]

    losses = [loss(start) for start in ("", trained.export(EXPERT), trained.export(Role("expert", 1)))]
    assert len(set(losses)) == 3  # none is taken for another one's
    with pytest.raises(UserError, match=r"holds another network: .*; choose network.preset to fit, or other weights"):
        loss(trained.export(Role("router")))


def test_too_few_steps_are_refused(micro, run):
    with pytest.raises(UserError, match=r"--steps=3: must be at least 4"):
        sweep(micro, run, EXPERT, [], steps=3)
