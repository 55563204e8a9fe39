"""Attribute accuracy counts attributes that are read as asked; the compute identity is exact."""

import numpy as np
import pytest

from paris_jax.evaluation import compute
from paris_jax.evaluation.metrics import attribute_accuracy


def test_counts_each_attribute_and_all_at_once():
    asked = [
        {"colour": "red", "size": "small"},
        {"colour": "red", "size": "large"},
        {"colour": "blue", "size": "large"},
    ]
    read = [{"colour": "red", "size": "small"}, {"colour": "red", "size": "small"}, {"colour": "red", "size": "large"}]
    hits = attribute_accuracy.hits(asked, read)
    np.testing.assert_array_equal(hits["colour"], [True, True, False])
    np.testing.assert_array_equal(hits["size"], [True, False, True])
    np.testing.assert_array_equal(hits["all"], [True, False, False])
    assert attribute_accuracy.accuracy(hits)["all"]["value"] == pytest.approx(1 / 3)
    assert attribute_accuracy.accuracy(hits)["all"]["n"] == 3


def test_unequal_counts_are_refused():
    with pytest.raises(ValueError, match="numbers must be equal"):
        attribute_accuracy.hits([{"colour": "red"}], [])


def job(name: str, steps: int, flops: int = 1001) -> compute.TrainingCost:
    return compute.TrainingCost(name, steps, 32, flops)


def test_identity_holds_to_the_last_operation():
    experts = [job(f"expert {k}", 1000) for k in range(3)]
    made = compute.identity(experts, job("monolith", 3000), job("router", 500, 77))
    assert made["equal"] is True
    assert made["experts_total"] == 3 * 1000 * 32 * 1001 == made["monolith"]["total"]
    assert made["router"]["total"] == 500 * 32 * 77
    terms = " + ".join(["1000 x 32 x 1001"] * 3)
    assert compute.describe(made).endswith(f"{terms} = 9.6096e+07 = 9.6096e+07 = 3000 x 32 x 1001 of the monolith")


def test_one_step_less_is_not_equal():
    experts = [job("expert 0", 1000), job("expert 1", 999)]
    made = compute.identity(experts, job("monolith", 2000), None)
    assert made["equal"] is False
    assert "is not" in compute.describe(made)
    assert made["ratio"] == pytest.approx(1999 / 2000)
