"""`paris-jax validate`: every check of a network or an ensemble by name, and the first that fails."""

import dataclasses
import shutil

import numpy as np
import pytest

from paris_jax import cli
from paris_jax.artifacts import exported, manifest, validation
from paris_jax.artifacts.run_folder import Role
from paris_jax.artifacts.schemas import ClusterManifest, NetworkManifest
from paris_jax.artifacts.validation import PEER_RATIO, Validation, root_mean_square
from paris_jax.commands.assemble import assemble
from paris_jax.commands.validate import validate
from paris_jax.config import hashing
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.models.dit import video_tokens
from tests.artifacts.test_exported import edit_manifest

EXPERT = Role("expert", 1)


@pytest.fixture
def expert(trained, tmp_path):
    return shutil.copytree(trained.export(EXPERT), tmp_path / "expert")


def rewritten(folder, change):
    """Changes the parameters of an exported network, with a manifest that fits them."""
    part = exported.read(folder)
    params = functional.from_names({n: change(a) for n, a in functional.to_names(part.params).items()})
    own = {"schema", "kind", "files", "config_hash", "versions", "conventions", "network", "parameters", "dtype"}
    own |= {"tree"}
    content = {name: getattr(part.manifest, name) for name in set(NetworkManifest.__struct_fields__) - own}
    exported.write(folder, part.config, params, part.manifest.config_hash, "float32", **content)


def test_a_network_passes_every_check_in_order(expert, capsys):
    checks = validate(str(expert))
    assert [(c.name, c.outcome) for c in checks] == [
        *((name, "passed") for name in exported.CHECKS), ("held-out", "not run"), ("probe", "passed")
    ]  # fmt: skip
    assert "expert 1" in checks[0].detail and "all finite" in checks[4].detail
    assert "passed" in capsys.readouterr().out


def test_an_ensemble_is_checked_network_by_network_and_together(finished):
    checks = validate(str(finished.ensemble))
    assert {c.outcome for c in checks if c.name != "held-out"} == {"passed"}
    subjects = [c.subject for c in checks if c.name == "hash"]
    assert subjects == ["expert 0", "expert 1", "expert 2", "router"]
    assert [c.name for c in checks if c.subject == "ensemble"] == ["manifest", "together", "norms"]
    assert sum(c.name == "probe" for c in checks) == 4


def test_bundled_ensembles_pass_without_a_probe():
    assert {c.outcome for c in validate("bundled:shapes", probe=False) if c.name != "held-out"} == {"passed"}


def flip_a_byte(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name", "sentence"),
    [
        (lambda folder: edit_manifest(folder, lambda m: m.update(role="king")), "manifest", "role"),
        (lambda folder: (folder / "extra.txt").write_text("x"), "files", "extra.txt, which its manifest does not name"),
        (flip_a_byte, "hash", "was altered"),
    ],
)  # fmt: skip
def test_the_first_failed_check_is_named_and_those_after_it_are_not_run(damage, name, sentence, expert, capsys):
    damage(expert)
    assert cli.run(["validate", str(expert)]) == 1
    shown = capsys.readouterr()
    assert sentence in shown.err
    made = Validation()
    with pytest.raises(UserError, match=sentence):
        made.network(expert)
    outcomes = {c.name: c.outcome for c in made.checks}
    position = exported.CHECKS.index(name)
    expected = ["passed"] * position + ["failed"] + ["not run"] * (len(exported.CHECKS) - position - 1)
    assert [outcomes[check] for check in exported.CHECKS] == expected


def test_a_sample_that_is_not_finite_or_constant_fails_the_probe(expert):
    part = exported.read(expert)
    huge = functional.from_names({n: np.full_like(a, 3e38) for n, a in functional.to_names(part.params).items()})
    with pytest.raises(UserError, match="values that are not finite"):
        Validation().sample(dataclasses.replace(part, params=huge), "huge")
    zeros = functional.from_names({n: np.zeros_like(a) for n, a in functional.to_names(part.params).items()})
    of_x0 = dataclasses.replace(part.config, prediction_type="x0")
    with pytest.raises(UserError, match="a constant sample"):
        Validation().sample(dataclasses.replace(part, params=zeros, config=of_x0), "zeros")


