"""Files of sweeps: products, linked values, and refusals of what is no point."""

import pytest

from paris_jax.config.overrides import axis, fixed, load, product, to_text, zipped
from paris_jax.errors import UserError


def test_products_links_and_fixed_values():
    width = zipped(axis("network.hidden", [32, 48]), axis("network.heads", [2, 3]))
    points = product(axis("training.steps", [5, 6]), width, fixed(training__seed=7))
    assert points == [
        {"training.steps": 5, "network.hidden": 32, "network.heads": 2, "training.seed": 7},
        {"training.steps": 5, "network.hidden": 48, "network.heads": 3, "training.seed": 7},
        {"training.steps": 6, "network.hidden": 32, "network.heads": 2, "training.seed": 7},
        {"training.steps": 6, "network.hidden": 48, "network.heads": 3, "training.seed": 7},
    ]
    assert [to_text(value) for value in (True, (8, 4), 1e-3, "muon")] == ["true", "8,4", "0.001", "muon"]


def test_both_forms_of_a_file_give_the_same_points(tmp_path):
    loop = tmp_path / "loop.py"
    loop.write_text(
        "def sweep(add):\n    for k in (2, 4):\n        add({'clustering.num_clusters': k}, training__seed=k)\n"
    )
    listed = tmp_path / "listed.py"
    listed.write_text(
        "from paris_jax.config.overrides import axis, zipped\n"
        "POINTS = zipped(axis('clustering.num_clusters', [2, 4]), axis('training.seed', [2, 4]))\n"
    )
    assert load(str(loop)) == load(str(listed)) != []


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("POINTS = []", "has no point"),
        ("points = []", "defines neither sweep(add) nor POINTS"),
        ("POINTS = [{'training.steps': 5}, {'training.steps': '5'}]", "the point training.steps=5 is there twice"),
        ("POINTS = [('training.steps', 5)]", "must map config fields to values"),
        ("POINTS = [{'steps': 5}]", "must map config fields to values"),
        ("def sweep(add): add(training__steps=1 / 0)", "fails with ZeroDivisionError: division by zero; mend the file"),
        ("def sweep(add): add({'a.b': 1}, a__b=2)", "a.b is set by two axes"),
        (
            "from paris_jax.config.overrides import *\nPOINTS = zipped(axis('a.b', [1]), axis('a.c', [1, 2]))",
            "zipped axes have 1, 2 values",
        ),
    ],
)
def test_refusals_are_one_sentence(tmp_path, text, sentence):
    file = tmp_path / "points.py"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load(str(file))
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file of a sweep"):
        load(str(tmp_path / "none.py"))
