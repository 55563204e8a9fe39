"""Classifier-free guidance (Ho and Salimans 2022)."""

import jax


def classifier_free(conditional: jax.Array, unconditional: jax.Array, scale: float | jax.Array) -> jax.Array:
    """v = v_null + scale (v_text - v_null). Scale 1 is the conditional velocity, 0 the unconditional one.

    It is linear in the pair, so applying it to each expert before the merge, or once after a merge that gives both
    branches the same weights, is the same thing; ours stands inside the merge.
    """
    return unconditional + scale * (conditional - unconditional)
