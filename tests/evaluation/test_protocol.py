"""The evaluation stage: both models get the same, twice is once, an interrupted one goes on, and nothing half "
"passes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder, roles
from paris_jax.artifacts.schemas import EvaluationManifest
from paris_jax.clustering.build import cluster
from paris_jax.commands.assemble import assemble
from paris_jax.commands.train import train
from paris_jax.data.preparation import prepare
from paris_jax.data.records import read_records
from paris_jax.data.sources.shapes import ATTRIBUTES
from paris_jax.ensemble import sampling_params
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.errors import UserError
from paris_jax.evaluation import protocol as stage
from paris_jax.evaluation.heldout import Heldout
from paris_jax.evaluation.protocol import evaluate
from tests.evaluation.browser import browse, needs_browser

KEPT = ["kept_first", "kept_prefix"]  # rows of the kinds of frames that are given in training


@pytest.fixture(scope="module")
def larger(micro, tmp_path_factory):
    """An experiment with enough held-out clips for every row, evaluated as its stages do, and its run folder."""
    data = dataclasses.replace(micro.data, num_clips=100, heldout_fraction=0.45, validation_share=0.2)
    settings = dataclasses.replace(micro.evaluation, num_clips=16, num_loss_clips=16)
    training = dataclasses.replace(micro.training, steps=4)
    experiment = dataclasses.replace(micro, data=data, evaluation=settings, training=training)
    run = RunFolder(tmp_path_factory.mktemp("larger") / "run")
    prepare(experiment, run)
    cluster(experiment, run)
    for role in roles(experiment.clustering.num_clusters):
        train(experiment, run, role)
    assemble(experiment, run)
    evaluate(experiment, run)
    return experiment, run


def test_with_enough_clips_every_row_is_there(larger):
    experiment, run = larger
    found = json.loads((run.evaluation / "results.json").read_text())
    assert found["complete"] is True and found["left_out"] == []
    assert [c["id"] for c in found["comparisons"]] == [
        "attribute_accuracy",
        "frechet",
        "loss",
        "error",
        "motion",
        *KEPT,
    ]
    assert [c["id"] for c in found["companions"]] == ["shapes_kernel", "flicker", "identity"]
    assert any("64 features need 128 clips" in note for note in found["notes"])
    experts = found["experts"]
    assert np.shape(experts["loss"]) == (3, 3) and experts["oracle"]["n"] == 16
    own = [experts["loss"][k][k]["value"] * experts["loss"][k][k]["n"] for k in range(3) if experts["loss"][k][k]]
    assert sum(own) / 16 == pytest.approx(experts["oracle"]["value"], rel=1e-9)
    assert np.sum(found["router"]["confusion"], axis=(1, 2)).tolist() == [16] * 4
    frechet = found["comparisons"][1]
    assert all(0 < frechet[who]["value"] < np.inf and frechet[who]["stderr"] > 0 for who in ("ensemble", "monolith"))
    assert frechet["reference"]["value"] < min(frechet[model]["value"] for model in ("ensemble", "monolith"))
    assert found["protocol"]["prompts"] == experiment.evaluation.num_clips
    assert "Frechet distance (shapes classifier)" in (run.evaluation / "report.html").read_text()


@needs_browser
def test_a_browser_plays_every_video_of_the_report_it_wrote(larger):
    _, run = larger
    visit = browse(Path(run.evaluation / "report.html"), until="html[data-playing='6']")
    assert visit.data == {"videos": "6 of 6", "settled": "true", "playing": "6"}  # two prompts: real and two models
    assert visit.logged == [] and visit.asked == []


@pytest.fixture
def calls(monkeypatch):
    """What was sampled with: the model's number of experts, prompts, noise, settings, and which frames were given."""
    counted = []
    original = Ensemble.sample

    def sample(self, *args, **how):
        asked = {name: how.get(name) for name in sampling_params.FIELD_NAMES}
        settings = sampling_params.resolve(self.params, None, asked)
        names = ("num_inference_steps", "guidance_scale", "solver")
        used = {name: getattr(settings, name) for name in names}
        mask = None if "cond" not in how else np.asarray(how["cond"])[:, :, 0, 0, 0].tolist()
        counted.append((len(self.clusters), args[0], np.asarray(how["noise"]), used, mask))
        return original(self, *args, **how)

    monkeypatch.setattr(Ensemble, "sample", sample)
    return counted


