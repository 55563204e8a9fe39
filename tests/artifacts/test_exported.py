"""Validation of exported networks: altered, missing, extra or non-finite files and mismatched networks are refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from paris_jax.artifacts import ensemble_manifest, exported, manifest, weight_files
from paris_jax.artifacts.run_folder import Role
from paris_jax.commands.assemble import assemble
from paris_jax.errors import UserError

EXPERT = Role("expert", 1)


@pytest.fixture
def run(finished):
    """A trained run folder that a test may damage."""
    return finished


def rewrite(folder: Path, change):
    """Replaces the weights and updates the manifest to match, as an attacker would."""
    arrays = change(dict(safetensors.numpy.load_file(folder / weight_files.WEIGHTS)))
    safetensors.numpy.save_file(arrays, folder / weight_files.WEIGHTS)
    edit_manifest(
        folder, lambda m: m["files"][weight_files.WEIGHTS].update(size_and_hash(folder / weight_files.WEIGHTS))
    )


def size_and_hash(path: Path):
    return {"bytes": path.stat().st_size, "sha256": manifest.hash_file(path)}


def edit_manifest(folder: Path, change):
    path = Path(folder) / manifest.FILE_NAME
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_flipped_bit_is_refused(run):
    weights = Path(run.export(EXPERT)) / weight_files.WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"experts/1/export/model.safetensors was altered"):
        ensemble_manifest.read(run.ensemble)


def test_a_truncated_file_is_refused(run):
    weights = Path(run.export(EXPERT)) / weight_files.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model.safetensors has \d+ bytes where its manifest promises"):
        ensemble_manifest.read(run.ensemble)


@pytest.mark.parametrize("name", [weight_files.WEIGHTS, manifest.FILE_NAME])
def test_a_missing_file_is_refused(name, run):
    (Path(run.export(EXPERT)) / name).unlink()
    with pytest.raises(UserError, match=name):
        ensemble_manifest.read(run.ensemble)


def test_an_extra_file_is_refused(run):
    (Path(run.export(EXPERT)) / "more.py").write_text("print('run me')")
    with pytest.raises(UserError, match=r"more.py, which its manifest does not name"):
        ensemble_manifest.read(run.ensemble)


def with_first(change):
    def changed(arrays):
        name = sorted(arrays)[0]
        return arrays | change(name, arrays[name])

    return changed


@pytest.mark.parametrize(
    "change, message",
    [
        (with_first(lambda name, a: {name: np.full_like(a, np.nan)}), "not finite"),
        (with_first(lambda name, a: {name: np.full_like(a, np.inf)}), "not finite"),
        (with_first(lambda name, a: {name: a[:-1].copy()}), "has shape"),
        (with_first(lambda name, a: {name: a.astype(np.float64)}), "has dtype float64"),
        (with_first(lambda name, a: {"smuggled": a}), "smuggled is extra"),
        (lambda arrays: dict(list(arrays.items())[1:]), "is missing"),
    ],
    ids=["nan", "infinite", "shape", "dtype", "extra", "missing"],
)
def test_a_bad_array_is_refused_by_name_even_when_the_hashes_agree(change, message, run):
    rewrite(Path(run.export(EXPERT)), change)
    with pytest.raises(UserError, match=f"experts/1/export/model.safetensors cannot be loaded: .*{message}"):
        exported.read(run.export(EXPERT))


@pytest.mark.parametrize(
    "what, change, message",
    [
        ("part", lambda m: m.pop("files"), r"experts/1/export/manifest.json: .* missing required field `files`"),
        ("part", lambda m: m.pop("network"), r"experts/1/export/manifest.json: .* missing required field `network`"),
        ("part", lambda m: m["network"].update(hidden="x"), r"network.hidden: expected `int`, got `str`"),
        ("part", lambda m: m["network"].update(heads=0), r"network.heads: expected `int` >= 1"),
        ("part", lambda m: m["network"].pop("heads"), r"network: object missing required field `heads`"),
        ("part", lambda m: m["network"].update(rope_axes=[2, 2, 2]), r"must be even and add up to hidden / heads"),
        ("part", lambda m: m["network"].update(attention="x"), r"network.attention: invalid enum value 'x'"),
        ("ensemble", lambda m: m.pop("experts"), r"ensemble/manifest.json: .* missing required field `experts`"),
        ("ensemble", lambda m: m.pop("sampling"), r"ensemble/manifest.json: .* missing required field `sampling`"),
    ],
)
def test_an_altered_manifest_is_refused_with_the_reason(what, change, message, run):
    edit_manifest(run.export(EXPERT) if what == "part" else run.ensemble, change)
    with pytest.raises(UserError, match=message):
        ensemble_manifest.read(run.ensemble)


def test_all_problems_are_reported_at_once(run):
    rewrite(Path(run.export(EXPERT)), lambda arrays: {name: a * np.nan for name, a in arrays.items()})
    with pytest.raises(UserError, match=r"and \d+ more"):
        exported.read(run.export(EXPERT))


def test_a_network_replaced_after_assembly_is_refused(run):
    edit_manifest(Path(run.export(EXPERT)), lambda m: m.update(note="retrained"))
    with pytest.raises(UserError, match=r"is not the network that .*/ensemble names"):
        ensemble_manifest.read(run.ensemble)


@pytest.mark.parametrize(
    "field, change",
    [
        ("latent", lambda m: m["latent"].update(mean=[0.5])),
        ("text", lambda m: m["text"].update(max_tokens=99)),
        ("codec", lambda m: m["codec"].update(time=1)),
        ("clusters", lambda m: m.update(clusters=7)),
        ("fps", lambda m: m.update(fps=99.0)),
    ],
)
def test_a_network_with_another_latent_or_text_contract_is_refused_by_field(field, change, run, micro):
    edit_manifest(Path(run.export(EXPERT)), change)
    with pytest.raises(UserError, match=f"does not belong with .* its {field} is "):
        assemble(micro, run)


def test_an_expert_in_the_folder_of_another_cluster_is_refused(run, micro):
    shutil.rmtree(run.export(EXPERT))
    shutil.copytree(run.export(Role("expert", 2)), run.export(EXPERT))
    with pytest.raises(UserError, match="is the expert of cluster 2, not of cluster 1"):
        assemble(micro, run)


def test_a_missing_expert_is_refused_unless_allowed(run, micro):
    shutil.rmtree(run.role(EXPERT))
    with pytest.raises(
        UserError, match=r"Expert 1 is not trained: run 'paris-jax train .*--cluster=1'.*--allow_missing"
    ):
        assemble(micro, run)
    assemble(micro, run, allow_missing=True)
    assert sorted(ensemble_manifest.read(run.ensemble).experts) == [0, 2]


def test_a_missing_router_is_refused(run, micro):
    shutil.rmtree(run.role(Role("router")))
    with pytest.raises(UserError, match=r"router is not trained.*--role=router"):
        assemble(micro, run)


def test_a_run_folder_of_another_config_is_refused(run, micro):
    other = dataclasses.replace(micro, training=dataclasses.replace(micro.training, seed=1))
    with pytest.raises(UserError, match=r"made with another config \(different: training.seed\)"):
        assemble(other, run)


def test_a_network_trained_with_another_config_is_refused(run, micro):
    edit_manifest(run.export(EXPERT), lambda m: m.update(config_hash="0" * 64))
    with pytest.raises(UserError, match=r"experts/1/export was trained with another config than .*config.json"):
        assemble(micro, run)


def test_networks_with_different_timestep_shifts_are_refused(run, micro):
    edit_manifest(run.export(EXPERT), lambda m: m.update(timestep_shift=3.0))
    with pytest.raises(UserError, match=r"its timestep_shift is (3.0 instead of 2.0|2.0 instead of 3.0)"):
        assemble(micro, run)


def test_a_missing_ensemble_is_refused_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match=r"no ensemble at .*; make it with 'paris-jax assemble"):
        ensemble_manifest.read(tmp_path / "ensemble")


def test_assembling_again_logs_it_and_keeps_the_manifest(run, micro, caplog):
    before = (Path(run.ensemble) / manifest.FILE_NAME).read_bytes()
    with caplog.at_level("INFO"):
        assemble(micro, run)
    assert "was assembled already" in caplog.text
    assert (Path(run.ensemble) / manifest.FILE_NAME).read_bytes() == before


def test_a_bfloat16_export_is_read_back_exactly_as_rounded(run, tmp_path):
    network = exported.read(run.export(EXPERT))
    names = [*(k for k in ensemble_manifest.SHARED if k != "conventions"), "role", "cluster"]
    content = {name: getattr(network.manifest, name) for name in names}
    exported.write(tmp_path / "half", network.config, network.params, "", "bfloat16", **content)
    kernel = exported.read(tmp_path / "half").params["video_in"]["kernel"]
    expected = network.params["video_in"]["kernel"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(kernel, expected)


def test_an_unknown_bundled_ensemble_is_refused():
    with pytest.raises(UserError, match="no 'bundled:nothing' in this package"):
        ensemble_manifest.read("bundled:nothing")
