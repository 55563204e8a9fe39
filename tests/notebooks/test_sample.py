"""sample.ipynb, on the ensemble that ships with the package, with few steps."""

import base64
import io
import json
import re
import zipfile

import av
import pytest

from paris_jax import Ensemble
from paris_jax.config.sampling import SamplingParams

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def executed(execute):
    return execute("sample", STEPS=4)


def frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_every_cell_runs_without_error_or_warning(executed):
    executed.check_no_errors_or_warnings()


def test_the_runtime_is_named(executed):
    table = executed.outputs("text/html")[0][0]
    assert "CPU runtime" in table and "of memory" in table and "slow here" in table


def test_videos_are_shown_and_play(executed):
    videos = [re.findall(r"data:video/mp4;base64,([^\"]+)", "".join(texts)) for texts in executed.outputs("text/html")]
    # Four prompts; the grid; top 1, top 2 and full; three experts alone; the schedule; a picture and its video.
    assert [len(found) for found in videos if found] == [4, 1, 12, 12, 4, 2]
    for found in filter(None, videos):
        for data in found[:2]:
            assert frames(base64.b64decode(data)) >= 4


def test_contact_sheet_routing_and_disagreement_are_shown_once_each(executed):
    assert [len(images) for images in executed.outputs("image/png")] == [1, 1, 1]


def test_the_download_holds_videos_and_settings_that_draw_them_again(executed):
    with zipfile.ZipFile(executed.folder / "samples" / "samples.zip") as archive:
        assert sorted(archive.namelist()) == ["contact_sheet.png", "samples.gif", "samples.mp4", "settings.json"]
        made = json.loads(archive.read("settings.json"))
        shown = archive.read("contact_sheet.png")
    again = Ensemble.load(made["ensemble"]).sample(made["prompts"], SamplingParams(**made["params"]))
    again.save(executed.folder / "again.png")
    with av.open(io.BytesIO(shown)) as first, av.open(str(executed.folder / "again.png")) as second:
        pictures = [next(c.decode(video=0)).to_ndarray(format="rgb24").astype(int) for c in (first, second)]
    assert abs(pictures[0] - pictures[1]).max() <= 2
