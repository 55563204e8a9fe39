"""Publishing an ensemble as one folder: it needs no run folder and loads from a Hugging Face cache."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from paris_jax import Ensemble, cli
from paris_jax.artifacts import ensemble_manifest, manifest, weight_files
from paris_jax.artifacts import publish as stage
from paris_jax.artifacts.publish import publish
from paris_jax.artifacts.run_folder import Role
from paris_jax.artifacts.schemas import EnsembleManifest
from paris_jax.commands.assemble import assemble
from paris_jax.commands.sample import Output
from paris_jax.errors import UserError
from paris_jax.evaluation.protocol import evaluate
from tests.conftest import SECRET

PROMPT = "a small red circle moving left slowly on a white ground"


def sample_videos(path):
    return np.asarray(Ensemble.load(path).sample(PROMPT, num_inference_steps=2).videos)


def copy_to_hub_cache(folder: Path, cache: Path) -> Path:
    """Copies a folder into the layout of a Hugging Face cache: a snapshot of links to blobs."""
    snapshot, blobs = cache / "snapshots" / "0a1b", cache / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / str(number))
        link.symlink_to(blobs / str(number))
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    return snapshot


def test_a_published_ensemble_needs_no_run_folder_and_gives_the_same_samples(finished, tmp_path):
    expected, weights = (
        sample_videos(finished.ensemble),
        (finished.export(Role("expert", 1)) / weight_files.WEIGHTS).read_bytes(),
    )
    assert cli.run(["export", f"--ensemble={finished.ensemble}", f"--out={tmp_path}/published"]) == 0
    shutil.rmtree(finished.path)
    snapshot = copy_to_hub_cache(tmp_path / "published", tmp_path / "cache")
    shutil.rmtree(tmp_path / "published")
    np.testing.assert_array_equal(sample_videos(snapshot), expected)
    (snapshot.parent / "config.json").write_text('{"model_type": "of somebody else"}')
    assert Output().paths(str(snapshot), ["a ball"], [0])[0] == epath.Path(
        "samples/a-ball-seed0.mp4"
    )  # not in the cache
    assert (snapshot / "experts" / "1" / weight_files.WEIGHTS).read_bytes() == weights
    card = (snapshot / stage.CARD).read_text()
    for k in range(3):
        described = json.loads((snapshot / "experts" / str(k) / manifest.FILE_NAME).read_text())
        steps = described["training"]["steps"]
        assert f"| expert {k} | {described['parameters'] / 1e6:.2f}M | velocity | {steps} steps of" in card
    assert "codec `pixels`" in card


def test_an_interrupted_copy_is_made_again(finished, tmp_path, monkeypatch):
    out = tmp_path / "published"
    monkeypatch.setattr(stage, "card", lambda found: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish(finished.ensemble, out)
    assert not manifest.exists(out)
    (out / "experts" / "0" / weight_files.WEIGHTS).write_bytes(b"half")
    monkeypatch.undo()
    publish(finished.ensemble, out)
    np.testing.assert_array_equal(sample_videos(out), sample_videos(finished.ensemble))


def test_republishing_keeps_every_byte_and_the_provenance(tmp_path):
    publish("bundled:shapes", tmp_path / "a")
    publish(tmp_path / "a", tmp_path / "b")
    for name in ("manifest.json", "README.md", "router/model.safetensors", "experts/2/manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert manifest.read(tmp_path / "b", EnsembleManifest).provenance["licence"] == "Apache-2.0"


def test_published_files_and_reports_name_no_machine(finished, micro, trained, tmp_path):
    """Manifests, model cards and reports hold no path and no host name of the machine that trained, and no secret."""
    publish(finished.ensemble, tmp_path / "published")
    evaluate(micro, finished)
    folders = tmp_path / "published", tmp_path / "run" / "evaluation"
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        data = path.read_bytes()
        assert str(tmp_path).encode() not in data, path
        if path.suffix in (".json", ".md"):
            assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", data.decode()), path
    assert os.environ["HF_TOKEN"] == SECRET
    run_files = [path for path in Path(trained.path).rglob("*") if path.is_file()]
    assert {"config.json", "metrics.jsonl"} <= {path.name for path in run_files}  # written by training
    assert not [path for path in files + run_files if SECRET.encode() in path.read_bytes()]


def test_a_model_card_holds_only_known_names_and_numbers(finished, micro):
    """Free text in a manifest, which could be Markdown or HTML, is not copied into the card."""
    injected = "</td>](x) <script>"

    def change(value):
        value["training"] = {
            "steps": 3,
            "global_batch_size": 4,
            "clips": 5,
            "flops_per_sample": 6,
            "seed": 0,
            "x": injected,
        }
        value |= {"versions": {"python": injected}, "note": injected, "source": injected}
        return value

    for k in range(3):
        path = finished.export(Role("expert", k)) / manifest.FILE_NAME
        manifest.write_json(path, change(manifest.read_json(path)))
    assemble(micro, finished)
    ensemble = ensemble_manifest.read(finished.ensemble)
    assert injected not in stage.card(ensemble) and "3 steps of 4 clips" in stage.card(ensemble)


def test_invalid_sources_and_outputs_are_refused_and_nothing_is_written(finished, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match=r"mine holds diary.txt, which is no part of this; choose another --out"):
        publish(finished.ensemble, tmp_path / "mine")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"page holds README.md, which is no part of this; choose another --out"):
        publish(finished.ensemble, tmp_path / "page")
    with pytest.raises(UserError, match=r"diary.txt is a file; choose another --out"):
        publish(finished.ensemble, tmp_path / "mine" / "diary.txt")
    with pytest.raises(UserError, match="is a single network, whose folder holds all of it"):
        publish(finished.export(Role("monolith")), tmp_path / "x")
    with pytest.raises(UserError, match="ensemble holds something finished already"):
        publish(finished.ensemble, finished.ensemble)
    (finished.export(Role("expert", 1)) / weight_files.WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=r"experts/1/export/model.safetensors has 0 bytes"):
        publish(finished.ensemble, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ensemble=bundled:shapes"], "--out is missing"),
        (["--ensemble=bundled:shapes", "--out=x", "--layout=bfl"], "--layout is for a single network"),
        (["--ensemble=bundled:shapes", "--out=x", "--network=y"], "--network is for a single network"),
        (["--ensemble=bundled:shapes", "--out=/proc/nothing/x"], "(No such file or directory); free some space"),
        (["--ensemble=nowhere", "--out=x"], "There is no ensemble at nowhere"),
    ],
)
def test_invalid_combinations_of_flags_are_refused(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["export", *flags]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
