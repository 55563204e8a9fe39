"""Several ensembles and sampling settings are compared on the same held-out prompts; a repeated call does nothing."""

import numpy as np
import pytest

from paris_jax.errors import UserError
from paris_jax.evaluation import systems as module
from paris_jax.evaluation.features import WeightFiles
from paris_jax.evaluation.systems import System, evaluate_systems, systems

NONE = WeightFiles()


def test_every_ensemble_gets_every_combination():
    found = systems(["a", "b"], ["top_k=1,2", "guidance_scale=1,2.5"])
    assert len(found) == 8
    assert found[1] == System("a", (("top_k", 1), ("guidance_scale", 2.5)))
    assert systems(["a"], []) == [System("a")]


def test_experts_take_equal_parts_of_the_steps_in_their_order():
    none, one, both, lost = systems(["a"], ["fixed_expert=none,2,0+1"]) + systems(["a"], ["drop_experts=0+2"])
    assert none == System("a") and none.options(4) == {}
    assert one.options(3) == {"fixed_expert": [2, 2, 2]}
    assert both.options(4) == {"fixed_expert": [0, 0, 1, 1]} and both.changes == "fixed_expert=0+1"
    assert lost.options(4) == {"drop_experts": [0, 2]}
    steps = System("a", (("num_inference_steps", 2), ("fixed_expert", "1+0")))
    assert steps.options(30) == {"num_inference_steps": 2, "fixed_expert": [1, 0]}


@pytest.mark.parametrize(
    ("vary", "said"),
    [("topk=1,2", "did you mean 'top_k'"), ("top_k", "must be SETTING=VALUE"), ("top_k=one", "must be a whole number"),
     ("guidance_interval=1,2", "single number"), ("fixed_expert=a", "must be none, a cluster"),
     ("drop_expert=1", "did you mean 'drop_experts'")],
)  # fmt: skip
def test_a_wrong_setting_is_refused(vary, said):
    with pytest.raises(UserError, match=said):
        systems(["a"], [vary])


def test_a_sweep_scores_each_setting_and_resumes(micro, finished, tmp_path, monkeypatch):
    path = str(finished.ensemble)
    compared = systems([path], ["top_k=1,3"])
    sampled = []
    original = module.heldout.sample

    def sample(*args, **kwargs):
        sampled.append(args[3])
        if len(sampled) == 2 and not (tmp_path / "again").exists():
            (tmp_path / "again").touch()
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module.heldout, "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        evaluate_systems(micro, finished, compared, NONE, tmp_path / "out")
    found = evaluate_systems(micro, finished, compared, NONE, tmp_path / "out")
    assert sampled == [{"top_k": 1}, {"top_k": 3}, {"top_k": 3}]  # the first is not sampled again
    assert evaluate_systems(micro, finished, compared, NONE, tmp_path / "out") == found and len(sampled) == 3
    first, second = found["systems"]
    assert first["experts_per_step"] == 1 and second["experts_per_step"] == 3
    assert {"correct", "identity", "motion", "flicker"} <= first["scores"].keys()
    assert first["differences"] == {} and second["differences"]["correct"]["n"] == 2
    assert found["protocol"]["sampling"][path]["num_inference_steps"] == micro.sampling.num_inference_steps
    assert first["seconds_per_video"] > 0
    assert "validation" in found["protocol"]["prompts from"]  # settings are chosen where nothing is reported
    assert "top_k=3" in module.table(found) and "real clips" in module.table(found)


def test_experts_alone_switched_and_lost_are_scored_by_cluster(micro, finished, tmp_path):
    path, out = str(finished.ensemble), tmp_path / "out"
    compared = systems([path], ["fixed_expert=none,0,0+2"]) + systems([path], ["drop_experts=1"])
    routed, alone, switched, lost = evaluate_systems(micro, finished, compared, NONE, out)["systems"]
    assert routed["overrides"] == {} and switched["overrides"] == {"fixed_expert": "0+2"}
    assert alone["experts_per_step"] == switched["experts_per_step"] == 1
    assert sum(score["correct"]["n"] for score in routed["by_cluster"].values()) == routed["scores"]["correct"]["n"]
    assert lost["differences"].keys() == alone["differences"].keys()
    shown = module.table(module.manifest.read_json(out / "results.json"))
    assert "Attribute accuracy, prompts of" in shown and "drop_experts=1" in shown


def test_an_ensemble_and_the_monolith_start_from_the_same_noise(micro, finished, tmp_path, monkeypatch):
    noises = []
    original = module.heldout.sample
    monkeypatch.setattr(module.heldout, "sample", lambda *a, **k: noises.append(a[2]) or original(*a, **k))
    monolith = str(finished.path / "monolith" / "export")
    found = evaluate_systems(micro, finished, systems([str(finished.ensemble), monolith], []), NONE, tmp_path / "out")
    np.testing.assert_array_equal(noises[0], noises[1])
    assert "test" in found["protocol"]["prompts from"]
    assert [row["ensemble"] for row in found["systems"]] == [str(finished.ensemble), monolith]


def test_too_few_frames_for_a_network_are_refused_before_sampling(micro, finished, tmp_path, monkeypatch):
    from paris_jax.evaluation.features import FeatureNetwork

    network = FeatureNetwork("x", "FVD (I3D)", 4, 9, "", "", lambda videos: videos)
    monkeypatch.setattr(module.features, "networks", lambda files: [network])
    with pytest.raises(UserError, match="needs at least 9 frames, these videos have 4"):
        evaluate_systems(micro, finished, systems([str(finished.ensemble)], []), NONE, tmp_path / "out")


def test_a_sweep_without_validation_clips_is_refused(micro, finished, tmp_path):
    finished.validation.rmtree()
    with pytest.raises(UserError, match=r"no validation clips at .*raise .*config\.data\.validation_share"):
        evaluate_systems(micro, finished, systems([str(finished.ensemble)], ["top_k=1,2"]), NONE, tmp_path / "out")
