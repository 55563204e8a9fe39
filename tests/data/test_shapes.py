"""The embedded data set: reproducible, sayable, visible."""

import itertools
import operator
from pathlib import Path

import numpy as np
import pytest

from paris_jax.data.sources import shapes
from paris_jax.data.sources.shapes import ATTRIBUTES, ShapesSource

SOURCE = ShapesSource(seed=3, num_clips=500, frames=8, height=20, width=20, fps=8.0)


def every_combination():
    for world, spec in shapes.SPECS.items():
        choices = (spec.objects, shapes.COLOURS, shapes.SIZES, spec.directions, shapes.SPEEDS, spec.grounds)
        for values in itertools.product(*choices):
            yield dict(zip(ATTRIBUTES, (world, *values), strict=True))


def track(video: np.ndarray) -> np.ndarray:
    """Centre of what differs most from the ground, (T, 2) as (row, column)."""
    ground = np.median(video.reshape(-1, 3).astype(float), axis=0)
    weight = np.linalg.norm(video - ground, axis=-1)
    weight = np.where(weight > 0.5 * weight.max(), weight, 0)
    grid = np.stack(np.meshgrid(*map(np.arange, video.shape[1:3]), indexing="ij"), -1)
    return np.einsum("thw,hwc->tc", weight, grid) / weight.sum((1, 2))[:, None]


def test_a_clip_depends_on_seed_and_number_alone(elsewhere):
    longer = ShapesSource(3, 100_000, 8, 20, 20, 8.0)
    for index in (17, 3, 499):
        clip = SOURCE[index]
        for other in (elsewhere(operator.getitem, SOURCE, index), longer[index]):
            np.testing.assert_array_equal(clip.video, other.video)
            assert (clip.id, clip.caption, clip.attributes) == (other.id, other.caption, other.attributes)
    other_seed = ShapesSource(4, 500, 8, 20, 20, 8.0)
    assert sum(SOURCE[i].caption == other_seed[i].caption for i in range(100)) < 10


def test_the_stream_is_the_one_that_results_were_measured_on():
    clip = ShapesSource(0, 10, 8, 20, 20, 8.0)[0]
    assert clip.id == "shapes-000000"
    assert clip.caption == "a small red striped ball bouncing up and down fast on a stony ground"
    assert (clip.video.shape, clip.video.dtype, clip.fps) == ((8, 20, 20, 3), np.uint8, 8.0)


def test_a_number_outside_the_source_is_an_index_error():
    with pytest.raises(IndexError):
        SOURCE[500]
    assert len(list(ShapesSource(0, 3, 8, 20, 20, 8.0))) == 3


def test_every_caption_reads_back_into_its_attributes():
    combinations = list(every_combination())
    captions = {shapes.caption(attributes) for attributes in combinations}
    assert len(captions) == len(combinations)
    for attributes in combinations:
        assert shapes.parse(shapes.caption(attributes)) == attributes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog on a beach",
        "a small red circle moving left slowly",
        "a small red circle circling clockwise fast on a white ground",  # another world's motion
        "a small red circle moving left slowly on a black ground",  # another world's ground
        "a small pink circle moving left slowly on a white ground",
    ],
)
def test_text_outside_the_grammar_is_not_read(text):
    assert shapes.parse(text) is None


def test_clips_keep_to_the_listed_attributes_and_show_every_value():
    seen = {key: set() for key in ATTRIBUTES}
    for index in range(500):
        attributes = SOURCE[index].attributes
        assert list(attributes) == list(ATTRIBUTES)
        for key, value in attributes.items():
            seen[key].add(value)
    assert seen == {key: set(values) for key, values in ATTRIBUTES.items()}


def test_the_sprite_stays_in_the_picture():
    for attributes in list(every_combination())[::7]:
        for side in (20, 32):
            spec, radius = shapes.SPECS[attributes["world"]], 0
            radius = spec.radius[attributes["size"]] * side
            for chance in (0.0, 0.37, 0.999):
                path = shapes._path(attributes, spec, np.full(5, chance), 8, (side, side), radius)
                assert (path >= radius - 1e-4).all()
                assert (path <= side - radius + 1e-4).all()


def test_things_move_as_the_caption_says():
    base = {"colour": "red", "size": "small", "ground": "white", "object": "circle", "world": "flat"}
    for direction, (down, right) in shapes.STEPS.items():
        moved = {}
        for speed in shapes.SPEEDS:
            video = shapes.render(base | {"direction": direction, "speed": speed}, 5, 8, 20, 20)
            start, *_, end = track(video)
            moved[speed] = (end - start) @ (down, right)
            assert np.linalg.norm((end - start) - moved[speed] * np.asarray((down, right))) < 0.6
        assert moved["slow"] > 1.5
        assert moved["fast"] > 2 * moved["slow"]


def test_a_single_frame_shows_a_random_moment():
    attributes = {"world": "flat", "object": "square", "colour": "blue", "size": "small", "direction": "right"}
    attributes |= {"speed": "fast", "ground": "white"}

    def column(seed, frames):  # of the sprite's centre, from 0 to 1, by its redness missing
        image = shapes.render(attributes, seed, frames, 40, 40)[0, ..., 0] < 150
        return image.any(0).nonzero()[0].mean() / 40

    moved = [column(seed, 1) - column(seed, 8) for seed in range(60)]
    assert min(moved) >= 0 and max(moved) > 0.35  # of a path of 0.42
    assert 0.15 < np.mean(moved) < 0.27


def test_circling_turns_the_way_the_caption_says():
    for direction, sign in (("clockwise", 1), ("counterclockwise", -1)):
        attributes = {"world": "textured", "object": "ringed disc", "colour": "red", "size": "small"}
        attributes |= {"direction": direction, "speed": "fast", "ground": "stony"}
        path = shapes._path(attributes, shapes.SPECS["textured"], np.full(5, 0.3), 9, (20, 20), 3.3)
        step = np.diff(path, axis=0)
        turn = step[:-1, 1] * step[1:, 0] - step[:-1, 0] * step[1:, 1]  # rows grow downwards
        assert (np.sign(turn) == sign).all()


def test_large_things_are_clearly_larger_and_colours_clearly_different():
    for world, spec in shapes.SPECS.items():
        for thing in spec.objects:
            look = {"world": world, "object": thing, "colour": "red", "direction": spec.directions[0]}
            look |= {"speed": "slow", "ground": spec.grounds[0]}
            area = {}
            for size in shapes.SIZES:
                video = shapes.render(look | {"size": size}, 2, 8, 20, 20).astype(int)
                area[size] = (video[..., 0] - video[..., 1] > 120).mean()
            assert area["large"] > 1.8 * area["small"] > 0, thing
    colours = np.asarray(list(shapes.COLOURS.values()))
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert distances[~np.eye(len(colours), dtype=bool)].min() > 90


def test_sizes_and_lengths_are_free():
    attributes = SOURCE[0].attributes
    assert shapes.render(attributes, 0, 1, 20, 24).shape == (1, 20, 24, 3)
    assert shapes.render(attributes, 0, 16, 48, 32).shape == (16, 48, 32, 3)


def test_the_handwriting_is_small_and_holds_every_digit():
    path = Path(shapes.__file__).with_name("digits.npy")
    assert path.stat().st_size < 120_000
    assert [len(images) > 150 for images in shapes._digits()] == [True] * 10
