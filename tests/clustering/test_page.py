"""The page of a partition is one file that a browser opens: sheets play, captions stay text, nothing is fetched."""

import re

import numpy as np
import pytest

from paris_jax.clustering import page, sheets
from paris_jax.clustering.page import Dropped
from paris_jax.clustering.sheets import Map, Shown
from tests.clustering.test_build import experiment, prepared
from tests.evaluation.browser import browse, needs_browser, run_scripts
from tests.evaluation.test_report import OVERPRINTED, Tags

HOSTILE = (
    '<script>document.documentElement.dataset.hacked = 1</script><img src=x onerror="alert(1)">"\'&\u2028\u202eabc'
)


def described(clusters: int = 3) -> dict:
    rows = [
        {
            "cluster": k, "clips": 1000 * (k + 1), "validation": 3, "test": 7, "share": (k + 1) / 6, "margin": 0.4,
            "distance": 2.0, "examples": [HOSTILE], "words": [{"word": HOSTILE, "share": 0.5, "others": 0.1}],
            "attributes": {HOSTILE: {f"{HOSTILE} {n}": 10 for n in range(12)}},
        }
        for k in range(clusters)
    ]  # fmt: skip
    return {
        "clips": 6000, "validation": 9, "test": 21, "explained": 0.5, "margin": 0.4, "balance": [0.5, 1.5],
        "centroid_distances": (4 - 4 * np.eye(clusters)).tolist(), "purity": {HOSTILE: 0.9}, "clusters": rows,
    }  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    rng = np.random.default_rng(0)
    shapes = (4, 10, 12, 3), (5, 10, 18, 3)
    videos = [[rng.integers(0, 255, shape, np.uint8) for _ in range(7)] for shape in shapes]
    shown = [[Shown(i, HOSTILE, v, 1.0, rng.normal(size=2)) for i, v in enumerate(some)] for some in videos] + [[]]
    projection = Map(np.eye(2), rng.normal(size=(200, 2)), rng.integers(0, 3, 200), 0.7)
    dropped = [Dropped(f"{HOSTILE} {n}.mp4", "decode", HOSTILE, HOSTILE) for n in range(60)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page.render(HOSTILE, described(), shown, projection, dropped, 8.0))
    return path


def test_every_tag_is_closed_and_no_text_of_strangers_became_one(written):
    tags = [tag for tag, _ in Tags(written.read_text()).seen]
    assert tags.count("script") == 1 and tags.count("video") == 2 and tags.count("img") == 0
    assert "onerror=" not in re.sub(r"&quot;|&lt;[^<]*", "", written.read_text())


@needs_browser
def test_the_page_plays_every_sheet_and_shows_captions_as_text_offline(written):
    visit = browse(written, until="html[data-playing='2']")
    assert visit.data == {"videos": "2 of 2", "settled": "true", "playing": "2"}
    assert visit.logged == [] and visit.asked == []
    captions, thumbnails = run_scripts(
        written, 1280, 800,
        "() => [...document.querySelectorAll('ol.captions li')].map((e) => e.textContent)",
        "() => [...document.querySelectorAll('svg image')].map((e) => e.getBBox().width > 0)",
    )  # fmt: skip
    assert captions == [HOSTILE] * 14
    assert thumbnails == [True] * 2 * page.THUMBNAILS


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_no_text_overlaps_and_the_page_fits_the_screen(written, width):
    over, wide = run_scripts(written, width, 800, OVERPRINTED, "() => document.documentElement.scrollWidth")
    assert over == []
    assert wide <= width


@needs_browser
def test_cluster_writes_the_page_of_its_clips(tmp_path):
    from paris_jax.clustering.build import cluster

    run = prepared(tmp_path, experiment())
    cluster(experiment(), run)
    visit = browse(run.partition / "report.html", until="html[data-playing='3']")
    assert visit.data["playing"] == "3" and visit.logged == []
    text = (run.partition / "report.html").read_text()
    assert "the flat world" in text and "Every clip and file of the source was used" in text


def test_a_sheet_tiles_clips_of_other_sizes():
    shown = [Shown(i, "", np.full((t, h, w, 3), 200, np.uint8), 0.0, np.zeros(2))
             for i, (t, h, w) in enumerate([(2, 8, 8), (4, 6, 16), (1, 16, 4), (3, 8, 8), (4, 8, 8)])]  # fmt: skip
    sheet = sheets.contact_sheet(shown)
    assert sheet.shape == (4, 192, 320, 3)  # two rows of four, four times as large, then to multiples of 64
    assert all((frame == 200).sum() == 16 * 3 * (64 + 96 + 64 + 64 + 64) for frame in sheet)


def test_the_map_has_the_same_sign_for_the_same_clips_and_keeps_distances(tmp_path):
    from paris_jax.clustering.clips import Clips
    from paris_jax.clustering.clusters import Method, fit

    rng = np.random.default_rng(0)
    features = np.zeros((300, 5), np.float32)
    features[:, :2] = rng.normal(size=(300, 2)) * [5, 1]
    ids = [f"c{i}" for i in range(300)]
    partition, labels = fit(ids, features, Method(2))
    clips = Clips(None, np.arange(300), np.zeros((300, 2), np.uint64), np.zeros(300, np.uint8), features)
    made = sheets.make_map(partition, clips, labels)
    rows = partition.standardise(features)
    gaps = [np.linalg.norm(x[:50, None] - x[None, :50], axis=-1) for x in (made.positions, rows)]
    np.testing.assert_allclose(*gaps, atol=1e-4)
    assert made.explained == pytest.approx(1.0)
