"""Import and export of weights: exact round trips, one tensor at a time, and errors before the first write."""

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

WITH_COND_FRAMES = dataclasses.replace(CONFIG, cond_frames=True)


def ours(folder, config=CONFIG, dtype=np.float32):
    folder.mkdir(exist_ok=True)
    flat = {n: np.asarray(leaf, dtype) for n, leaf in functional.to_names(random_params(config, 2)).items()}
    safetensors.numpy.save_file(flat, folder / "ours.safetensors")
    return Tensors(folder / "ours.safetensors")


def exported(folder, layout, config=CONFIG, change=None, dtype=np.float32):
    """Exports our network in a layout; `change` edits the dictionary of its tensors."""
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
def test_export_and_import_is_a_bit_exact_round_trip(layout, dtype, tmp_path):
    path = exported(tmp_path, layout, WITH_COND_FRAMES, dtype=dtype)
    tensors = Tensors(path)
    assert convert.layout_of(tensors) == layout
    sizes = convert.sizes(tensors, layout)
    assert {k: getattr(WITH_COND_FRAMES, k) for k in sizes} == sizes
    report, back = imported(path, tmp_path / "in", WITH_COND_FRAMES)
    assert not report.fresh and not report.unused
    first = Tensors(tmp_path / "ours.safetensors")
    assert back.shapes == first.shapes
    for name in first.shapes:
        np.testing.assert_array_equal(back.read(name), first.read(name))


