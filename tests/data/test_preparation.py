"""prepare: whatever happens on the way, the same data or one clear sentence."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.config.experiment import Experiment
from paris_jax.data import encoding, records, shards, video
from paris_jax.data import preparation as stage
from paris_jax.data.preparation import prepare
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.encoders import codecs, text
from paris_jax.encoders.words import Words
from paris_jax.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = {"data": {"num_clips": 20, "seed": 5}}


def experiment(**sections) -> Experiment:
    return Experiment.from_config(CONFIG | sections)


def contents(run: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(run.data).iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunFolder:
    """A run that nothing disturbed."""
    run = RunFolder(tmp_path_factory.mktemp("whole"))
    prepare(experiment(), run, shard_size=6)
    return run


def test_every_clip_is_there_with_all_that_training_needs(whole):
    found = manifest.read(whole.data, DataManifest, verify=True)
    assert (found.clips, found.fps, found.source) == (20, 8.0, {"name": "shapes", "seed": 5})
    assert found.latent.shape == (4, 10, 10, 24)
    stored = records.read_records(whole.data)
    source = ShapesSource(5, 20, 8, 20, 20, 8.0)
    assert len(stored) == 20
    codec, words = codecs.from_description(found.codec), text.from_description(found.text)
    for record, clip in zip(stored, source, strict=True):
        assert (record.id, record.caption, record.attributes) == (clip.id, clip.caption, clip.attributes)
        np.testing.assert_array_equal(codecs.to_uint8(codec.decode(record.latent)), clip.video)
        (encoding,) = words.encode([clip.caption])
        np.testing.assert_array_equal(record.tokens.astype(np.float32), encoding.tokens)
        np.testing.assert_array_equal(record.pooled.astype(np.float32), encoding.pooled)
        assert words.unknown_words(clip.caption) == {}
    assert found.text_length == max(len(record.tokens) for record in stored)
    normal = np.stack([codecs.LatentScale.from_manifest(found.latent).normalise(r.latent) for r in stored])
    assert abs(normal.mean()) < 1e-4
    assert normal.std() == pytest.approx(1.0, abs=1e-4)


def test_the_bar_tells_clips_a_second_once_it_knows():
    task: Any = types.SimpleNamespace(speed=None, description="clips")
    assert str(stage.Speed().render(task)) == ""
    task.speed = 12.345
    assert str(stage.Speed().render(task)) == "12.3 clips/s"


def test_clips_are_encoded_in_batches_and_alike_in_any(monkeypatch):
    """Captions and clips of a batch go to the encoders together; what comes out does not depend on who is beside."""
    clips, seen, of = list(ShapesSource(5, 20, 8, 20, 20, 8.0)), [], Words.encode
    monkeypatch.setattr(Words, "encode", lambda self, texts: seen.append(len(texts)) or of(self, texts))
    together = list(encoding.encode(experiment(), clips))
    assert len(seen) == 2 and sum(seen) == len({clip.caption for clip in clips})  # 16 clips, then 4
    for record, clip in zip(together, clips, strict=True):
        (alone,) = encoding.encode(experiment(), [clip])
        for name in records.ARRAYS:
            np.testing.assert_array_equal(getattr(record, name), getattr(alone, name))


def test_a_finished_run_is_left_as_it_is(whole, caplog):
    before = {path: path.stat().st_mtime_ns for path in Path(whole.data).iterdir()}
    with caplog.at_level("INFO"):
        prepare(experiment(), whole)
    assert "20 clips are prepared already" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in Path(whole.data).iterdir()} == before


def test_two_processes_give_the_same_bytes(whole, tmp_path):
    run = RunFolder(tmp_path)
    prepare(experiment(), run, processes=2, shard_size=6)
    assert contents(run) == contents(whole)


def test_encoders_on_accelerators_are_one_processs_affair(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "describe_encoders", lambda *_: {"codec": {}, "text": {}, "features": {}})
    monkeypatch.setattr(stage.jax, "default_backend", lambda: "tpu")
    with pytest.raises(UserError, match="--num_workers=2: these encoders run on the accelerators"):
        prepare(experiment(features={"name": "dinov2"}), RunFolder(tmp_path / "run"), processes=2)
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_config_is_refused(whole):
    with pytest.raises(UserError, match=r"made with another config \(different: data\.num_clips\)"):
        prepare(experiment(data={"num_clips": 21, "seed": 5}), whole)


KILLED = """
import sys, time
from paris_jax.data.sources import shapes
whole = shapes.ShapesSource.__getitem__
shapes.ShapesSource.__getitem__ = lambda self, index: (time.sleep(0.02), whole(self, index))[1]
from paris_jax.config.experiment import Experiment
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.data.preparation import prepare
prepare(Experiment.from_config({config}), RunFolder(sys.argv[1]), shard_size=6)
"""


@pytest.mark.parametrize("until", [".data-00000-of-00004.array_record.*.partial", "data-00002-of-00004.array_record"])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(whole, tmp_path, until):
    command = [sys.executable, "-c", KILLED.replace("{config}", repr(CONFIG)), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "data").glob(until)):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run = RunFolder(tmp_path)
    assert not manifest.exists(run.data)
    finished = {path: path.stat().st_mtime_ns for path in Path(run.data).glob("data-0000[01]*.array_record")}
    prepare(experiment(), run, shard_size=6)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not made again
    assert contents(run) == contents(whole)


def test_shards_of_another_source_are_made_again(whole, tmp_path):
    run = RunFolder(tmp_path)
    other = experiment(data={"num_clips": 20, "seed": 6})
    source = ShapesSource(6, 20, 8, 20, 20, 8.0)
    shards.write(shards.Shard(other, source, str(run.data), 1, 4, 6, {}))
    assert (Path(run.data) / "data-00001-of-00004.array_record").exists()
    prepare(experiment(), run, shard_size=6)
    assert contents(run) == contents(whole)


def test_a_full_disk_is_refused_and_nothing_half_written_counts(whole, tmp_path):
    run = RunFolder(tmp_path)
    run.claim(experiment().to_dict(), experiment().hash)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"Cannot write .*data-00000.*free some space.*run the same command again"):
            prepare(experiment(), run, shard_size=6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(run) == {}
    prepare(experiment(), run, shard_size=6)
    assert contents(run) == contents(whole)


def test_a_really_full_disk_is_refused(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        run = RunFolder(tmp_path)
        with pytest.raises(UserError, match="No space left on device"):
            prepare(experiment(data={"num_clips": 400}), run, shard_size=50)
        assert not manifest.exists(run.data)
        assert not list(Path(run.data).glob(".*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def put_videos(folder: Path, captions: dict[str, str]) -> dict:
    folder.mkdir(exist_ok=True)
    for number, (name, caption) in enumerate(captions.items()):
        frames = ShapesSource(number, 1, 16, 32, 40, 8.0)[0].video
        video.write_video(folder / name, frames, 8.0, scale=1)
        (folder / name).with_suffix(".txt").write_text(caption)
    return {"source": "folder", "path": str(folder), "num_clips": 0}


def test_real_videos_go_through_the_same_stage(tmp_path):
    data = put_videos(
        tmp_path / "videos", {"a.mp4": "something round", "b.gif": "A number, maybe?", "c.webm": "shapes"}
    )
    run = RunFolder(tmp_path / "run")
    prepare(experiment(data=data), run)
    found = manifest.read(run.data, DataManifest, verify=True)
    assert (found.clips, found.source["videos"], found.text_length) == (6, 3, 3)
    assert found.text.vocabulary == ("a", "maybe", "number", "round", "shapes", "something")
    assert [r.id for r in records.read_records(run.data)] == [
        f"{n}#000{i}" for n in ("a.mp4", "b.gif", "c.webm") for i in (0, 1)
    ]
    fewer = RunFolder(tmp_path / "fewer")
    prepare(experiment(data=data | {"num_clips": 4}), fewer)
    assert manifest.read(fewer.data, DataManifest).clips == 4


def lines_of(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (Path(run.data) / "dropped.jsonl").read_text().split("\n")[:-1]]


def test_what_cannot_be_used_is_listed_counted_and_shown(tmp_path, capsys):
    data = put_videos(tmp_path / "videos", {"a.mp4": "fine", "b.mp4": "word " * 30, "c.mp4": "broken"})
    (tmp_path / "videos" / "c.mp4").write_bytes(b"broken")
    run = RunFolder(tmp_path / "run")
    prepare(experiment(data=data | {"max_dropped_share": 0.6}), run)
    found = manifest.read(run.data, DataManifest, verify=True)
    assert found.clips == 2
    assert [(kind.stage, kind.reason, kind.count) for kind in found.dropped] == [
        ("caption", "has a caption that cannot be encoded", 2),
        ("decode", "cannot be read as video", 1),
    ]
    assert [line["id"] for line in lines_of(run)] == ["c.mp4", "b.mp4#0000", "b.mp4#0001"]
    assert "the maximum is 24" in next(line["detail"] for line in lines_of(run) if line["stage"] == "caption")
    shown = capsys.readouterr().out
    assert "2 clips are used, 3 clips and files are dropped" in shown and "cannot be read as video" in shown


def test_too_many_losses_are_refused_and_may_be_allowed_without_decoding_again(tmp_path, monkeypatch):
    data = put_videos(tmp_path / "videos", {"a.mp4": "fine", "b.mp4": "broken"})
    (tmp_path / "videos" / "b.mp4").write_bytes(b"broken")
    run = RunFolder(tmp_path / "run")
    share = r"1 of 3 clips and files cannot be used, 33\.3% where data\.max_dropped_share=0\.05"
    reasons = r": 1 x cannot be read as video, such as b\.mp4 .*raise data\.max_dropped_share"
    with pytest.raises(UserError, match=share + reasons):
        prepare(experiment(data=data), run)
    assert not manifest.exists(run.data)
    assert [line["id"] for line in lines_of(run)] == ["b.mp4"]
    monkeypatch.setattr(shards, "write", lambda *_: pytest.fail("the shards are there"))
    prepare(experiment(data=data | {"max_dropped_share": 0.4}), run)
    assert manifest.read(run.data, DataManifest).clips == 2


def test_strict_refuses_at_the_first(tmp_path):
    data = put_videos(tmp_path / "videos", {"a.mp4": "fine", "b.mp4": "broken"})
    (tmp_path / "videos" / "b.mp4").write_bytes(b"broken")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"^b\.mp4 cannot be read as video .*\(stage decode\); mend or remove it"):
        prepare(experiment(data=data | {"max_dropped_share": 1.0}), run, strict=True)
    assert not manifest.exists(run.data)
    (tmp_path / "videos" / "b.mp4").unlink()
    (tmp_path / "videos" / "captions.csv").write_text("file,caption\nb.mp4,gone\n")
    with pytest.raises(UserError, match=r"captions\.csv, line 2 names a file that is not there"):
        prepare(experiment(data=data), RunFolder(tmp_path / "other"), strict=True)
    assert not (tmp_path / "other").exists()


def test_nothing_usable_is_refused(tmp_path):
    data = put_videos(tmp_path / "videos", {"a.mp4": "fine"})
    run = RunFolder(tmp_path / "run")
    too_long = experiment(data=data | {"num_frames": 400, "max_dropped_share": 1.0})
    with pytest.raises(UserError, match=r"No clip can be used: 1 x is shorter than one clip, such as a\.mp4"):
        prepare(too_long, run)
    assert not manifest.exists(run.data)


def test_a_file_that_changes_between_two_runs_is_decoded_again(tmp_path, monkeypatch):
    data = put_videos(tmp_path / "videos", {f"{name}.mp4": "fine" for name in "abcd"})
    run, of = RunFolder(tmp_path / "run"), stage.finish
    monkeypatch.setattr(stage, "finish", lambda *_: None)  # as if the run was killed after the last shard
    prepare(experiment(data=data), run, shard_size=2)
    monkeypatch.setattr(stage, "finish", of)
    before = {path: path.stat().st_mtime_ns for path in Path(run.data).glob("*.array_record")}
    video.write_video(tmp_path / "videos" / "c.mp4", 255 - ShapesSource(2, 1, 16, 32, 40, 8.0)[0].video, 8.0, scale=1)
    prepare(experiment(data=data), run, shard_size=2)
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["data-00001-of-00002.array_record"]
    fresh = RunFolder(tmp_path / "fresh")
    prepare(experiment(data=data), fresh, shard_size=2)
    assert contents(run) == contents(fresh)


def test_num_clips_bounds_the_clips_of_a_folder(tmp_path):
    data = put_videos(tmp_path / "videos", {f"{name}.mp4": "fine" for name in "abcd"})
    for processes in (1, 2):
        run = RunFolder(tmp_path / f"run{processes}")
        prepare(experiment(data=data | {"num_clips": 5}), run, shard_size=1, processes=processes)
        assert manifest.read(run.data, DataManifest, verify=True).clips == 5
        assert [record.id for record in records.read_records(run.data)][-1] == "c.mp4#0000"
    assert contents(RunFolder(tmp_path / "run1")) == contents(RunFolder(tmp_path / "run2"))


def test_minilm_goes_through_the_same_stage(tmp_path):
    try:
        text.text_encoder("minilm")
    except UserError as refused:
        pytest.skip(str(refused))
    run = RunFolder(tmp_path)
    prepare(experiment(data={"num_clips": 3}, text={"name": "minilm"}), run)
    found = json.loads((Path(run.data) / "manifest.json").read_text())
    assert found["text"]["name"] == "minilm"
    assert records.read_records(run.data)[0].tokens.shape[1] == 384