def test_writes_results_and_report(micro, finished, calls):
    evaluate(micro, finished)
    found = json.loads((finished.evaluation / "results.json").read_text())
    assert (
        manifest.read(finished.evaluation, EvaluationManifest, verify=True).evaluation_hash == found["evaluation_hash"]
    )
    assert [c["id"] for c in found["comparisons"]] == ["attribute_accuracy", "loss", "error", "motion", *KEPT]
    assert "Frechet" in found["left_out"][0]  # with four prompts
    assert all(c["winner"] == "none" for c in found["comparisons"])
    assert found["compute"]["equal"] is True
    assert sum(e["steps"] for e in found["compute"]["experts"]) == found["compute"]["monolith"]["steps"]
    np.testing.assert_allclose(np.sum(found["expert_use"]["by_step"], axis=1), 1, atol=1e-5)
    assert len(found["expert_use"]["by_step"]) == micro.sampling.num_inference_steps
    assert len(found["router"]["accuracy"]) == micro.evaluation.loss_timesteps
    assert len(found["shown"]) == micro.evaluation.num_shown
    assert list(found["shown"][0]["asked"]) == list(ATTRIBUTES)  # and not by name
    for row in found["comparisons"]:
        for who in ("ensemble", "monolith", "difference"):
            assert row[who].keys() == {"value", "stderr", "n"}
    assert "data:video/mp4" in (finished.evaluation / "report.html").read_text()
    assert not (finished.evaluation / ".partial").exists()
    # Both models get the same prompts, noise, steps, guidance and solver, and they are the config's.
    (first, prompts1, noise1, used1, none1), (second, prompts2, noise2, told2, none2) = calls[:2]
    assert (first, second) == (3, 1) and none1 is none2 is None
    assert list(prompts1) == list(prompts2) and len(set(prompts1)) > 1
    np.testing.assert_array_equal(noise1, noise2)
    sampling = micro.sampling
    assert (
        used1
        == told2
        == {
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "solver": sampling.solver,
        }
    )
    # Then frames are given, each kind that was trained on, to both models alike and from the same noise.
    assert [(model, mask) for model, *_, mask in calls[2:]] == [(model, [[1, 0]] * 4) for _ in KEPT for model in (3, 1)]
    for _, prompts, noise, used, _ in calls[2:]:
        assert list(prompts) == list(prompts1) and used == used1
        np.testing.assert_array_equal(noise, noise1)
    rows = {row["id"]: row for row in found["comparisons"]}
    assert all(0 < rows[kind][model]["value"] < 2 for kind in KEPT for model in ("ensemble", "monolith", "reference"))


def test_an_evaluation_is_repeated_only_with_other_settings(micro, finished, calls):
    evaluate(micro, finished)
    before = (finished.evaluation / "report.html").read_bytes()
    evaluate(micro, finished)
    assert len(calls) == 6
    assert (finished.evaluation / "report.html").read_bytes() == before
    fewer = dataclasses.replace(micro, sampling=dataclasses.replace(micro.sampling, num_inference_steps=2))
    evaluate(fewer, finished)
    assert len(calls) == 12
    assert len(json.loads((finished.evaluation / "results.json").read_text())["expert_use"]["by_step"]) == 2


def test_an_interrupted_evaluation_resumes_after_its_cached_results(micro, finished, calls, monkeypatch):
    monkeypatch.setattr(
        stage.flow_loss, "heldout_losses", lambda *args, **how: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        evaluate(micro, finished)
    assert not manifest.exists(finished.evaluation)
    assert len(calls) == 2
    monkeypatch.undo()
    counted = []
    original = Ensemble.sample
    monkeypatch.setattr(Ensemble, "sample", lambda self, *a, **h: counted.append(h) or original(self, *a, **h))
    evaluate(micro, finished)
    assert len(counted) == 4 and all("cond" in how for how in counted)  # the other videos were kept
    assert manifest.exists(finished.evaluation)


def test_gives_the_same_results_again(micro, finished):
    evaluate(micro, finished)
    first = (finished.evaluation / "results.json").read_bytes()
    finished.evaluation.rmtree()
    evaluate(micro, finished)
    assert (finished.evaluation / "results.json").read_bytes() == first


def test_clips_without_attributes_leave_attribute_accuracy_out_and_say_so(micro, finished, monkeypatch):
    def blank(folder):
        return [dataclasses.replace(r, attributes={}) for r in read_records(folder)]

    monkeypatch.setattr(stage, "read_records", blank)
    evaluate(micro, finished)
    found = json.loads((finished.evaluation / "results.json").read_text())
    assert found["attribute_accuracy"] is None
    assert found["complete"] is False
    assert any("Attribute accuracy" in reason for reason in found["left_out"])
    assert "Attribute accuracy is left out" in (finished.evaluation / "report.html").read_text()


@pytest.mark.parametrize(
    ("folder", "said"),
    [("ensemble", "paris-jax assemble"), ("monolith", "--role=monolith"), ("partition", "paris-jax cluster")],
)
def test_a_missing_stage_is_named(micro, finished, folder, said):
    (finished.path / folder).rmtree()
    with pytest.raises(UserError, match=said):
        evaluate(micro, finished)


def test_too_few_heldout_clips_are_refused(micro, finished, monkeypatch):
    monkeypatch.setattr(stage, "read_records", lambda folder: list(read_records(folder))[:3])
    with pytest.raises(UserError, match="needs at least 4"):
        evaluate(micro, finished)


def test_another_config_is_refused(micro, finished):
    other = dataclasses.replace(micro, data=dataclasses.replace(micro.data, seed=9))
    with pytest.raises(UserError, match="another config"):
        evaluate(other, finished)


def test_heldout_order_is_stratified_and_does_not_depend_on_the_records_order(trained):
    records = list(read_records(trained.test))
    records = [dataclasses.replace(r, id=f"{r.id}-{i}", cluster=i % 3) for i in range(8) for r in records]
    first, again = Heldout.order(records, 0), Heldout.order(records[::-1], 0)
    assert first.ids == again.ids
    assert first.ids != Heldout.order(records, 1).ids
    half = first[: len(first) // 2].clusters
    np.testing.assert_allclose(
        np.bincount(half, minlength=3) / len(half), np.bincount(first.clusters) / len(first), atol=0.03
    )
