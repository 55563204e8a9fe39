"""Curation: what is left out is listed as such, and is no fault."""

from pathlib import Path

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.config.experiment import Experiment
from paris_jax.config.sections import CurationSettings
from paris_jax.data import curation, index, records, video
from paris_jax.data.preparation import prepare
from paris_jax.data.sources.clip import Clip, video_of
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.errors import UserError

SOURCE = ShapesSource(0, 60, 8, 32, 32, 8.0)


def put(folder: Path, videos: dict[str, np.ndarray], caption: str = "a picture of something") -> dict:
    folder.mkdir(exist_ok=True)
    for name, frames in videos.items():
        video.write_video(folder / name, frames, 8.0, scale=1)
        (folder / name).with_suffix(".txt").write_text(caption)
    return {"source": "folder", "path": str(folder), "num_clips": 0}


def run(tmp_path: Path, data: dict, **settings) -> tuple[list[str], dict[str, int]]:
    """Ids of the clips, and how many were left out for which reason."""
    folder = RunFolder(tmp_path / f"run{len(list(tmp_path.iterdir()))}")
    prepare(Experiment.from_config({"data": data, "curation": settings}), folder, decoders=1)
    found = manifest.read(folder.data, DataManifest, verify=True)
    ids = [record.id for record in records.read_records(folder.data)]
    entries = index.ClipIndex(folder.data, found.files)
    assert [entry.id for block in entries.blocks() for entry in block.entries()] == ids and found.clips == len(ids)
    assert {kind.stage for kind in found.dropped} <= {"curate"}
    return ids, {kind.reason: kind.count for kind in found.dropped}


def test_clips_are_chosen_by_motion_brightness_size_duration_and_caption(tmp_path):
    still = np.full((16, 32, 48, 3), 120, np.uint8)
    data = put(
        tmp_path / "videos",
        {
            "bright.mp4": np.full_like(still, 250),
            "dark.mp4": np.full_like(still, 3),
            "moving.mp4": SOURCE[3].video.repeat(2, 0),
            "long.mp4": np.concatenate([SOURCE[4].video.repeat(2, 0)] * 2),
            "still.mp4": still,
        },
    )
    everything = run(tmp_path, data)
    assert len(everything[0]) == 12 and everything[1] == {}
    assert run(tmp_path, data, min_motion=0.1)[1] == {"moves too little": 6}
    assert run(tmp_path, data, min_brightness=5.0)[1] == {"is too dark": 2}
    assert run(tmp_path, data, max_brightness=245.0)[1] == {"is too bright": 2}
    assert run(tmp_path, data, min_side=32, min_seconds=3.0) == (
        [f"long.mp4#000{i}" for i in range(4)],
        {"is shorter than curation.min_seconds": 4},
    )
    with pytest.raises(UserError, match=r"No clip can be used: 5 x is too small, such as bright\.mp4 .*48 x 32 of 33"):
        run(tmp_path, data, min_side=33)
    with pytest.raises(UserError, match="has a caption that is too short"):
        run(tmp_path, data, min_caption_words=5)
    assert len(run(tmp_path, data, min_caption_words=4, max_caption_words=4)[0]) == 12


def test_windows_may_slide(tmp_path):
    data = put(tmp_path / "videos", {"a.mp4": SOURCE[3].video.repeat(3, 0)})  # 24 frames
    assert len(run(tmp_path, data)[0]) == 3
    assert len(run(tmp_path, data, stride_frames=4)[0]) == 5
    assert len(run(tmp_path, data, stride_frames=12)[0]) == 2


