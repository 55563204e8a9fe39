"""The optimizers do what their names say, on the parameters they are for."""

import dataclasses

import jax
import numpy as np
import pytest

from paris_jax.config.training import TrainingSettings
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.training.optimizer import learning_rate
from paris_jax.training.optimizer import optimizer as optimizer_

NETWORK = DiTConfig(
    channels=4, text_width=8, pooled_width=8, hidden=32, heads=2, double_blocks=1, single_blocks=2, rope_axes=(4, 6, 6)
)
SETTINGS = TrainingSettings(learning_rate=0.01, warmup_steps=0, lr_schedule="constant", max_grad_norm=1e9, eps=1e-12)


@pytest.fixture(scope="module")
def params():
    return functional.init(NETWORK, jax.random.key(0))


def first_update(params, size=1.0, **settings):
    """What the first step changes, by name, when every gradient is drawn from a normal law of this spread."""
    transform = optimizer_(dataclasses.replace(SETTINGS, **settings), steps=10)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [size * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    grads = jax.tree.unflatten(structure, drawn)
    updates, _ = jax.jit(lambda g, p: transform.update(g, transform.init(p), p))(grads, params)
    return functional.to_names(updates), functional.to_names(grads)


def turned_by_muon(name):
    return "_blocks" in name and name.endswith("kernel") and "modulation" not in name


def test_muon_orthogonalises_each_layers_matrices(params):
    updates, grads = first_update(params, optimizer="muon")
    names = [name for name in updates if turned_by_muon(name)]
    assert sorted(names) == sorted(
        [f"double_blocks.{s}.{part}.kernel" for s in ("video", "text") for part in ("qkv", "out", "mlp_in", "mlp_out")]
        + ["single_blocks.qkv_mlp.kernel", "single_blocks.out.kernel"]
    )
    for name in names:
        for update, grad in zip(np.asarray(updates[name]), np.asarray(grads[name]), strict=True):
            size = 0.01 * 0.2 * np.sqrt(max(update.shape))
            stretched = np.linalg.svd(-update / size, compute_uv=False)
            assert stretched.min() > 0.6 and stretched.max() < 1.3  # five Newton-Schulz steps come this near to one
            left, _, right = np.linalg.svd(grad, full_matrices=False)
            cosine = np.sum(-update * (left @ right)) / np.linalg.norm(update) / np.sqrt(len(stretched))
            assert cosine > 0.97


def test_muon_leaves_the_rest_to_adamw_with_nesterov_momentum(params):
    updates, grads = first_update(params, optimizer="muon")
    size = 0.01 * (1 + SETTINGS.b1 / (1 + SETTINGS.b1))  # Dozat 2016, at its first step
    for name in updates:
        if not turned_by_muon(name):
            np.testing.assert_allclose(updates[name], -size * np.sign(grads[name]), rtol=1e-3, err_msg=name)


def test_adamws_first_step_is_the_sign_of_the_gradient(params):
    updates, grads = first_update(params, optimizer="adamw")
    for name in updates:
        np.testing.assert_allclose(updates[name], -0.01 * np.sign(grads[name]), rtol=1e-3, err_msg=name)


def test_adafactor_keeps_means_of_rows_and_columns_and_steps_relative_to_the_parameter(params):
    wide = functional.init(dataclasses.replace(NETWORK, hidden=128, heads=8), jax.random.key(0))
    kept = optimizer_(dataclasses.replace(SETTINGS, optimizer="adafactor"), 10).init(wide)
    adam = optimizer_(SETTINGS, 10).init(wide)
    assert sum(x.size for x in jax.tree.leaves(kept)) < 0.2 * sum(x.size for x in jax.tree.leaves(adam))
    updates, grads = first_update(params, optimizer="adafactor")
    for name, before in functional.to_names(params).items():
        size = 0.01 * max(float(np.sqrt(np.mean(np.square(before)))), 1e-3)
        np.testing.assert_allclose(updates[name], -size * np.sign(grads[name]), rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_weight_decay_shrinks_matrices_only(params, optimizer):
    updates, _ = first_update(params, size=0.0, optimizer=optimizer, weight_decay=0.1)
    for name, before in functional.to_names(params).items():
        expected = -0.01 * 0.1 * before if name.endswith("kernel") else 0 * before
        np.testing.assert_allclose(updates[name], expected, rtol=1e-5, atol=1e-12, err_msg=name)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", {5: 0.5, 10: 1.0, 60: 1.0, 110: 1.0}),
        ("cosine", {5: 0.5, 10: 1.0, 60: 0.5, 110: 0.0}),
        ("wsd", {5: 0.5, 10: 1.0, 60: 1.0, 88: 1.0, 99: 0.5, 110: 0.0}),
    ],
)
def test_the_learning_rate_warms_up_and_decays(decay, expected):
    schedule = learning_rate(
        TrainingSettings(learning_rate=1.0, warmup_steps=10, lr_schedule=decay, lr_decay_fraction=0.2), 110
    )
    assert {n: float(schedule(n)) for n in expected} == pytest.approx(expected, abs=1e-6)


def test_a_decay_longer_than_the_remaining_steps_begins_after_warm_up():
    schedule = learning_rate(
        TrainingSettings(learning_rate=1.0, warmup_steps=50, lr_schedule="wsd", lr_decay_fraction=1.0), 100
    )
    assert [float(schedule(n)) for n in (50, 75, 100)] == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)
