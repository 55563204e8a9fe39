"""Published weights in, ours out, and back: by name, by piece, or refused before anything is written."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from paris_jax import cli
from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import WeightsManifest
from paris_jax.artifacts.tensors import Tensors, write
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.weights import convert
from paris_jax.weights.layouts import LAYOUTS
from tests.ensemble.test_mixture import random_params
from tests.oracles.flux import CONFIG

TELLING = dataclasses.replace(CONFIG, cond_frames=True)


def ours(folder, config=CONFIG, dtype=np.float32):
    folder.mkdir(exist_ok=True)
    flat = {n: np.asarray(leaf, dtype) for n, leaf in functional.to_names(random_params(config, 2)).items()}
    safetensors.numpy.save_file(flat, folder / "ours.safetensors")
    return Tensors(folder / "ours.safetensors")


def exported(folder, layout, config=CONFIG, change=None, dtype=np.float32):
    """Our network in a layout, with a change to the dictionary of its tensors."""
    path = folder / f"{layout}.safetensors"
    convert.export_network(ours(folder, config, dtype), config, layout, path, lambda: None)
    if change:
        weights = safetensors.numpy.load_file(path)
        change(weights)
        safetensors.numpy.save_file(weights, path)
    return path


def imported(paths, folder, config=CONFIG, dtype=""):
    tensors = Tensors(paths)
    report = convert.check(tensors, config, convert.layout_of(tensors))
    convert.import_network(tensors, config, report, folder, "test", dtype, lambda: None)
    return report, Tensors(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_there_and_back_is_bit_for_bit_the_same(layout, dtype, tmp_path):
    path = exported(tmp_path, layout, TELLING, dtype=dtype)
    tensors = Tensors(path)
    assert convert.layout_of(tensors) == layout
    sizes = convert.sizes(tensors, layout)
    assert {k: getattr(TELLING, k) for k in sizes} == sizes
    report, back = imported(path, tmp_path / "in", TELLING)
    assert not report.fresh and not report.unused
    first = Tensors(tmp_path / "ours.safetensors")
    assert back.shapes == first.shapes
    for name in first.shapes:
        np.testing.assert_array_equal(back.read(name), first.read(name))


def test_a_network_in_several_files_is_found_by_index_folder_or_names(tmp_path):
    whole = safetensors.numpy.load_file(exported(tmp_path, "bfl"))
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(whole)
    shards = {f"model-0000{i}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, held in shards.items():
        safetensors.numpy.save_file({n: whole[n] for n in held}, folder / file)
    listed = {n: file for file, held in shards.items() for n in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    for paths in (folder, folder / "model.safetensors.index.json", [folder / file for file in shards]):
        assert Tensors(paths).shapes.keys() == set(names)
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors does not exist"):
        Tensors(folder)


def test_flux_starts_a_video_expert_whose_new_input_starts_at_nothing(tmp_path):
    guided = lambda w: w.update({"guidance_in.in_layer.weight": np.ones((3, 3), np.float32)})  # noqa: E731
    report, back = imported(exported(tmp_path, "bfl", change=guided), tmp_path / "in", TELLING, "bfloat16")
    assert report.fresh == ["cond_in.bias", "cond_in.kernel"] or report.fresh == ["cond_in.kernel", "cond_in.bias"]
    assert report.unused == ["guidance_in.in_layer.weight"]
    assert not np.any(back.read("cond_in.kernel"))
    assert {dtype.name for _, dtype in back.shapes.values()} == {"bfloat16"}
    told = manifest.read(tmp_path / "in", WeightsManifest, verify=True)
    assert told.report["unused"] == report.unused and told.network.cond_frames


def test_every_tensor_that_does_not_fit_is_named_at_once_and_nothing_is_written(tmp_path):
    def damage(w):
        del w["double_blocks.1.txt_mlp.2.weight"], w["img_in.bias"]
        w["single_blocks.0.linear1.weight"] = w["single_blocks.0.linear1.weight"][:-1]
        w["lora.down"] = np.ones(3, np.float32)

    path = exported(tmp_path, "bfl", change=damage)
    with pytest.raises(UserError, match="4 of its tensors do not fit") as refused:
        imported(path, tmp_path / "in")
    for said in (
        "double_blocks.1.txt_mlp.2.weight is missing",
        "img_in.bias is missing",
        "single_blocks.0.linear1.weight has shape (223, 32) instead of (224, 32)",
        "lora.down is extra",
    ):
        assert said in str(refused.value)
    assert not (tmp_path / "in").exists()


def test_mixed_dtypes_lose_nothing_and_what_overflows_is_named(tmp_path):
    def mix(w):
        w["img_in.weight"] = np.full(w["img_in.weight"].shape, 1e6, np.float32)
        w["txt_in.bias"] = w["txt_in.bias"].astype(np.float16)

    _, back = imported(exported(tmp_path, "bfl", change=mix), tmp_path / "in")
    assert {dtype.name for _, dtype in back.shapes.values()} == {"float32"}
    assert back.read("video_in.kernel").max() == 1e6

    def whole(w):
        w["img_in.bias"] = np.arange(len(w["img_in.bias"]))

    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"img_in\.bias has dtype I64"):
        imported(exported(tmp_path / "b", "bfl", change=whole), tmp_path / "b" / "in")


def test_what_is_not_finite_is_named_and_leaves_nothing_behind(tmp_path):
    path = exported(tmp_path, "diffusers", change=lambda w: w["proj_out.weight"].__setitem__((0, 0), np.nan))
    with pytest.raises(UserError, match=r"proj_out\.weight holds values that are not finite"):
        imported(path, tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p: p / "absent.safetensors", "does not exist"),
        (lambda p: _written(p / "model.ckpt", b"x"), r"is not a \.safetensors file, the only kind that is read"),
        (lambda p: _written(p / "cut.safetensors", (p / "bfl.safetensors").read_bytes()[:-10]), "download it again"),
        (lambda p: _written(p / "cut.safetensors", b"garbage"), "is not a whole safetensors file"),
        (lambda p: _written(p / "x.safetensors.index.json", b"{}"), "missing required field `weight_map`"),
        (lambda p: [p / "bfl.safetensors", p / "bfl.safetensors"], "and another file both hold"),
        (lambda p: _folder(p / "empty"), r"holds no \.safetensors file"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(make, said, tmp_path):
    exported(tmp_path, "bfl")
    with pytest.raises(UserError, match=said):
        Tensors(make(tmp_path))


def _written(path, data):
    path.write_bytes(data)
    return path


def _folder(path):
    path.mkdir()
    return path


def test_an_unknown_network_is_refused(tmp_path):
    safetensors.numpy.save_file({"some.weight": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"holds no network that is known \(some\.weight, \.\.\.\)"):
        convert.layout_of(Tensors(tmp_path / "a.safetensors"))


def test_no_more_than_a_piece_is_in_memory_at_once(tmp_path, monkeypatch):
    read, path = [], exported(tmp_path, "bfl")
    monkeypatch.setattr(Tensors, "read", _noting(Tensors.read, read))
    imported(path, tmp_path / "in")
    assert max(read) == 4 * 256 * 32  # the largest tensor, which reads the sinusoids of time


def _noting(read, sizes):
    def noting(self, name, index=...):
        value = read(self, name, index)
        sizes.append(value.nbytes)
        return value

    return noting


@pytest.mark.parametrize("chunks", [["b"], ["a", "a", "a"], ["a"], ["a", "b", "c"]])
def test_a_file_is_written_whole_or_not_at_all(chunks, tmp_path):
    shapes = {"a": ((2, 3), np.dtype(np.float32)), "b": ((3,), np.dtype(np.float32))}
    with pytest.raises(ValueError, match=r"does not follow|is not whole"):
        write(tmp_path / "x.safetensors", shapes, ((name, np.ones(3 if name == "b" else 6)) for name in chunks))
    assert not list(tmp_path.iterdir())


def test_the_library_reads_what_is_written(tmp_path):
    shapes = {
        "a": ((2, 3), np.dtype(np.float32)),
        "b": ((3,), np.dtype(ml_dtypes.bfloat16)),
        "e": ((0, 2), np.dtype(np.float32)),
    }
    rows = [("a", np.ones(3)), ("a", np.full(3, 2.0)), ("b", np.arange(3))]
    write(tmp_path / "x.safetensors", shapes, rows)
    found = Tensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found.read("a"), [[1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(np.float32(found.read("b")), [0, 1, 2])
    np.testing.assert_array_equal(found.read("a", (slice(1, 2), slice(0, 2))), [[2, 2]])
    assert found.read("e").shape == (0, 2)


def test_the_commands_say_what_they_did_and_what_is_wrong(tmp_path, capsys):
    part = "paris_jax/artifacts/bundled/shapes/experts/0"
    out, weights = tmp_path / "expert.safetensors", tmp_path / "weights"
    assert cli.run(["export", f"--network={part}", "--layout=bfl", f"--out={out}"]) == 0
    assert cli.run(["import", str(out), "--config=configs/shapes.py:bundled", f"--out={weights}"]) == 0
    assert "48 of our arrays" in capsys.readouterr().out
    first, back = Tensors(f"{part}/model.safetensors"), Tensors(weights)
    assert all(np.array_equal(first.read(name), back.read(name)) for name in first.shapes)
    for arguments, said in (
        (["import", str(out), f"--out={weights}"], "holds weights already"),
        (["import", str(out), f"--out={tmp_path}/a"], "has 7 heads for 112 features, FLUX.1's heads have 128"),
        (["import", f"--out={tmp_path}/a"], "There is no file"),
        (["import", str(out)], "--out is missing"),
        (["import", "--source=flux", str(out), f"--out={tmp_path}/a"], "did you mean 'flux1-dev'"),
        (["import", "--source=opensora2", str(tmp_path / "x.safetensors"), "--out=a"], "does not exist"),
        (["export", f"--network={part}", f"--out={out}"], "exists already"),
        (["export", f"--network={part}", "--layout=onnx", f"--out={out}x"], "--layout=onnx: must be one of bfl"),
        (["import", str(out), f"--out={tmp_path}/a", "--config.network.preset=base"], "--config is missing"),
        (["import", "gs://bucket/x.safetensors", f"--out={tmp_path}/a"], "copy them here first"),
        (["export", f"--network={part}/../../router", f"--out={out}x"], "is a router"),
        (["prepare", "videos"], "'videos' is not a flag"),
    ):
        assert cli.run(arguments) == 1
        assert said in capsys.readouterr().err


def test_abstractly_the_published_sizes_fit_their_files():
    """The names and shapes of the 11.89B network, without its values."""
    from paris_jax.config.network import NetworkSettings
    from paris_jax.models.functional import network_config
    from paris_jax.weights.layouts import pieces

    config = network_config(
        NetworkSettings(preset="11b"), channels=16, text_width=4096, pooled_width=768, cond_frames=True
    )
    shapes = {
        name: shape
        for piece in pieces(config, LAYOUTS["opensora2"])
        for name, shape in zip(piece.theirs, piece.their_shapes, strict=True)
    }
    assert (
        sum(int(np.prod(s)) for s in shapes.values()) == functional.count(config) == 11_891_178_560 + 68 * 3072 + 3072
    )
    assert shapes["cond_in.weight"] == (3072, 68)
    assert shapes["single_blocks.37.v_mlp.weight"] == (3072 + 12288, 3072)
    assert shapes["double_blocks.18.txt_attn.q_proj.bias"] == (3072,)
    assert jax.tree.all(jax.tree.map(bool, shapes))
