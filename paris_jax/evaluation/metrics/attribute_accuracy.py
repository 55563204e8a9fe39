"""Agreement with the prompt: what the shapes judge reads back from a video against what the prompt asked for."""

from collections.abc import Mapping, Sequence

import numpy as np

from paris_jax.evaluation.estimates import Estimate, proportion

ALL = "all"  # every attribute of the clip at once


def hits(asked: Sequence[Mapping[str, str]], read: Sequence[Mapping[str, str]]) -> dict[str, np.ndarray]:
    """Compares attribute by attribute.

    Args:
      asked, read: N dicts from attribute to value; all of `asked` name the same attributes, and `read` names these too.
    Returns:
      for each attribute, and for `ALL`, whether the value read is the one asked for, (N,) bool.
    """
    if len(asked) != len(read) or not asked:
        raise ValueError(f"{len(asked)} clips asked for and {len(read)} read: must be as many, and at least one")
    right = {name: np.array([a[name] == r[name] for a, r in zip(asked, read, strict=True)]) for name in asked[0]}
    right[ALL] = np.all(list(right.values()), axis=0)
    return right


def accuracy(right: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
    """Share of clips that are right, by attribute and for `ALL`, with standard error; `right` as made by `hits`."""
    return {name: proportion(values) for name, values in right.items()}