def test_no_clip_spans_two_scenes(tmp_path):
    pytest.importorskip("scenedetect")
    scenes = [np.full((n, 32, 32, 3), level, np.uint8) for n, level in ((12, 20), (20, 200), (6, 90), (10, 250))]
    data = put(
        tmp_path / "videos", {"a.mp4": np.concatenate(scenes), "b.mp4": np.concatenate([scenes[0], scenes[1][:6]])}
    )
    ids, _ = run(tmp_path, data, scene_cuts=True)
    assert ids == [*(f"a.mp4#000{i}" for i in range(4)), "b.mp4#0000"]  # 1 + 2 + 0 + 1 of 8 frames
    assert len(run(tmp_path, data)[0]) == 8


def test_near_duplicates_stay_once_over_all_shards(tmp_path):
    """The same video in another compression, size and brightness; another video; the same black clip twice."""
    one, other = SOURCE[5].video, SOURCE[9].video
    data = put(
        tmp_path / "videos",
        {
            "a.mp4": one,
            "b.webm": np.stack([video.fit(frame, 48, 48) for frame in one]),
            "c.mp4": (one * 0.9).astype(np.uint8),
            "d.mp4": other,
            "e.mp4": np.zeros_like(one),
            "f.mp4": np.zeros_like(one),
        },
    )
    folder = RunFolder(tmp_path / "run")
    settings, data = {"near_duplicate_bits": 8}, data | {"height": 32, "width": 32}
    prepare(Experiment.from_config({"data": data, "curation": settings}), folder, shard_size=2, decoders=1)
    ids = [record.id for record in records.read_records(folder.data)]
    assert ids == ["a.mp4#0000", "d.mp4#0000", "e.mp4#0000"]
    found = manifest.read(folder.data, DataManifest, verify=True)
    assert [(kind.reason, kind.count) for kind in found.dropped] == [("is nearly the same as an earlier clip", 3)]


def test_different_clips_have_different_hashes():
    hashes = [curation.perceptual_hash(SOURCE[number].video) for number in range(60)]
    assert curation.near_duplicates(hashes, 8) == []
    assert curation.near_duplicates([*hashes, hashes[7]], 0) == [60]
    number = int.from_bytes(hashes[7], "big")
    for bits in range(12):
        near = (number ^ sum(1 << (16 * place + 3) for place in range(bits))).to_bytes(24, "big")
        assert curation.near_duplicates([hashes[7], near], 11) == [1]
        assert curation.near_duplicates([hashes[7], near], bits - 1) == [] if bits else True


def test_mirrored_clips_belong_to_their_video(tmp_path):
    data = put(tmp_path / "videos", {"a.mp4": SOURCE[3].video})
    folder = RunFolder(tmp_path / "run")
    prepare(Experiment.from_config({"data": data, "curation": {"horizontal_flip": "on"}}), folder, decoders=1)
    one, mirrored = records.read_records(folder.data)
    assert (one.id, mirrored.id) == ("a.mp4#0000", "a.mp4#0000#flipped")
    assert video_of(one.id) == video_of(mirrored.id)
    clip = Clip("a#0000", np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3), 8.0, "x")
    np.testing.assert_array_equal(curation.flip(clip).video[:, :, 0], clip.video[:, :, 3])


@pytest.mark.parametrize("caption", ["a car turns Left", "the rightmost door", "a wheel turns counter-clockwise"])
def test_mirroring_is_refused_where_a_caption_names_a_side(tmp_path, caption):
    data = put(tmp_path / "videos", {"a.mp4": SOURCE[3].video}, caption)
    with pytest.raises(UserError, match=r"horizontal_flip=on: the caption of clip a\.mp4#0000 names a side"):
        run(tmp_path, data, horizontal_flip="on")
    assert len(run(tmp_path, data, horizontal_flip="forced")[0]) == 2
    assert not curation.names_a_side("a bright upright copyright")


def test_a_config_without_curation_is_the_config_that_it_was():
    default = Experiment.from_config({})
    assert default.data_hash == Experiment.from_config({"curation": {}}).data_hash
    assert default.data_hash != Experiment.from_config({"curation": {"min_motion": 1.0}}).data_hash
    assert curation.fault(SOURCE[0], CurationSettings()) is None
