"""Attribute accuracy: attributes that the classifier predicts for a video against those of its prompt."""

from collections.abc import Mapping, Sequence

import numpy as np

from paris_jax.evaluation.estimates import Estimate, proportion

ALL = "all"  # every attribute of the clip at once


def hits(asked: Sequence[Mapping[str, str]], read: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
    """Compares attribute by attribute.

    Args:
      asked, read: N dicts from attribute to value: of the prompts, all with the same attributes, and predicted.
    Returns:
      for each attribute, and for `ALL`, whether the predicted value is the prompt's, (N,) bool.
    """
    if len(asked) != len(read) or not asked:
        raise ValueError(f"{len(asked)} clips asked for and {len(read)} read: must be as many, and at least one")
    right = {name: np.array([a[name] == r[name] for a, r in zip(asked, read, strict=True)]) for name in asked[0]}
    right[ALL] = np.all(list(right.values()), axis=0)
    return right


def accuracy(right: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Fraction of correct clips, by attribute and for `ALL`, with standard error; `right` from `hits`."""
    return {name: proportion(values) for name, values in right.items()}
