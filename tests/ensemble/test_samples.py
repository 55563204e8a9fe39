"""Samples save and show themselves: files that play, pages that carry their videos, and true bars."""

import base64
import re

import av
import numpy as np
import pytest

from paris_jax.ensemble.samples import Samples, compare
from paris_jax.errors import UserError

PROMPTS = ["a small red circle", 'a "large" <blue> square & co', "a digit"]


def make(prompts=PROMPTS, frames=5, height=10, width=14, steps=4, experts=3, clusters=None):
    rng = np.random.default_rng(0)
    # Flat colours, so that what lossy files give back can be compared.
    colours = rng.uniform(-1, 1, (len(prompts), frames, 1, 1, 3))
    videos = np.broadcast_to(colours, (len(prompts), frames, height, width, 3)).astype(np.float32)
    routing = rng.dirichlet(np.ones(experts), (steps, len(prompts))).astype(np.float32)
    return Samples(videos, list(prompts), 8.0, routing, clusters or list(range(experts)))


def frames_of(file):
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_samples_have_a_representation_of_one_line():
    assert repr(make()) == "Samples(3 videos of 5 frames, 10 x 14, at 8 frames a second)"
    assert repr(compare({"top 1": make(), "full": make()})).startswith("Comparison of top 1, full: Samples(3 videos")


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
@pytest.mark.parametrize("count, height, width", [(1, 10, 14), (3, 10, 14), (1, 7, 9)])
def test_saved_videos_play_with_all_their_frames(tmp_path, ending, count, height, width):
    samples = make(PROMPTS[:count], height=height, width=width)
    path = samples.save(tmp_path / "new" / f"out.{ending}")
    frames = frames_of(str(path))
    assert len(frames) == 5
    assert frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0
    assert min(frames.shape[1:3]) >= 160
    # The first sample stands at the top left, in its colours.
    np.testing.assert_allclose(frames[:, 8, 8], samples.pixels()[0, :, 0, 0], atol=12)
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(8.0, rel=0.05)


def test_a_contact_sheet_shows_every_sample(tmp_path):
    one = frames_of(str(make(PROMPTS[:1]).save(tmp_path / "one.png")))[0]
    three = frames_of(str(make().save(tmp_path / "three.png")))[0]
    assert three.shape == (3 * one.shape[0], one.shape[1], 3)


def test_an_unknown_ending_is_refused_before_writing(tmp_path):
    with pytest.raises(UserError, match=r"'\.avi'; allowed are \.mp4, \.gif, \.webm, \.png"):
        make().save(tmp_path / "new" / "out.avi")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (2, 1, 2), (3, 2, 2), (5, 2, 3)])
def test_the_grid_holds_every_video_in_reading_order(count, rows, columns):
    samples = make([f"prompt {i}" for i in range(count)])
    grid = samples.grid()
    assert grid.shape == (5, rows * 10, columns * 14, 3)
    for i, video in enumerate(samples.pixels()):
        row, column = divmod(i, columns)
        np.testing.assert_array_equal(grid[:, row * 10 : row * 10 + 10, column * 14 : column * 14 + 14], video)
    assert not grid[:, (rows - 1) * 10 :, (count - (rows - 1) * columns) * 14 :].any()


def test_bars_are_as_long_as_the_share_they_name():
    samples = make(experts=4, clusters=[0, 2, 3, 11])
    lines = samples.bars(width=50).splitlines()
    assert [line.split()[1] for line in lines] == ["0", "2", "3", "11"]
    for line, share in zip(lines, samples.usage(), strict=True):
        assert line.count("█") == round(share * 50)
        assert line.endswith(f"{share:.1%}")
    assert len({len(line) for line in lines}) == 1
    assert samples.usage().sum() == pytest.approx(1, abs=1e-5)


def test_a_notebook_gets_videos_that_play_without_any_file(tmp_path):
    samples = make()
    page = samples._repr_html_()
    videos = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert len(videos) == len(samples)
    for number, data in enumerate(videos):
        file = tmp_path / f"{number}.mp4"
        file.write_bytes(base64.b64decode(data, validate=True))
        assert len(frames_of(str(file))) == 5
    assert page.count(" autoplay loop muted playsinline ") == 3
    assert "a &quot;large&quot; &lt;blue&gt; square &amp; co" in page
    assert "<blue>" not in page


def test_a_comparison_has_a_row_a_prompt_and_a_column_a_way():
    page = compare({"top 1": make(), "<full>": make()})._repr_html_()
    assert page.count("<tr>") == 1 + 3
    assert page.count("<video") == 6
    assert "&lt;full&gt;" in page and "<blue>" not in page
    with pytest.raises(UserError, match="different prompts"):
        compare({"a": make(), "b": make(PROMPTS[:2])})
    with pytest.raises(UserError, match="nothing to compare"):
        compare({})


@pytest.mark.parametrize("count, steps", [(1, 1), (3, 4), (6, 3), (20, 2)])
def test_the_plot_of_routing_fills_every_panel_and_leaves_no_figure_open(count, steps):
    plt = pytest.importorskip("matplotlib.pyplot")
    samples = make([f"prompt {i}" for i in range(count)], steps=steps)
    figure = samples.plot_routing()
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert len(panels) == min(count, 12)
    assert [axis.get_title() for axis in panels] == samples.prompts[:12]
    assert all(axis.get_xlim() == (0, steps) and len(axis.collections) == 3 for axis in panels)
    # The boundary above the lowest band is the first expert's weight.
    edge = panels[0].collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(edge[:, 1].max(), samples.routing[:, 0, 0].max(), rtol=1e-5)
    assert not plt.get_fignums()
