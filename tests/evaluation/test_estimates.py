"""Standard errors mean what they say, and a winner needs an interval without zero."""

import numpy as np
import pytest

from paris_jax.evaluation import estimates, results


def test_mean_and_paired_difference():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.5, 1.5, 2.5, 3.5])
    made = estimates.mean(x)
    assert made == {"value": 2.5, "stderr": pytest.approx(np.sqrt(5 / 3) / 2), "n": 4}
    # A constant gap is certain, however much the clips differ.
    assert estimates.difference(x, y) == {"value": 0.5, "stderr": 0.0, "n": 4}


def test_paired_values_must_match():
    with pytest.raises(ValueError, match="must be equal"):
        estimates.difference(np.ones(3), np.ones(4))


def test_all_right_is_not_certain():
    made = estimates.proportion(np.ones(20, bool))
    assert made["value"] == 1.0
    assert made["stderr"] > 0.03


@pytest.mark.parametrize(
    ("value", "stderr", "better", "expected"),
    [
        (-1.0, 0.2, "lower", "first"),
        (1.0, 0.2, "lower", "second"),
        (1.0, 0.2, "higher", "first"),
        (0.3, 0.2, "higher", "none"),
        (0.0, 0.0, "lower", "none"),
    ],
)
def test_winner_by_95_percent_interval(value, stderr, better, expected):
    assert estimates.winner({"value": value, "stderr": stderr, "n": 50}, better) == expected


def comparison(label: str, value: float, better="lower") -> dict:
    zero = estimates.Estimate(value=0.0, stderr=0.1, n=10)
    return results.compare(
        label, label, better, {"ensemble": zero, "monolith": zero}, estimates.Estimate(value=value, stderr=0.1, n=10)
    )


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((0.0, 0.1), "No clear winner: ensemble and monolith are within error on all 2 scores."),
        ((-1.0, -1.0), "The ensemble wins on every score: one and two."),
        ((1.0, 1.0), "The monolith wins on every score: one and two."),
        ((-1.0, 1.0), "The ensemble wins on one, the monolith on two."),
        ((1.0, 0.0), "The monolith wins on one; no clear winner on two."),
    ],
)
def test_the_headline_names_the_winner(values, said):
    assert results.headline([comparison(n, v) for n, v in zip(("One", "Two"), values, strict=True)]) == said


def test_headline_leaves_out_scores_without_a_direction():
    assert "motion" not in results.headline([comparison("Loss", -1), comparison("Motion", -1, better=None)])


@pytest.mark.parametrize(
    ("value", "stderr", "unit", "text"),
    [
        (0.61234, 0.0041, "", "0.6123 ± 0.0041"),
        (3.1, 0.22, "", "3.10 ± 0.22"),
        (123.4, 12.0, "", "123 ± 12"),
        (0.719, 0.046, "share", "71.9 ± 4.6 %"),
        (-0.5, 0.1, "", "−0.50 ± 0.10"),
    ],
)
def test_numbers_show_the_digits_their_error_supports(value, stderr, unit, text):
    assert results.format_estimate({"value": value, "stderr": stderr, "n": 9}, unit) == text