def test_sharded_weights_are_read_by_index_folder_or_file_names(tmp_path):
    weights = safetensors.numpy.load_file(exported(tmp_path, "bfl"))
    folder = tmp_path / "shards"
    folder.mkdir()
    names = sorted(weights)
    shards = {f"model-0000{i}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, members in shards.items():
        safetensors.numpy.save_file({n: weights[n] for n in members}, folder / file)
    weight_map = {n: file for file, members in shards.items() for n in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for paths in (folder, folder / "model.safetensors.index.json", [folder / file for file in shards]):
        assert Tensors(paths).shapes.keys() == set(names)
    (folder / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors does not exist"):
        Tensors(folder)


def test_importing_flux_zero_initialises_the_input_for_conditioning_frames(tmp_path):
    add_guidance = lambda w: w.update({"guidance_in.in_layer.weight": np.ones((3, 3), np.float32)})  # noqa: E731
    report, back = imported(
        exported(tmp_path, "bfl", change=add_guidance), tmp_path / "in", WITH_COND_FRAMES, "bfloat16"
    )
    assert report.fresh == ["cond_in.bias", "cond_in.kernel"] or report.fresh == ["cond_in.kernel", "cond_in.bias"]
    assert report.unused == ["guidance_in.in_layer.weight"]
    assert not np.any(back.read("cond_in.kernel"))
    assert {dtype.name for _, dtype in back.shapes.values()} == {"bfloat16"}
    written = manifest.read(tmp_path / "in", WeightsManifest, verify=True)
    assert written.report["unused"] == report.unused and written.network.cond_frames


def test_all_mismatched_tensors_are_named_and_nothing_is_written(tmp_path):
    def damage(w):
        del w["double_blocks.1.txt_mlp.2.weight"], w["img_in.bias"]
        w["single_blocks.0.linear1.weight"] = w["single_blocks.0.linear1.weight"][:-1]
        w["lora.down"] = np.ones(3, np.float32)

    path = exported(tmp_path, "bfl", change=damage)
    with pytest.raises(UserError, match="4 of its tensors do not fit") as error:
        imported(path, tmp_path / "in")
    for message in (
        "double_blocks.1.txt_mlp.2.weight is missing",
        "img_in.bias is missing",
        "single_blocks.0.linear1.weight has shape (223, 32) instead of (224, 32)",
        "lora.down is extra",
    ):
        assert message in str(error.value)
    assert not (tmp_path / "in").exists()


def test_mixed_dtypes_are_widened_and_integer_weights_are_refused(tmp_path):
    def mix(w):
        w["img_in.weight"] = np.full(w["img_in.weight"].shape, 1e6, np.float32)
        w["txt_in.bias"] = w["txt_in.bias"].astype(np.float16)

    _, back = imported(exported(tmp_path, "bfl", change=mix), tmp_path / "in")
    assert {dtype.name for _, dtype in back.shapes.values()} == {"float32"}
    assert back.read("video_in.kernel").max() == 1e6

    def use_integers(w):
        w["img_in.bias"] = np.arange(len(w["img_in.bias"]))

    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match=r"img_in\.bias has dtype I64"):
        imported(exported(tmp_path / "b", "bfl", change=use_integers), tmp_path / "b" / "in")


def test_a_nonfinite_tensor_is_named_and_leaves_no_file(tmp_path):
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
def test_unreadable_files_are_refused_by_name(make, said, tmp_path):
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
    with pytest.raises(
        UserError, match=r"has no known layout \(its tensors are some\.weight, \.\.\.\); known layouts are bfl"
    ):
        convert.layout_of(Tensors(tmp_path / "a.safetensors"))


def test_import_reads_one_tensor_at_a_time(tmp_path, monkeypatch):
    sizes, path = [], exported(tmp_path, "bfl")
    monkeypatch.setattr(Tensors, "read", _recording(Tensors.read, sizes))
    imported(path, tmp_path / "in")
    assert max(sizes) == 4 * 256 * 32  # the largest tensor: the first layer of the timestep embedding


def _recording(read, sizes):
    def recording(self, name, index=...):
        value = read(self, name, index)
        sizes.append(value.nbytes)
        return value

    return recording


@pytest.mark.parametrize("chunks", [["b"], ["a", "a", "a"], ["a"], ["a", "b", "c"]])
def test_an_incomplete_file_is_not_written(chunks, tmp_path):
    shapes = {"a": ((2, 3), np.dtype(np.float32)), "b": ((3,), np.dtype(np.float32))}
    with pytest.raises(ValueError, match=r"does not follow|is not whole"):
        write(tmp_path / "x.safetensors", shapes, ((name, np.ones(3 if name == "b" else 6)) for name in chunks))
    assert not list(tmp_path.iterdir())


def test_written_files_are_read_back_with_their_dtypes(tmp_path):
    shapes = {
        "a": ((2, 3), np.dtype(np.float32)),
        "b": ((3,), np.dtype(ml_dtypes.bfloat16)),
        "e": ((0, 2), np.dtype(np.float32)),
    }
    chunks = [("a", np.ones(3)), ("a", np.full(3, 2.0)), ("b", np.arange(3))]
    write(tmp_path / "x.safetensors", shapes, chunks)
    tensors = Tensors(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(tensors.read("a"), [[1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(np.float32(tensors.read("b")), [0, 1, 2])
    np.testing.assert_array_equal(tensors.read("a", (slice(1, 2), slice(0, 2))), [[2, 2]])
    assert tensors.read("e").shape == (0, 2)


def test_import_and_export_commands_report_results_and_errors(tmp_path, capsys):
    network = "paris_jax/artifacts/bundled/shapes/experts/0"
    out, weights = tmp_path / "expert.safetensors", tmp_path / "weights"
    assert cli.run(["export", f"--network={network}", "--layout=bfl", f"--out={out}"]) == 0
    assert cli.run(["import", str(out), "--config=configs/shapes.py:bundled", f"--out={weights}"]) == 0
    assert "48 of our arrays" in capsys.readouterr().out
    first, back = Tensors(f"{network}/model.safetensors"), Tensors(weights)
    assert all(np.array_equal(first.read(name), back.read(name)) for name in first.shapes)
    for arguments, message in (
        (["import", str(out), f"--out={weights}"], "holds weights already"),
        (["import", str(out), f"--out={tmp_path}/a"], "has 7 heads for 112 features, FLUX.1's heads have 128"),
        (["import", f"--out={tmp_path}/a"], "There is no file"),
        (["import", str(out)], "--out is missing"),
        (["import", "--source=flux", str(out), f"--out={tmp_path}/a"], "did you mean 'flux1-dev'"),
        (["import", "--source=opensora2", str(tmp_path / "x.safetensors"), "--out=a"], "does not exist"),
        (["export", f"--network={network}", f"--out={out}"], "exists already"),
        (["export", f"--network={network}", "--layout=onnx", f"--out={out}x"], "--layout=onnx: must be one of bfl"),
        (["import", str(out), f"--out={tmp_path}/a", "--config.network.preset=base"], "--config is missing"),
        (["import", "gs://bucket/x.safetensors", f"--out={tmp_path}/a"], "copy them here first"),
        (["export", f"--network={network}/../../router", f"--out={out}x"], "is a router"),
        (["prepare", "videos"], "'videos' is not a flag"),
    ):
        assert cli.run(arguments) == 1
        assert message in capsys.readouterr().err


def test_the_layout_of_the_published_network_has_its_names_and_shapes():
    """Checks the names and shapes of the 11.89B network without allocating it."""
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
