"""Files of weights are read as data: what a pickle in them would run is refused, not run."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest

from paris_jax.errors import UserError
from paris_jax.weights.pickled import read_arrays


def write(path, value) -> None:
    path.write_bytes(value if isinstance(value, bytes) else pickle.dumps(value, protocol=4))


class Runs:
    """Unpickled the usual way, this makes a folder."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<i8", "u1", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickled_arrays_are_read_as_they_were(tmp_path, dtype, order):
    values = np.asarray(np.arange(24).reshape(2, 3, 4) % 7, dtype, order=order)
    write(tmp_path / "w.ckpt", {"params": {"layer": {"kernel": values}}, "step": 3})
    found = read_arrays(tmp_path / "w.ckpt")
    assert list(found) == ["params/layer/kernel"]
    np.testing.assert_array_equal(found["params/layer/kernel"], values)


@pytest.mark.parametrize(
    "call",
    [
        (os.mkdir, "made"),
        (eval, "__import__('os').mkdir('made')"),
        (np.lib.format.open_memmap, "made", "w+"),
        (getattr, "text", "upper"),
    ],
)
def test_code_in_a_pickle_is_named_and_not_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "w.ckpt", {"kernel": np.ones(3, np.float32), "more": Runs(*call)})
    with pytest.raises(UserError, match=r"names .* which reading it would run"):
        read_arrays(tmp_path / "w.ckpt")
    assert not (tmp_path / "made").exists()


def test_an_array_of_objects_is_refused(tmp_path):
    write(tmp_path / "w.ckpt", {"kernel": np.array([{}, []], object)})
    with pytest.raises(UserError, match="dtype 'O8'"):
        read_arrays(tmp_path / "w.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 10, 100, -20])
def test_a_cut_pickle_is_refused(tmp_path, kept):
    data = pickle.dumps({"kernel": np.arange(100.0)}, protocol=4)
    write(tmp_path / "w.ckpt", data[:kept])
    with pytest.raises(UserError, match="not a whole file of weights"):
        read_arrays(tmp_path / "w.ckpt")


def test_a_dictionary_inside_itself_is_refused(tmp_path):
    loop: dict = {}
    loop["again"] = loop
    write(tmp_path / "w.ckpt", loop)
    with pytest.raises(UserError, match="nested"):
        read_arrays(tmp_path / "w.ckpt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_arrays(tmp_path / "absent.ckpt")


# PyTorch's archives


def archive(tmp_path, value, change=lambda entries: entries):
    """A state dictionary as PyTorch writes it, with changed entries."""
    torch = pytest.importorskip("torch", reason="PyTorch writes these files; pip install torch==2.13.0")
    data = io.BytesIO()
    torch.save(value(torch), data)
    with zipfile.ZipFile(data) as read:
        entries = change({entry.filename: read.read(entry) for entry in read.infolist()})
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as written:
        for name, content in entries.items():
            written.writestr(name, content)
    return tmp_path / "w.pt"


def test_tensors_are_read_with_their_strides_and_dtypes(tmp_path):
    def state(torch):
        base = torch.arange(24.0).reshape(4, 6)
        return {
            "a": base,
            "turned": base.T,
            "part": base[1:3, ::2],
            "half": base.to(torch.bfloat16),
            "count": torch.tensor(7),
        }

    found = read_arrays(archive(tmp_path, state))
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(found["a"], base)
    np.testing.assert_array_equal(found["turned"], base.T)
    np.testing.assert_array_equal(found["part"], base[1:3, ::2])
    np.testing.assert_array_equal(found["half"].astype(np.float32), base)
    assert found["count"] == 7


def test_an_archive_that_names_more_than_tensors_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"names '.*mkdir'.*which reading it would run"):
        read_arrays(archive(tmp_path, lambda torch: {"a": torch.ones(3), "b": Runs(os.mkdir, str(tmp_path / "made"))}))
    assert not (tmp_path / "made").exists()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    def shorter(entries):
        return {name: content[:8] if "/data/" in name else content for name, content in entries.items()}

    with pytest.raises(UserError, match="beyond its storage"):
        read_arrays(archive(tmp_path, lambda torch: {"a": torch.ones(30)}, shorter))


def test_files_of_old_versions_are_refused_with_a_remedy(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch writes these files; pip install torch==2.13.0")
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before version 1\.6; save its tensors again, as safetensors"):
        read_arrays(tmp_path / "old.pth")


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_file_with_any_byte_changed_is_read_or_refused_in_one_sentence(tmp_path, kind):
    rng = np.random.default_rng(0)
    if kind == "numpy":
        whole = pickle.dumps({"params": {"kernel": np.arange(6.0), "bias": np.ones(2, np.float32)}}, protocol=4)
    else:
        whole = archive(
            tmp_path, lambda torch: {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2)}
        ).read_bytes()
    errors = []
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        write(tmp_path / "w", bytes(data))
        try:
            read_arrays(tmp_path / "w")
        except UserError as error:
            errors.append(str(error))
    assert len(errors) > 20
    assert not any("\n" in error for error in errors)