def test_an_expert_whose_norm_is_far_from_its_peers_is_not_assembled(micro, finished, tmp_path):
    run = type(finished)(shutil.copytree(finished.path, tmp_path / "copy"))
    before = root_mean_square(exported.read(run.export(EXPERT)).params)
    rewritten(run.export(EXPERT), lambda a: a * 2 * PEER_RATIO)
    assert root_mean_square(exported.read(run.export(EXPERT)).params) == pytest.approx(
        before * 2 * PEER_RATIO, rel=1e-3
    )
    shutil.rmtree(run.ensemble)
    with pytest.raises(UserError, match="the experts' median is"):
        assemble(micro, run)
    assert not manifest.exists(run.ensemble)


def test_a_missing_path_is_refused(capsys):
    assert cli.run(["validate", "nowhere"]) == 1
    assert "There is no exported network or ensemble at nowhere" in capsys.readouterr().err
    assert cli.run(["validate"]) == 1
    assert "Name one network or ensemble" in capsys.readouterr().err


def test_the_provenance_of_a_trained_network_is_recorded_and_shown(trained, micro):
    found = exported.read(trained.export(EXPERT)).manifest
    cluster = manifest.read(trained.cluster(1), ClusterManifest)
    assert found.data == hashing.hash_text(hashing.canonical_json([manifest.contents_hash(cluster)]))
    assert found.experiment == hashing.without_paths(micro.to_dict()) and found.config_hash == micro.hash
    assert found.tree == exported.tree_hash(exported.read(trained.export(EXPERT)).config)
    assert 0 < found.training.ema_decay <= micro.training.ema_decay
    assert len(found.code.revision) in (0, 40, 64)
    detail = validate(str(trained.export(EXPERT)), probe=False)[0].detail
    for said in (f"config {found.config_hash[:12]}", f"data {found.data[:12]}", "12 steps of 4, EMA 0.", " FLOP"):
        assert said in detail


def test_a_published_config_has_no_path():
    config = {"data": {"folder": "/home/ann/videos/", "names": ["C:\\Users\\ann\\x", "gs://secret/a", "plain"], "n": 3}}
    assert hashing.without_paths(config) == {"data": {"folder": "videos", "names": ["x", "a", "plain"], "n": 3}}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m["conventions"].update(time="t = 1 data"), "its time is 't = 1 data', this version knows"),
        (lambda m: m["conventions"].update(path="x"), "its path is 'x', this version knows"),
        (lambda m: m.update(parameters=1), "promises 1 parameters, it has"),
        (lambda m: m.update(dtype="bfloat16"), "has dtype float32 instead of bfloat16"),
        (lambda m: m.update(tree="0" * 64), "another parameter tree"),
        (lambda m: m.update(data="x"), "data: expected `str`"),
        (lambda m: m.update(code={"revision": "x"}), "code.revision: expected `str`"),
        (lambda m: m.update(experiment=[]), "experiment: expected `object`"),
        (lambda m: m["latent"].update(shape=[65536, 65536, 2, 2]), "shape has more than 268,435,456 values"),
        (lambda m: m["network"].update(single_blocks=1000), "a network of more than .* parameters, its files have"),
        (lambda m: m["network"].update(mlp_ratio=64), "a network of more than .* parameters, its files have"),
    ],
)
def test_a_manifest_whose_promises_do_not_fit_is_refused(change, sentence, expert):
    edit_manifest(expert, change)
    with pytest.raises(UserError, match=sentence):
        validate(str(expert), probe=False)


def test_sizes_are_bounded_before_anything_is_traced(expert, monkeypatch):
    edit_manifest(expert, lambda m: m["network"].update(single_blocks=1000))
    monkeypatch.setattr(functional, "abstract", lambda config: 1 / 0)
    with pytest.raises(UserError, match="a network of more than"):
        exported.read(expert)


@pytest.mark.parametrize(
    ("shape", "probed"),
    [((4, 10, 10, 24), (4, 10, 10, 24)), ((33, 96, 96, 16), (1, 96, 96, 16)), ((9, 1024, 2, 4), (9, 128, 2, 4))],
)
def test_a_large_latent_is_cut_for_the_probe(shape, probed):
    assert validation._probe_shape(shape) == probed
    assert video_tokens(probed) <= validation.TOKENS
