"""Video files: what is written can be read, at the right times, in the right colours."""

import numpy as np
import pytest

from paris_jax.data import lettering, video
from paris_jax.data.decoding import footage
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.errors import UserError

CLIP = ShapesSource(0, 10, 8, 20, 20, 8.0)[2].video


@pytest.mark.parametrize(("ending", "off"), [("mp4", 0.0), ("webm", 1e-3), ("gif", 6e-3)])
def test_a_written_video_keeps_its_frames_times_and_colours(tmp_path, ending, off):
    path = tmp_path / f"clip.{ending}"
    video.write_video(path, CLIP, fps=8.0)
    found = footage.probe(path)
    np.testing.assert_allclose(found.times, np.arange(8) / 8, atol=off)
    assert found.duration == pytest.approx(1.0, abs=0.02)
    assert (found.height, found.width) == (160, 160)
    seconds, _, frames, _ = zip(*footage.decode(path, scale=lambda *_: (20, 20)), strict=True)
    np.testing.assert_allclose(seconds, np.arange(8) / 8, atol=off)
    assert np.abs(np.stack(frames).astype(int) - CLIP).mean() < 6
    assert not list(tmp_path.glob(".*"))


def test_odd_sizes_are_padded_for_h264():
    for shape in ((3, 161, 163, 3), (1, 5, 7, 3)):
        assert len(video.video_bytes(np.zeros(shape, np.uint8), 8.0)) > 500


def test_reading_starts_at_the_key_frame_before_the_time_asked_for(tmp_path):
    path = tmp_path / "long.mp4"
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[:, None, None, None], (120, 32, 32, 3))
    video.write_video(path, ramp, fps=30.0, scale=1)
    frame = next(f for f in footage.decode(path, start=3.0) if f.seconds >= 3.0)
    assert frame.seconds == pytest.approx(3.0)
    assert frame.image.mean() == pytest.approx(180, abs=3)


def test_pictures_come_back_exactly(tmp_path):
    video.write_png(tmp_path / "picture.png", CLIP[0])
    np.testing.assert_array_equal(footage.read_image(tmp_path / "picture.png"), CLIP[0])


def test_fitting_covers_and_crops_the_middle():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 255
    assert (video.fit(image, 20, 20) == 255).all()
    assert video.fit(image, 64, 16).shape == (64, 16, 3)


def test_a_contact_sheet_has_a_row_for_each_video_under_its_caption():
    bare = video.contact_sheet(np.stack([CLIP, CLIP]))
    assert bare.shape == (2 * (80 + 4), 8 * (80 + 4), 3)
    titled = video.contact_sheet(np.stack([CLIP, CLIP]), ["a red square", "É?"], columns=4)
    assert titled.shape == (2 * (80 + 4 + 17), 4 * (80 + 4), 3)
    assert (titled[3:17] == 0).any()


def test_lettering_draws_every_character_and_cuts_at_the_edge():
    assert all(len(rows) == lettering.ROWS for rows in lettering.GLYPHS.values())
    assert lettering.write_line("a very long line indeed", 50).shape == (14, 50)
    assert not np.array_equal(lettering.write_line("a", 8), lettering.write_line("b", 8))


def test_what_is_not_a_video_is_refused_by_name(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"this is not a video" * 100)
    with pytest.raises(UserError, match=r"broken\.mp4"):
        footage.probe(broken)
    with pytest.raises(UserError, match=r"broken\.mp4"):
        list(footage.decode(broken))
    with pytest.raises(UserError, match=r"absent\.mp4"):
        footage.probe(tmp_path / "absent.mp4")
    with pytest.raises(UserError, match=r"clip\.avi.*\.mp4"):
        video.write_video(tmp_path / "clip.avi", CLIP, 8.0)


def test_a_full_disk_leaves_no_half_video(tmp_path, monkeypatch):
    from etils import epath

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        video.write_video(tmp_path / "clip.mp4", CLIP, 8.0)
    assert not list(tmp_path.iterdir())
