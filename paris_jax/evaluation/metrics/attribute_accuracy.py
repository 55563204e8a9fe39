"""Attribute accuracy: compares the attributes that the classifier predicts for a video to those of its prompt."""

from collections.abc import Mapping, Sequence

import numpy as np

from paris_jax.evaluation.estimates import Estimate, proportion

ALL = "all"  # every attribute of the clip at once


def hits(expected: Sequence[Mapping[str, str]], predicted: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
    """Compares predicted attributes to those of the prompts.

    Args:
      expected: N dicts from attribute to value, of the prompts; all with the same attributes.
      predicted: N dicts from attribute to value, of the videos.

    Returns:
      For each attribute, and for `ALL`, whether the predicted value is the prompt's, (N,) bool.

    Raises:
      ValueError: the numbers of dicts differ, or there is none.
    """
    if len(expected) != len(predicted) or not expected:
        raise ValueError(
            f"{len(expected)} expected and {len(predicted)} predicted clips: the numbers must be equal and at least 1"
        )
    pairs = list(zip(expected, predicted, strict=True))
    correct = {name: np.array([e[name] == p[name] for e, p in pairs]) for name in expected[0]}
    correct[ALL] = np.all(list(correct.values()), axis=0)
    return correct


def accuracy(correct: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Fraction of correct clips, by attribute and for `ALL`, with standard error; `correct` is the result of `hits`."""
    return {name: proportion(values) for name, values in correct.items()}
