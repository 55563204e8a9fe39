"""`paris-jax validate`: every check of a network or an ensemble by name, and the first that fails."""

import dataclasses
import shutil

import numpy as np
import pytest

from paris_jax import cli
from paris_jax.artifacts import exported, manifest
from paris_jax.artifacts.run_folder import Role
from paris_jax.artifacts.schemas import NetworkManifest
from paris_jax.artifacts.validation import PEER_RATIO, Validation, root_mean_square
from paris_jax.commands.assemble import assemble
from paris_jax.commands.validate import validate
from paris_jax.errors import UserError
from paris_jax.models import functional
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
    content = {name: getattr(part.manifest, name) for name in set(NetworkManifest.__struct_fields__) - own}
    exported.write(folder, part.config, params, part.manifest.config_hash, "float32", **content)


def test_a_network_passes_every_check_in_order(expert, capsys):
    checks = validate(str(expert))
    assert [(c.name, c.outcome) for c in checks] == [(name, "passed") for name in (*exported.CHECKS, "probe")]
    assert "expert 1" in checks[0].detail and "all finite" in checks[4].detail
    assert "passed" in capsys.readouterr().out


def test_an_ensemble_is_checked_network_by_network_and_together(finished):
    checks = validate(str(finished.ensemble))
    assert {c.outcome for c in checks} == {"passed"}
    subjects = [c.subject for c in checks if c.name == "hash"]
    assert subjects == ["expert 0", "expert 1", "expert 2", "router"]
    assert [c.name for c in checks if c.subject == "ensemble"] == ["manifest", "together", "norms"]
    assert sum(c.name == "probe" for c in checks) == 4


def test_bundled_ensembles_pass_without_a_probe():
    assert {c.outcome for c in validate("bundled:shapes", probe=False)} == {"passed"}


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
    validation = Validation()
    with pytest.raises(UserError, match=sentence):
        validation.network(expert)
    outcomes = {c.name: c.outcome for c in validation.checks}
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
