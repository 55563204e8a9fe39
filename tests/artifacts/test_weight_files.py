"""Weights in shards with an index: the same network, in the memory of the network, and nothing less than whole."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from paris_jax.artifacts import ensemble_manifest, exported, manifest, weight_files
from paris_jax.artifacts.tensors import Tensors
from paris_jax.artifacts.weight_files import INDEX, SHARD_BYTES, WEIGHTS
from paris_jax.commands.export import export_weights
from paris_jax.commands.validate import validate
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.training.state import weight_hashes
from tests.artifacts.test_exported import edit_manifest

BUNDLED = ensemble_manifest.BUNDLED_FOLDER / "shapes" / "experts" / "0"
SHARD = 300_000  # bytes; the largest array has about three times as many
CARRIED = ("role", "cluster", "clusters", "timestep_shift", "latent", "codec", "text", "text_length", "fps", "training")


def write(folder, shard_bytes, dtype="bfloat16"):
    part = exported.read(BUNDLED)
    content = {name: getattr(part.manifest, name) for name in CARRIED}
    exported.write(folder, part.config, part.params, "", dtype, shard_bytes, **content)
    return part


@pytest.fixture
def sharded(tmp_path):
    write(tmp_path / "expert", SHARD)
    return tmp_path / "expert"


def renewed(folder):
    """Updates sizes and hashes of the manifest, as an attacker would."""
    files = {p.name: p for p in folder.iterdir() if p.name != manifest.FILE_NAME}
    entries = {n: {"bytes": p.stat().st_size, "sha256": manifest.hash_file(p)} for n, p in files.items()}
    edit_manifest(folder, lambda m: m.update(files=entries))


def edit_index(folder, change):
    value = json.loads((folder / INDEX).read_text())
    change(value)
    (folder / INDEX).write_text(json.dumps(value))
    renewed(folder)


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_shards_hold_the_same_network_and_are_of_the_bounded_size(sharded):
    expected, found = exported.read(BUNDLED), exported.read(sharded)
    for name, array in functional.to_names(expected.params).items():
        np.testing.assert_array_equal(functional.to_names(found.params)[name], array)
    assert len(shards(sharded)) > 3 and not (sharded / WEIGHTS).exists()
    for path in shards(sharded):
        arrays = Tensors(path).shapes.values()
        assert len(arrays) == 1 or sum(np.prod(shape) * 2 for shape, _ in arrays) <= SHARD


def test_the_index_is_that_of_hugging_face(sharded):
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * functional.count(exported.read(BUNDLED).config)
    assert index["weight_map"].keys() == functional.to_names(exported.read(BUNDLED).params).keys()
    assert set(index["weight_map"].values()) == {path.name for path in shards(sharded)}
    assert shards(sharded)[0].name == f"model-00001-of-{len(shards(sharded)):05d}.safetensors"


def test_a_network_below_the_bound_is_one_file_as_safetensors_reads_it(tmp_path):
    write(tmp_path, SHARD_BYTES, "float32")
    assert sorted(p.name for p in tmp_path.iterdir()) == [manifest.FILE_NAME, WEIGHTS]
    expected = functional.to_names(exported.read(BUNDLED).params)
    found = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], np.float32(expected[name])) for name in found)


def test_files_of_an_earlier_export_are_not_left(sharded):
    write(sharded, SHARD_BYTES)
    assert not shards(sharded) and not (sharded / INDEX).exists()
    exported.read(sharded)
    write(sharded, SHARD)
    assert not (sharded / WEIGHTS).exists()
    exported.read(sharded)


def test_shards_are_copied_validated_trained_from_and_exported_to_other_layouts(sharded, tmp_path):
    assert {check.outcome for check in validate(str(sharded)) if check.name != "held-out"} == {"passed"}
    part = exported.read(sharded)
    copied = exported.copy(part, tmp_path / "copy")
    assert exported.read(copied.folder).manifest == part.manifest
    assert weight_hashes(sharded, part.config).keys() == part.manifest.files.keys()
    for name, folder in (("sharded", sharded), ("whole", BUNDLED)):
        export_weights(str(folder), "bfl", str(tmp_path / f"{name}.safetensors"))
    assert (tmp_path / "sharded.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def peak_of(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shard_bytes", [SHARD, SHARD_BYTES])
def test_reading_takes_the_memory_of_the_network_and_writing_that_of_its_largest_array(
    shard_bytes, tmp_path, monkeypatch
):
    monkeypatch.setattr(weight_files, "BLOCK", 1 << 16)
    monkeypatch.setattr(exported, "FINITE_AT_ONCE", 1 << 16)
    part = write(tmp_path, shard_bytes, "float32")  # once before, so that nothing is compiled or imported below
    exported.read(tmp_path)
    size = 4 * functional.count(part.config)
    fixed = 1_500_000  # bytes that do not grow with the network: blocks that are hashed or looked at, headers
    assert peak_of(lambda: exported.read(tmp_path)) < size + fixed
    largest = 4 * max(array.size for array in functional.to_names(part.params).values())
    arrays = functional.to_names(part.params)
    shapes = {name: (array.shape, np.dtype(np.float32)) for name, array in arrays.items()}
    assert peak_of(lambda: weight_files.write(tmp_path, shapes, arrays.items(), shard_bytes)) < largest + fixed


def move_a_tensor(index):
    name = sorted(index["weight_map"])[0]
    index["weight_map"][name] = sorted(set(index["weight_map"].values()))[-1]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda i: i["weight_map"].update(a="../other.safetensors"), "'../other.safetensors', which is no shard"),
        (lambda i: i["weight_map"].update(a="/etc/passwd"), "'/etc/passwd', which is no shard"),
        (lambda i: i["weight_map"].pop("text_in.bias"), "has text_in.bias in nowhere"),
        (lambda i: i["weight_map"].update(more=next(iter(i["weight_map"].values()))), "and it is in nowhere"),
        (move_a_tensor, "and it is in model-0"),
        (lambda i: i["metadata"].update(total_size=1), "promises a total_size of 1 bytes"),
        (lambda i: i.pop("metadata"), "promises a total_size of None bytes"),
        (lambda i: i.update(weight_map={}), "weight_map"),
        (lambda i: i.update(weight_map=[]), "weight_map"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused_though_all_hashes_agree(change, sentence, sharded, tmp_path):
    shutil.copy(BUNDLED / WEIGHTS, tmp_path / "other.safetensors")
    edit_index(sharded, change)
    with pytest.raises(UserError, match=sentence):
        exported.read(sharded)


def test_shards_that_overlap_or_miss_a_tensor_are_refused(sharded):
    first, second, *_ = shards(sharded)
    arrays = {name: Tensors(second).read(name) for name in Tensors(second).shapes}
    name = next(iter(Tensors(first).shapes))
    original = second.read_bytes()
    safetensors.numpy.save_file({name: Tensors(first).read(name), **arrays}, second)
    renewed(sharded)
    with pytest.raises(UserError, match=f"both hold {name}"):
        exported.read(sharded)
    second.write_bytes(original)
    missing = next(iter(arrays))
    safetensors.numpy.save_file({"other": arrays[missing]}, second)
    renewed(sharded)
    with pytest.raises(UserError, match=r"has \w.* in .*, and it is in (nowhere|model-)"):
        exported.read(sharded)


@pytest.mark.parametrize("name", ["a shard", INDEX])
def test_a_missing_altered_or_linked_file_is_refused_by_name(name, sharded, tmp_path):
    path = shards(sharded)[1] if name == "a shard" else sharded / INDEX
    data = path.read_bytes()
    path.write_bytes(data[:-3] + b"   ")
    with pytest.raises(UserError, match=f"{path.name} was altered"):
        exported.read(sharded)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing though"):
        exported.read(sharded)
    (tmp_path / "elsewhere").write_bytes(data)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        exported.read(sharded)


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files.pop(INDEX),
        lambda files: files.pop("model-00001-of-00002.safetensors"),
        lambda files: files.update({"model.safetensors": files[INDEX]}),
        lambda files: files.update({"model-00003-of-00002.safetensors": files[INDEX]}),
        lambda files: files.update({"more.py": files[INDEX]}),
    ],
)
def test_a_manifest_names_one_file_or_an_index_with_all_its_shards(change, tmp_path):
    write(tmp_path, SHARD)
    entry = {"bytes": 3, "sha256": "0" * 64}
    for path in tmp_path.iterdir():
        if path.name != manifest.FILE_NAME:
            path.unlink()
    files = {INDEX: entry, **{f"model-0000{i}-of-00002.safetensors": entry for i in (1, 2)}}
    change(files)
    for name in files:
        (tmp_path / name).write_bytes(b"abc")
    edit_manifest(tmp_path, lambda m: m.update(files=files))
    with pytest.raises(
        UserError, match=r"must name model\.safetensors and no other file, or model\.safetensors\.index"
    ):
        exported.read(tmp_path)


def header_of(path, change):
    """Rewrites the header of a safetensors file, leaving its tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def first(header):
    return header[min(header, key=lambda name: header[name]["data_offsets"])]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h: first(h).update(shape=[1 << 40, 1 << 40]), "has bytes 0 to"),
        (lambda h: first(h).update(shape=[-1]), "Expected `int` >= 0"),
        (lambda h: first(h).update(data_offsets=[4, 4]), "has bytes"),
        (lambda h: first(h).update(dtype="F33"), "for F33"),
        (lambda h: first(h).update(data_offsets=[0, 1 << 60]), "Expected `int` <= "),
        (lambda h: h.update(more={"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}), "has bytes"),
        (lambda h: h.pop(max(h, key=lambda name: h[name]["data_offsets"])), "bytes of tensors instead of"),
        (lambda h: h.update(more=3), "Expected `object`"),
    ],
)
def test_a_header_that_is_not_sane_is_refused_before_anything_is_allocated(change, sentence, tmp_path):
    write(tmp_path, SHARD_BYTES)
    header_of(tmp_path / WEIGHTS, change)
    renewed(tmp_path)
    with pytest.raises(UserError, match=f"{WEIGHTS} is not a readable safetensors file.*{sentence}"):
        exported.read(tmp_path)


def test_a_file_that_is_exchanged_while_it_is_read_is_refused(sharded, monkeypatch):
    path, change = shards(sharded)[2], weight_files.WeightFiles.shapes

    def then_exchanged(self):
        found = change(self)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return found

    monkeypatch.setattr(weight_files.WeightFiles, "shapes", then_exchanged)
    with pytest.raises(UserError, match=f"{path.name} was altered"):
        exported.read(sharded)
