"""Reading video files: every frame as a player shows it, and every file that cannot be shown with its reason."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.config.experiment import Experiment
from paris_jax.data import records
from paris_jax.data.decoding import footage, hdr
from paris_jax.data.decoding.display import BadVideo, Rules
from paris_jax.data.preparation import prepare
from tests.data.decoding import dirty_videos as dirty

UPRIGHT = np.array([dirty.RED, dirty.GREEN, dirty.BLUE, dirty.WHITE])


def quarters(image: np.ndarray) -> np.ndarray:
    """The colours in the middles of the four quarters, row by row."""
    rows, columns = image.shape[:2]
    return np.array([image[r, c] for r in (rows // 4, 3 * rows // 4) for c in (columns // 4, 3 * columns // 4)], int)


def first(path: Path, **options) -> np.ndarray:
    return next(footage.decode(path, **options)).image


@pytest.mark.parametrize("turn", dirty.TURNS)
def test_display_matrices_are_applied(tmp_path, turn):
    matrix, lay_out = dirty.TURNS[turn]
    dirty.write(tmp_path / "a.mp4", [lay_out(dirty.picture())] * 3, matrix=matrix)
    image = first(tmp_path / "a.mp4")
    assert image.shape == (dirty.ROWS, dirty.COLUMNS, 3)
    np.testing.assert_allclose(quarters(image), UPRIGHT, atol=4)
    assert first(tmp_path / "a.mp4", scale=lambda rows, columns: (int(rows) // 2, int(columns) // 2)).shape == (
        24,
        32,
        3,
    )
    found = footage.probe(tmp_path / "a.mp4")
    assert (found.height, found.width) == (dirty.ROWS, dirty.COLUMNS)


@pytest.mark.parametrize("number", range(1, 9))
def test_photographs_are_turned_as_their_camera_says(tmp_path, number):
    images = pytest.importorskip("PIL.Image")
    names = ("mirrored", "half", "flipped", "transposed", "clockwise", "transversed", "counterclockwise")
    lay_out = [lambda image: image, *(dirty.TURNS[name][1] for name in names)][number - 1]
    for ending in ("jpg", "png", "webp"):
        photograph = images.fromarray(np.ascontiguousarray(lay_out(dirty.picture())))
        exif = photograph.getexif()
        exif[0x112] = number
        photograph.save(tmp_path / f"%d.{ending}", exif=exif, quality=95)
        np.testing.assert_allclose(quarters(footage.read_image(tmp_path / f"%d.{ending}")), UPRIGHT, atol=6)


@pytest.mark.parametrize(("aspect", "shape"), [(Fraction(2), (48, 128)), (Fraction(1, 2), (96, 64))])
def test_pixels_that_are_not_square_are_stretched(tmp_path, aspect, shape):
    dirty.write(tmp_path / "a.mp4", aspect=aspect)
    assert first(tmp_path / "a.mp4").shape[:2] == shape


def test_cropping_of_the_container_is_applied(tmp_path):
    dirty.write(tmp_path / "a.mp4")
    dirty.clean_aperture(tmp_path / "a.mp4", 40, 32)
    image = first(tmp_path / "a.mp4")
    assert image.shape == (40, 32, 3)
    np.testing.assert_allclose(quarters(image), UPRIGHT, atol=4)
    dirty.write(tmp_path / "a.mkv")
    dirty.pixel_crop(tmp_path / "a.mkv", 30, 4, 40, 2)
    image = first(tmp_path / "a.mkv")
    assert image.shape == (14, 22, 3)
    assert np.abs(image.astype(int) - dirty.WHITE).max() < 12  # the bottom right quarter


def test_interlaced_frames_show_one_field(tmp_path):
    options = {"x264-params": "tff=1:interlaced=1", "crf": "1"}
    dirty.write(tmp_path / "a.mp4", [dirty.combed()] * 10, options=options)
    for frame in footage.decode(tmp_path / "a.mp4"):
        assert frame.image.shape == (dirty.ROWS, dirty.COLUMNS, 3)
        assert frame.image.std() < 2 and frame.image.mean() > 220


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "tags"),
    [
        ("odd.mkv", "ffv1", "yuv444p", None),
        ("ten.mkv", "ffv1", "yuv420p10le", None),
        ("full.avi", "mjpeg", "yuvj420p", None),
        ("bt709.mp4", "libx264", "yuv420p", (1, 1, 1)),
        ("bt601.mp4", "libx264", "yuv420p", (6, 6, 6)),
        ("rgb.mkv", "ffv1", "bgr0", None),
    ],
)
def test_colours_survive_every_format(tmp_path, name, codec, pix_fmt, tags):
    size = (49, 65) if name == "odd.mkv" else (48, 64)
    dirty.write(tmp_path / name, [dirty.picture(*size)] * 3, codec, pix_fmt, tags=tags)
    image = first(tmp_path / name)
    assert image.shape == (*size, 3)
    np.testing.assert_allclose(quarters(image), UPRIGHT, atol=4)


def test_gray_video_is_gray(tmp_path):
    dirty.write(tmp_path / "a.mkv", codec="ffv1", pix_fmt="gray")
    image = first(tmp_path / "a.mkv")
    assert image.shape == (48, 64, 3) and (image == image[..., :1]).all() and image.std() > 30


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [("a.mkv", "ffv1", "bgra"), ("a.mov", "qtrle", "argb"), ("a.webm", "libvpx-vp9", "yuva420p"), ("a.png", "", "")],
)
def test_transparency_is_composited_on_the_stated_colour(tmp_path, name, codec, pix_fmt):
    image = np.dstack([dirty.picture(), np.full((48, 64), 255, np.uint8)])
    image[:, 32:, 3] = 0
    if name == "a.png":
        pytest.importorskip("PIL.Image").fromarray(image).save(tmp_path / name)
    else:
        dirty.write(tmp_path / name, [image] * 3, codec, pix_fmt, source_format="rgba", metadata={"alpha_mode": "1"})
    for background in ((0, 0, 0), (200, 0, 200)):
        expected = [dirty.RED, background, dirty.BLUE, background]
        np.testing.assert_allclose(
            quarters(first(tmp_path / name, rules=Rules(background=background))), expected, atol=4
        )


@pytest.mark.parametrize(("transfer", "number"), [("PQ", 16), ("HLG", 18)])
def test_hdr_is_never_taken_for_sdr(tmp_path, transfer, number):
    tags, options = (9, number, 9), {"x265-params": "log-level=none"}
    dirty.write(tmp_path / "a.mp4", [dirty.picture()] * 3, "libx265", "yuv420p10le", tags=tags, options=options)
    with pytest.raises(BadVideo, match=rf"is HDR \({transfer}; data.hdr=tonemap"):
        first(tmp_path / "a.mp4", rules=Rules(hdr="drop"))
    expected = hdr.to_sdr((UPRIGHT[None] * 257).astype(np.uint16), transfer)[0]
    found = quarters(first(tmp_path / "a.mp4", rules=Rules(hdr="tonemap")))
    np.testing.assert_allclose(found, expected, atol=12)
    assert np.abs(found - UPRIGHT).max() > 25


def test_tone_mapping_keeps_white_gray_and_order():
    """Diffuse white (203 cd/m2, PQ 0.58, HLG 0.75) is bright but not clipped; brighter levels stay in order."""
    levels = np.linspace(0, 65535, 200).astype(np.uint16)[:, None, None].repeat(3, -1)
    for transfer, white in (("PQ", 0.5807), ("HLG", 0.75)):
        gray = hdr.to_sdr(levels, transfer)[:, 0].astype(int)
        assert np.ptp(gray, axis=-1).max() <= 2
        assert (np.diff(gray[:, 0]) >= 0).all() and gray[0, 0] == 0 and gray[-1, 0] >= 250
        assert 205 < hdr.to_sdr(np.full((1, 1, 3), white * 65535, np.uint16), transfer).mean() < 245
    np.testing.assert_allclose(hdr.pq(np.array([0.0, 0.5080784, 1.0])), [0, 100, 10000], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(hdr.hlg(np.full((1, 3), 0.75, np.float32)), 203, rtol=0.01)


def test_times_are_those_of_the_display(tmp_path):
    times = [0, 1, 2, 6, 7, 12, 13, 20]
    dirty.write(tmp_path / "variable.mkv", [dirty.picture()] * 8, times=times)
    frames = list(footage.decode(tmp_path / "variable.mkv"))
    np.testing.assert_allclose([frame.seconds for frame in frames], np.array(times) / 10, atol=2e-3)
    for name in ("late.mkv", "late.mp4", "late.ts"):
        dirty.write(tmp_path / name, [dirty.picture()] * 5, times=[50, 51, 52, 53, 54])
        np.testing.assert_allclose([f.seconds for f in footage.decode(tmp_path / name)], np.arange(5) / 10, atol=2e-3)
    # An edit list hides the frames before time 0; Matroska shows them, and starts with them.
    for name, shown in (("negative.mp4", 3), ("negative.mkv", 5)):
        dirty.write(tmp_path / name, [dirty.picture()] * 5, times=[-2, -1, 0, 1, 2])
        seconds = [frame.seconds for frame in footage.decode(tmp_path / name)]
        np.testing.assert_allclose(seconds, np.arange(shown) / 10, atol=2e-3)
        assert len(footage.probe(tmp_path / name).times) == shown


def test_a_folder_of_all_faults_is_prepared_with_the_right_reasons(tmp_path):
    """All survive: what can be used is, each file once, and the rest is listed with its reason."""
    root = tmp_path / "videos"
    root.mkdir()
    expected = dirty.write_all(root)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_symlink())
    rows = [{"file": name, "caption": "a picture"} for name in files if name.lower().endswith(".mp4")]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"source": "folder", "path": str(root), "num_clips": 0, "max_dropped_share": 0.6}
    run = RunFolder(tmp_path / "run")
    prepare(Experiment.from_config({"data": data}), run, decoders=2)
    lost = [json.loads(line) for line in (Path(run.data) / "dropped.jsonl").read_text().split("\n")[:-1]]
    hidden = {"names a file that is not there"}  # rows of files that are not the user's
    assert {line["id"]: line["reason"] for line in lost if line["reason"] not in hidden} == expected
    used = {record.id.rpartition("#")[0] for record in records.read_records(run.data)}
    assert used == {"fine.mp4", "sound.mp4", "cut_off.mp4", *dirty.NAMES}
    found = manifest.read(run.data, DataManifest, verify=True)
    assert found.clips == 2 * (2 + len(dirty.NAMES)) + 2
    assert sum(kind.count for kind in found.dropped) == len(lost)
