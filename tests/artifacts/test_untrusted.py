"""Untrusted files: manifests name paths inside their folder only, and only regular files of bounded size are read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from paris_jax.artifacts import ensemble_manifest, manifest, safe_files, weight_files
from paris_jax.artifacts.publish import publish
from paris_jax.artifacts.schemas import NetworkManifest
from paris_jax.artifacts.tensors import Tensors
from paris_jax.commands.assemble import assemble
from paris_jax.errors import UserError

BUNDLED = Path(ensemble_manifest.BUNDLED_FOLDER / "shapes")
OUTSIDE = (
    "../../../name",
    "..",
    "a/../../b",
    "/etc/passwd",
    "~/name",
    "gs://bucket/name",
    "s3://bucket/name",
    "C:\\name",
    "./name",
    "a//b",
    ".hidden",
    "name\n",
    "nul\0l",
    "",
    "x" * 999,
)


@pytest.fixture
def folder(tmp_path):
    """A copy of the bundled ensemble, as an untrusted download."""
    shutil.copytree(BUNDLED, tmp_path / "stranger" / "ensemble")
    return tmp_path / "stranger" / "ensemble"


def edit(folder: Path, change) -> None:
    path = folder / manifest.FILE_NAME
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def update_hash(folder: Path, expert: int = 0) -> None:
    """Updates the hash of an expert's changed manifest in the manifest of its ensemble."""
    digest = manifest.hash_file(folder / "experts" / str(expert) / manifest.FILE_NAME)
    edit(folder, lambda m: m["experts"][str(expert)].update(manifest_sha256=digest))


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_file_outside_its_folder_is_not_read_or_written(name, folder, tmp_path):
    expert = folder / "experts" / "0"
    edit(expert, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))
    update_hash(folder)
    with pytest.raises(UserError):
        ensemble_manifest.read(folder)
    with pytest.raises(UserError, match=r"must be a plain relative path|in files: expected `str`"):
        manifest.read(expert, NetworkManifest)
    with pytest.raises(UserError):
        publish(folder, tmp_path / "out" / "deep" / "er")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_network_outside_its_ensemble_is_not_read(name, folder):
    for change in (lambda m: m["experts"]["0"].update(path=name), lambda m: m["router"].update(path=name)):
        shutil.copy(BUNDLED / manifest.FILE_NAME, folder / manifest.FILE_NAME)
        edit(folder, change)
        with pytest.raises(UserError, match=r"must be a plain relative path|path: expected `str`"):
            ensemble_manifest.read(folder)


def test_the_ensemble_of_a_run_names_networks_of_that_run_only(finished, micro, tmp_path):
    assert len(ensemble_manifest.read(finished.ensemble).experts) == 3
    shutil.copytree(finished.export(expert_role(1)), tmp_path / "elsewhere")
    edit(Path(finished.ensemble), lambda m: m["experts"]["1"].update(path="../../elsewhere"))
    with pytest.raises(UserError, match="must be a plain relative path below"):
        ensemble_manifest.read(finished.ensemble)
    assemble(micro, finished, elsewhere={1: tmp_path / "elsewhere"})
    shutil.rmtree(tmp_path / "elsewhere")
    assert ensemble_manifest.read(finished.ensemble).experts[1].folder == finished.ensemble / "experts" / "1"


def expert_role(cluster: int):
    from paris_jax.artifacts.run_folder import Role

    return Role("expert", cluster)


@pytest.mark.parametrize("name", [manifest.FILE_NAME, weight_files.WEIGHTS])
@pytest.mark.parametrize("kind", ["link", "device", "pipe", "folder"])
def test_only_regular_files_are_read(name, kind, folder, tmp_path):
    path = folder / "experts" / "0" / name
    shutil.copy(path, tmp_path / "secret")
    path.unlink()
    if kind == "link":
        path.symlink_to(tmp_path / "secret")
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match=r"symbolic link|must be a regular file"):
        ensemble_manifest.read(folder)


def test_a_linked_folder_is_not_followed(folder, tmp_path):
    shutil.move(folder / "experts" / "0", tmp_path / "elsewhere")
    (folder / "experts" / "0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link, which could lead anywhere"):
        ensemble_manifest.read(folder)


def test_oversized_files_are_not_read(folder):
    expert = folder / "experts" / "0"
    with open(expert / weight_files.WEIGHTS, "r+b") as file:
        file.truncate(1 << 40)  # sparse
    edit(expert, lambda m: m["files"][weight_files.WEIGHTS].update(bytes=1 << 40))
    update_hash(folder)
    with pytest.raises(UserError, match="larger than its network"):
        ensemble_manifest.read(folder)
    with open(folder / manifest.FILE_NAME, "r+b") as file:
        file.truncate(safe_files.JSON_BYTES + 1)
    with pytest.raises(UserError, match="has more than the 67,108,864 bytes"):
        ensemble_manifest.read(folder)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "grows").write_bytes(b"x" * 100)
    monkeypatch.setattr(safe_files, "check_regular", lambda *_: 1)
    with pytest.raises(UserError, match="has more than the 10 bytes"):
        safe_files.read_bytes(tmp_path / "grows", 10)


def test_a_safetensors_index_names_files_in_its_own_folder_only(tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(BUNDLED / "router" / weight_files.WEIGHTS, tmp_path / "other.safetensors")
    index = tmp_path / "in" / "model.safetensors.index.json"
    for name in ("../other.safetensors", str(tmp_path / "other.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="must be a file beside it"):
            Tensors(index)


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda m: m["latent"].update(spread=[0.0]), "latent.spread"),
        (lambda m: m["latent"].update(mean=[1e30]), "latent.mean"),
        (lambda m: m["latent"].update(shape=[4, 10, 10, 10**9]), "latent.shape"),
        (lambda m: m.update(fps=0.0), "fps"),
        (lambda m: m.update(timestep_shift=-1.0), "timestep_shift"),
        (lambda m: m.update(text_length=10**9), "text_length"),
        (lambda m: m.update(text_length=25), "its contents: text_length"),
        (lambda m: m["codec"].update(time=0), "codec.time"),
        (lambda m: m["codec"].update(name="other"), "codec.name"),
        (lambda m: m["network"].update(single_blocks=10**9), "network.single_blocks"),
        (lambda m: m["network"].update(more=1), "network: object contains unknown field `more`"),
        (lambda m: m["sampling"].update(num_inference_steps=10**9), "sampling: num_inference_steps"),
        (lambda m: m["sampling"].update(solver="other"), "sampling: solver"),
        (lambda m: m["sampling"].update(more=1), "sampling: more"),
        (lambda m: m.update(role="janitor"), "role"),
        (lambda m: m.update(cluster=2000), "cluster"),
    ],
)
def test_out_of_range_values_are_refused_by_file_and_field(change, field, folder):
    def changed(value):
        value.setdefault("sampling", {})
        change(value)

    edit(folder / "monolith", changed)
    with pytest.raises(UserError, match=rf"monolith/manifest.json: {field}"):
        ensemble_manifest.read(folder / "monolith")


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5 + "]" * 10**5, '{"fps": ' + "9" * 5000 + "}", '{"fps": NaN}', "[]", "null", '"', "", "\xff"],
    ids=["nested", "digits", "nan", "list", "null", "cut", "empty", "latin"],
)
def test_malformed_manifests_are_refused(text, folder):
    (folder / manifest.FILE_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        ensemble_manifest.read(folder)
