"""Folders of videos: which clip is scored, and sets whose scores would mean little are refused with what to do."""

import shutil

import numpy as np
import pytest

from paris_jax.data import video
from paris_jax.errors import UserError
from paris_jax.evaluation import folder_scores, folders
from paris_jax.evaluation.features import FeatureNetwork, WeightFiles
from paris_jax.evaluation.folder_scores import FolderRequest, evaluate_folders
from paris_jax.evaluation.folders import ClipRule, VideoFolder

NONE = WeightFiles()
RULE = ClipRule(num_frames=4)


def write(folder, count, frames=6, side=16, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(count):
        coarse = rng.integers(0, 256, (frames, side // 4, side // 4, 3), np.uint8)
        video.write_video(folder / f"{i:02d}.mp4", coarse.repeat(4, 1).repeat(4, 2), 8.0, scale=1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write(root / "generated", 16, seed=1)
    write(root / "reference", 34, seed=2)
    return root


@pytest.fixture
def two(sets, tmp_path):
    """Copies of five videos each, to change."""
    for name in ("generated", "reference"):
        (tmp_path / name).mkdir()
        for i in range(5):
            shutil.copy(sets / name / f"{i:02d}.mp4", tmp_path / name)
    return tmp_path


def request(root, **changes) -> FolderRequest:
    fields = {"rule": RULE, "files": NONE} | changes
    return FolderRequest(str(root / "generated"), str(root / "reference"), **fields)


@pytest.fixture
def mean_colour(monkeypatch):
    """A network whose features are a video's mean colour and its square, instead of published ones; counts videos."""
    seen = []

    def embed(videos):
        seen.extend(range(len(videos)))
        colour = videos.astype(np.float32).mean((1, 2, 3)) / 255
        return np.concatenate([colour, colour**2], axis=1)

    network = FeatureNetwork("colour", "Frechet distance (colours)", 6, 2, "all frames", "0" * 64, embed)
    monkeypatch.setattr(folder_scores.features, "networks", lambda files: [network])
    return seen


def test_scores_have_their_protocol_and_a_floor_of_other_videos(sets, mean_colour, tmp_path):
    found = evaluate_folders(request(sets, num_clips=16, out=str(tmp_path / "out")))
    rows = {row["id"]: row for row in found["scores"]}
    assert rows.keys() == {"colour_frechet", "colour_kernel", "colour_limit", "motion", "flicker"}
    assert rows["colour_frechet"]["score"]["n"] == rows["colour_frechet"]["floor_clips"] == 16
    assert rows["motion"]["score"]["value"] > 0
    protocol = found["protocol"]
    assert protocol["pixels"].startswith("4 x 16 x 16") and "16 of each" in protocol["videos"]
    assert protocol["Frechet distance (colours)"] == "all frames; weights 000000000000"
    assert {"frames", "clip", "size", "floor", "intervals", "device", "versions"} <= protocol.keys()


def test_a_finished_evaluation_is_not_repeated_and_an_interrupted_one_resumes(sets, mean_colour, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_scores, "CHUNK", 8)
    asked = request(sets, num_clips=16, out=str(tmp_path / "out"))
    with monkeypatch.context() as broken:
        broken.setattr(folder_scores, "_results", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate_folders(asked)
    assert len(mean_colour) == 48
    first = evaluate_folders(asked)
    assert evaluate_folders(asked) == first and len(mean_colour) == 48
    assert not (tmp_path / "out" / folder_scores.PARTIAL).exists()


def test_a_changed_video_is_noticed(sets, mean_colour, two):
    first = evaluate_folders(request(two))
    write(two / "generated", 1, seed=9)
    assert evaluate_folders(request(two))["evaluation_hash"] != first["evaluation_hash"]


def test_unequal_numbers_are_refused_with_the_number_to_give(sets):
    with pytest.raises(UserError, match=r"holds 16 videos and --reference 34.*--num_clips=16"):
        evaluate_folders(request(sets))
    with pytest.raises(UserError, match=r"holds 16 videos, fewer than --num_clips=20"):
        evaluate_folders(request(sets, num_clips=20))


def test_fewer_than_nine_frames_are_refused_for_i3d(sets):
    with pytest.raises(UserError, match=r"needs at least 9 frames|needs I3D's weights"):
        evaluate_folders(request(sets, num_clips=4, files=WeightFiles(i3d="installed")))


def test_missing_weights_are_refused_with_a_remedy(sets, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        evaluate_folders(request(sets, num_clips=4, files=WeightFiles(i3d=str(tmp_path / "absent.pt"))))
    with pytest.raises(UserError, match=r"--aesthetic needs .* --clip"):
        WeightFiles(aesthetic="head.pth")


def test_a_video_that_is_there_twice_is_refused_and_can_be_counted(two):
    shutil.copy(two / "generated" / "01.mp4", two / "generated" / "03.mp4")
    with pytest.raises(UserError, match=r"1 videos are there twice .*--allow_degenerate"):
        evaluate_folders(request(two))
    found = evaluate_folders(request(two, allow_degenerate=True))
    assert found["protocol"]["videos of one colour or there twice"] == "counted"


def test_a_video_of_one_colour_is_refused(two):
    video.write_video(two / "generated" / "02.mp4", np.full((6, 16, 16, 3), 128, np.uint8), 8.0, scale=1)
    with pytest.raises(UserError, match=r"1 videos are of a single colour \(02.mp4\)"):
        evaluate_folders(request(two))


def test_sizes_must_be_equal_and_can_be_made_so(two):
    write(two / "generated", 5, side=24)
    with pytest.raises(UserError, match="24 x 24 pixels and --reference of 16 x 16"):
        evaluate_folders(request(two))
    found = evaluate_folders(request(two, rule=ClipRule(num_frames=4, size=(12, 12))))
    assert found["protocol"]["pixels"].startswith("4 x 12 x 12")


def test_a_short_video_is_refused_by_name(two):
    with pytest.raises(UserError, match=r"mp4 has 6 frames, fewer than --num_frames=8"):
        evaluate_folders(request(two, rule=ClipRule(num_frames=8)))


@pytest.mark.parametrize(("choice", "start"), [("first", 0), ("middle", 3)])
def test_the_clip_is_the_one_that_is_chosen(tmp_path, choice, start):
    frames = np.repeat(np.arange(10, dtype=np.uint8) * 25, 3 * 16 * 16).reshape(10, 16, 16, 3)
    for i, frame in enumerate(frames):
        (tmp_path / "v" / "a").mkdir(parents=True, exist_ok=True)
        video.write_png(tmp_path / "v" / "a" / f"{i}.png", frame)
    folder = VideoFolder.open(tmp_path / "v", "generated")
    clip = folder.read(folder.names, ClipRule(num_frames=4, choice=choice))
    np.testing.assert_array_equal(clip[0, :, 0, 0, 0], 25 * np.arange(start, start + 4))


def test_a_random_choice_depends_on_seed_and_name_only(sets):
    folder = VideoFolder.open(sets / "reference", "reference")
    assert folder.choose(5, 0).names == folder.choose(9, 0).names[:5]
    assert folder.choose(5, 0).names != folder.choose(5, 1).names
    rest = folder.choose(5, 0, leave_out=set(folder.choose(5, 0).names))
    assert not set(rest.names) & set(folder.choose(5, 0).names)


def test_values_out_of_range_and_not_finite_are_refused():
    videos = np.zeros((3, 2, 4, 4, 3), np.float32)
    folders.check_values(videos, "generated")
    videos[1, 0, 0, 0, 0] = 1.5
    with pytest.raises(UserError, match=r"video 1 reaches 1.5; values must be in \[-1, 1\]"):
        folders.check_values(videos, "generated")
    videos[2, 0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="video 2 holds values that are not finite"):
        folders.check_values(videos, "generated")


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="must be a folder of videos"):
        VideoFolder.open(tmp_path / "absent", "generated")
    with pytest.raises(UserError, match="holds no video"):
        VideoFolder.open(tmp_path, "generated")
