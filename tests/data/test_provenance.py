"""What prepared clips were made of: changes are noticed, said, and cost what they must; not after a training."""

import json
import os
import shutil
from pathlib import Path

import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import DataManifest, ShardMarker, SourceItem
from paris_jax.clustering.build import cluster
from paris_jax.config.experiment import Experiment
from paris_jax.data import preparation as stage
from paris_jax.data import provenance, records, shards, video
from paris_jax.data.preparation import prepare
from paris_jax.data.sources.folder import FolderSource
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.errors import UserError

NAMES = "abcdef"


def put(path: Path, number: int, caption: str | None = None) -> None:
    video.write_video(path, ShapesSource(number, 1, 16, 32, 32, 8.0)[0].video, 8.0, scale=1)
    if caption:
        path.with_suffix(".txt").write_text(caption)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder of videos, and the data prepared from it: three shards of two videos of two clips."""
    root = tmp_path_factory.mktemp("made")
    (root / "videos").mkdir()
    for number, name in enumerate(NAMES):
        put(root / "videos" / f"{name}.mp4", number, f"a picture called {name}")
    return root


@pytest.fixture
def place(made, tmp_path) -> Path:
    """A copy with equal times; prepared."""
    shutil.copytree(made / "videos", tmp_path / "videos")
    again(tmp_path)
    return tmp_path


def config(place: Path) -> Experiment:
    data = {"source": "folder", "path": str(place / "videos"), "num_clips": 0, "heldout_fraction": 0.0}
    training = {"global_batch_size": 2}
    return Experiment.from_config({"data": data, "training": training, "clustering": {"num_clusters": 2}})


def again(place: Path) -> RunFolder:
    run = RunFolder(place / "run")
    prepare(config(place), run, shard_size=2, decoders=1)
    return run


def times(place: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in (place / "run" / "data").glob("*.array_record")}


def rewritten(place: Path, before: dict[str, int]) -> list[int]:
    return sorted(int(name[5:10]) for name, time in times(place).items() if before.get(name) != time)


def check_fresh(place: Path) -> None:
    """The data are those that a new run folder gets, byte for byte."""
    fresh = RunFolder(place / "fresh")
    prepare(config(place), fresh, shard_size=2, decoders=1)
    found = {path.name: path.read_bytes() for path in (place / "run" / "data").iterdir()}
    assert found == {path.name: path.read_bytes() for path in Path(fresh.data).iterdir()}
    manifest.read(place / "run" / "data", DataManifest, verify=True)


def no_decoding(monkeypatch) -> None:
    monkeypatch.setattr(shards, "write", lambda *_: pytest.fail("decodes again"))


def test_nothing_happens_where_nothing_changed(place, monkeypatch):
    no_decoding(monkeypatch)
    monkeypatch.setattr(FolderSource, "content", lambda *_: pytest.fail("reads contents where times are the same"))
    before = times(place)
    again(place)
    assert rewritten(place, before) == []


def test_an_edited_caption_costs_its_shard_and_no_decoding(place, monkeypatch, caplog):
    no_decoding(monkeypatch)
    before = times(place)
    (place / "videos" / "c.txt").write_text("something else entirely")
    again(place)
    assert "1 captions changed (c.mp4); only this is prepared again" in caplog.text
    assert rewritten(place, before) == [1]
    captions = [record.caption for record in records.read_records(place / "run" / "data")]
    assert captions[4:8] == ["something else entirely"] * 2 + ["a picture called d"] * 2
    monkeypatch.undo()
    check_fresh(place)


def test_a_file_that_was_replaced_costs_its_shard(place, caplog):
    before = times(place)
    put(place / "videos" / "f.mp4", 99)
    again(place)
    assert "1 videos changed in place (f.mp4)" in caplog.text
    assert rewritten(place, before) == [2]
    check_fresh(place)


def test_a_file_that_was_only_touched_costs_nothing(place, monkeypatch):
    no_decoding(monkeypatch)
    before = times(place)
    for name in NAMES:
        os.utime(place / "videos" / f"{name}.mp4", ns=(10**18, 10**18))
    again(place)
    assert rewritten(place, before) == []
    monkeypatch.setattr(FolderSource, "content", lambda *_: pytest.fail("reads the contents a second time"))
    again(place)


def test_an_edit_and_a_new_file_between_a_kill_and_the_next_run_are_noticed(place):
    (place / "run" / "data" / "manifest.json").unlink()  # as if it was killed before it wrote this
    before = times(place)
    put(place / "videos" / "a.mp4", 98)
    (place / "videos" / "f.txt").write_text("another caption")
    again(place)
    assert rewritten(place, before) == [0, 2]
    check_fresh(place)


def test_new_and_removed_videos_are_noticed(place, caplog):
    put(place / "videos" / "g.mp4", 50, "a picture called g")
    again(place)
    assert "1 videos are new (g.mp4)" in caplog.text
    check_fresh(place)
    (place / "videos" / "b.mp4").unlink()
    again(place)
    assert "1 videos are gone (b.mp4)" in caplog.text
    shutil.rmtree(place / "fresh")
    check_fresh(place)


def test_a_caption_that_is_gone_or_comes_back_takes_decoding(place):
    caption = place / "videos" / "c.txt"
    caption.unlink()
    data = {"source": "folder", "path": str(place / "videos"), "num_clips": 0, "heldout_fraction": 0.0}
    loose = Experiment.from_config(
        {
            "data": data | {"max_dropped_share": 0.5},
            "training": {"global_batch_size": 2},
            "clustering": {"num_clusters": 2},
        }
    )
    run = RunFolder(place / "run")
    prepare(loose, run, shard_size=2, decoders=1)
    assert manifest.read(run.data, DataManifest).clips == 10
    caption.write_text("a picture called c")
    again(place)
    assert manifest.read(run.data, DataManifest).clips == 12
    check_fresh(place)


@pytest.mark.parametrize(
    ("encoder", "decodes", "said"),
    [("text", False, "the weights of the text encoder changed"), ("codec", True, "the weights of the codec changed")],
)
def test_other_weights_of_an_encoder_are_noticed(place, monkeypatch, caplog, encoder, decodes, said):
    of = stage.weights_of
    monkeypatch.setattr(stage, "weights_of", lambda *a, **k: of(*a, **k) | {encoder: "f" * 64})
    written, write = [], shards.write
    monkeypatch.setattr(shards, "write", lambda job, *rest: written.append(job.number) or write(job, *rest))
    before = times(place)
    again(place)
    assert said in caplog.text
    assert rewritten(place, before) == [0, 1, 2] and written == ([0, 1, 2] if decodes else [])
    written.clear()
    again(place)
    assert not written


def test_other_rules_of_decoding_are_noticed(place, monkeypatch, caplog):
    before = times(place)
    monkeypatch.setattr(shards, "DECODING_VERSION", 99)
    again(place)
    assert "the rules of decoding changed" in caplog.text and rewritten(place, before) == [0, 1, 2]


def test_what_networks_were_trained_on_is_not_replaced(place):
    before = times(place)
    (place / "run" / "experts" / "1" / "checkpoints" / "7").mkdir(parents=True)
    again(place)  # nothing has changed
    (place / "videos" / "c.txt").write_text("something else")
    with pytest.raises(UserError, match=r"differs from its source: 1 captions changed \(c\.mp4\); .*experts/1 lear"):
        again(place)
    assert rewritten(place, before) == [] and (place / "run" / "data" / "manifest.json").exists()
    shutil.rmtree(place / "run" / "experts")
    again(place)
    assert rewritten(place, before) == [1]


def test_clusters_of_the_old_clips_are_made_again(place):
    run = RunFolder(place / "run")
    cluster(config(place), run)
    (place / "videos" / "c.txt").write_text("something else")
    again(place)
    assert not list(Path(run.partition).rglob("manifest.json"))
    cluster(config(place), run)
    captions = {r.caption for k in range(2) for r in records.read_records(run.cluster(k))}
    assert "something else" in captions and "a picture called c" not in captions


def test_data_whose_source_is_not_here_stay_as_they_are(place, caplog):
    (place / "videos").rename(place / "elsewhere")
    with caplog.at_level("INFO"):
        again(place)
    assert "changes are not noticed" in caplog.text and "12 clips are prepared already" in caplog.text
    (place / "videos").mkdir()  # a disk that is not mounted
    again(place)
    put(place / "videos" / "a.mp4", 0, "a picture called a")
    with pytest.raises(UserError, match="more than half of the source is gone, as if its disk was not there"):
        again(place)
    assert manifest.exists(place / "run" / "data")


def test_a_file_that_changes_while_it_is_read_is_refused(place, monkeypatch):
    put(place / "videos" / "a.mp4", 97)
    of, calls = FolderSource.item, []

    def item(self, index):
        found = of(self, index)
        calls.append(index)
        return SourceItem(found.id, found.state + str(len(calls)), found.caption)

    monkeypatch.setattr(FolderSource, "item", item)
    with pytest.raises(UserError, match=r"a\.mp4 changed while it was read; run the same command again"):
        again(place)


def test_changes_of_several_shards_are_one_sentence():
    changes = provenance.Changes()
    moved = provenance.Changes(added={"b", "x"}, gone={"a"})
    other = provenance.Changes(added={"a"}, gone={"b", "y"}, found={"caption": ["c", "d", "e", "f"]})
    for each in (moved, other):
        changes.merge(each)
    assert str(changes) == "4 captions changed (c, d, e, ...), 1 videos are new (x), 1 videos are gone (y)"
    assert changes and not changes.is_text_only
    assert not provenance.Changes(touched=True)


def test_computed_clips_have_no_items():
    source = ShapesSource(0, 4, 8, 20, 20, 8.0)
    assert provenance.read_items(source, range(4)) == ()
    origin = {"config_hash": "", "encoders": {"codec": None, "text": None, "features": None}, "decoding": 0}
    origin |= {"source": source.identity(), "indices": [0, 4]}
    shape = (1, 1, 1, 1)
    tally = {"clips": 0, "text_length": 0, "words": (), "numbers": 0, "sum": 0.0, "squares": 0.0, "shape": shape}
    marker = manifest.decode(json.dumps({"origin": origin, "tally": tally}), "marker", ShardMarker, "")
    assert not provenance.compare(marker, origin, source, range(4))[0]
    other = ShapesSource(1, 4, 8, 20, 20, 8.0)
    assert str(provenance.compare(marker, origin | {"source": other.identity()}, other, range(4))[0]) == (
        "the source changed"
    )
