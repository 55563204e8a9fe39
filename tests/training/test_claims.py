"""Claimed held-out losses: recorded on a fixed probe, found again by validate, refused where they are not true."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from paris_jax import cli
from paris_jax.artifacts import exported, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import HeldoutManifest
from paris_jax.commands.assemble import assemble
from paris_jax.commands.seal import seal
from paris_jax.commands.validate import validate
from paris_jax.errors import UserError
from paris_jax.training import claims
from tests.artifacts.test_exported import edit_manifest


def expert_of(run):
    """An expert whose cluster has held-out clips."""
    sizes = manifest.read(run.validation, HeldoutManifest).sizes
    return Role("expert", int(np.argmax(sizes)))


@pytest.fixture
def claimed(finished):
    """A finished run whose expert 1 claims its loss."""
    seal(str(finished.export(expert_of(finished))), str(finished.path), None)
    return finished


def outcome(checks):
    return next((c.outcome, c.detail) for c in checks if c.name == "held-out")


@pytest.mark.parametrize("kind", ["expert", "router", "monolith"])
def test_a_claim_is_recorded_and_found_again(kind, finished):
    folder = finished.export(expert_of(finished) if kind == "expert" else Role(kind))
    assert outcome(validate(str(folder), probe=False)) == ("not run", "no loss is claimed")
    assert cli.run(["export", f"--network={folder}", f"--heldout={finished.path}"]) == 0
    said = exported.read(folder).manifest.heldout
    assert 0 < said.loss < 10 and said.timesteps == 4 and said.tolerance == 0.02
    found, detail = outcome(validate(str(folder), probe=False))
    assert found == "passed" and f"claimed {said.loss:.4g}" in detail
    before = (folder / manifest.FILE_NAME).read_bytes()
    seal(str(folder), str(finished.partition), None)
    assert (folder / manifest.FILE_NAME).read_bytes() == before


def test_a_network_elsewhere_is_validated_where_its_clips_are_given(claimed, tmp_path):
    shutil.copytree(claimed.export(expert_of(claimed)), tmp_path / "sent")
    assert outcome(validate(str(tmp_path / "sent"), probe=False))[0] == "not run"
    for data in (claimed.path, claimed.path / "data", claimed.partition, claimed.validation):
        assert outcome(validate(str(tmp_path / "sent"), probe=False, data=data))[0] == "passed"


def test_the_loss_is_that_of_the_clips_of_the_experts_cluster(claimed):
    part = exported.read(claimed.export(expert_of(claimed)))
    cluster = part.manifest.cluster
    clips = claims._clips(claimed.validation, cluster)
    assert {clip.cluster for clip in clips} == {cluster}
    assert part.manifest.heldout.clips == len(clips) <= claims.CLIPS


def test_padding_a_batch_changes_no_loss(claimed, monkeypatch):
    part = exported.read(claimed.export(expert_of(claimed)))
    loss = part.manifest.heldout.loss
    monkeypatch.setattr(claims, "BATCH", 3)
    assert claims.claim(part, claimed.validation).loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c.update(loss=c["loss"] * 0.9), "claims a held-out loss of .* and has"),
        (lambda c: c.update(loss=c["loss"] * 1.1), "claims a held-out loss of .* and has"),
        (lambda c: c.update(loss=0.0), "claims a held-out loss of 0 and has"),
        (lambda c: c.update(tolerance=0.5), "heldout.tolerance: expected `float` <= 0.02"),
        (lambda c: c.update(tolerance=0.0), "heldout.tolerance: expected `float` > 0"),
        (lambda c: c.update(loss=-1.0), "heldout.loss: expected `float` >= 0"),
        (lambda c: c.update(clips=1 + c["clips"]), "claims a loss of .* clips"),
        (lambda c: c.update(seed=7), "and seed 7"),
        (lambda c: c.update(timesteps=1), "1 timesteps"),
        (lambda c: c.update(law="best"), "heldout.law: invalid enum value"),
        (lambda c: c.update(data="0" * 64), "claims a loss on other held-out clips"),
        (lambda c: c.update(split="test"), "claims a loss on other held-out clips"),
        (lambda c: c.pop("data"), "missing required field `data`"),
    ],
)
def test_a_claim_that_is_too_good_or_of_another_probe_is_refused(change, sentence, claimed):
    edit_manifest(claimed.export(expert_of(claimed)), lambda m: change(m["heldout"]))
    with pytest.raises(UserError, match=sentence):
        validate(str(claimed.export(expert_of(claimed))), probe=False)


def test_the_claim_of_other_weights_is_refused(claimed):
    part = exported.read(claimed.export(expert_of(claimed)))
    worse = dataclasses.replace(part, params=jax.tree.map(lambda a: 5 * np.asarray(a), part.params))
    with pytest.raises(UserError, match=r"claims a held-out loss of .* and has"):
        claims.check(worse, claimed.validation)


def test_a_claim_is_needed_where_clips_are_given(finished, tmp_path):
    with pytest.raises(UserError, match="claims no held-out loss; record one with"):
        validate(str(finished.export(expert_of(finished))), probe=False, data=finished.path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no held-out clips; name a run folder"):
        claims.heldout_folder(tmp_path / "empty")


def test_altered_clips_and_clips_of_another_partition_are_refused(claimed):
    part = exported.read(claimed.export(expert_of(claimed)))
    edit_manifest(claimed.export(expert_of(claimed)), lambda m: m.update(partition="0" * 64))
    with pytest.raises(UserError, match="was trained with another partition than the clips"):
        validate(str(claimed.export(expert_of(claimed))), probe=False)
    shard = next(p for p in claimed.validation.iterdir() if p.suffix == ".array_record")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="was altered"):
        claims.check(part, claimed.validation)


def test_assemble_finds_the_claims_again_and_prints_the_table(claimed, micro, capsys):
    shutil.rmtree(claimed.ensemble)
    assemble(micro, claimed)
    shown = capsys.readouterr().out
    assert "held-out" in shown and "norms" in shown
    edit_manifest(claimed.export(expert_of(claimed)), lambda m: m["heldout"].update(loss=m["heldout"]["loss"] / 2))
    shutil.rmtree(claimed.ensemble)
    with pytest.raises(UserError, match="claims a held-out loss"):
        assemble(micro, claimed)
    assert not manifest.exists(claimed.ensemble)
    assert "failed" in capsys.readouterr().out


def test_a_new_claim_does_not_break_a_signature(claimed):
    (claimed.export(expert_of(claimed)) / "manifest.sig").write_text("{}")
    with pytest.raises(UserError, match="is signed, and a new claim would break that"):
        seal(str(claimed.export(expert_of(claimed))), str(claimed.path), None)


def test_training_reads_no_held_out_clips(finished):
    """An expert's job has its own cluster only; its claim is recorded afterwards."""
    assert exported.read(RunFolder(finished.path).export(expert_of(finished))).manifest.heldout is None
