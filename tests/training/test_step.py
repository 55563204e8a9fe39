"""What happens to a batch and a gradient on the way through a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paris_jax.artifacts.run_folder import Role
from paris_jax.config.training import MaskSettings, TrainingSettings
from paris_jax.encoders.codecs import LatentScale
from paris_jax.models import flops
from paris_jax.training import optimizer as optimizers
from paris_jax.training import state as states
from paris_jax.training.job import compute_dtype, make_job, read_cluster
from paris_jax.training.losses import TimestepSampler, drop_text, expert_losses
from paris_jax.training.step import ShardedStep, StepInputs, make_step, microbatches
from tests.training import test_optimizers

COUNT = 4000
NETWORK = dataclasses.replace(test_optimizers.NETWORK, double_blocks=0)  # one kind of block compiles faster


def test_tokens_and_pooled_text_are_dropped_independently_at_their_own_rates():
    batch = {
        "tokens": jnp.ones((COUNT, 3, 2)),
        "length": jnp.full(COUNT, 3, jnp.int32),
        "pooled": jnp.ones((COUNT, 2)),
        "latent": jnp.ones((COUNT, 1)),
    }
    made = drop_text(
        batch, jax.random.split(jax.random.key(0), COUNT), TrainingSettings(drop_tokens=0.4, drop_pooled=0.2)
    )
    no_tokens, no_pooled = (np.asarray(made[name] == 0).reshape(COUNT, -1) for name in ("tokens", "pooled"))
    for dropped in (no_tokens, no_pooled):
        assert (dropped.all(1) == dropped.any(1)).all()  # all of a sample's text or none
    tokens, pooled = no_tokens.all(1), no_pooled.all(1)
    assert tokens.mean() == pytest.approx(0.4, abs=0.03)
    assert pooled.mean() == pytest.approx(0.2, abs=0.03)
    assert (tokens & pooled).mean() == pytest.approx(0.08, abs=0.02)
    np.testing.assert_array_equal(made["length"], np.where(tokens, 1, 3))
    np.testing.assert_array_equal(made["latent"], batch["latent"])


def test_the_null_embedding_may_be_an_encoded_text():
    batch = {"tokens": jnp.ones((3, 4, 2)), "length": jnp.array([4, 2, 3], jnp.int32), "pooled": jnp.ones((3, 2))}
    null = {"tokens": np.array([[5.0, 6], [7, 8]], np.float16), "pooled": np.array([9.0, 10], np.float16)}
    keys = jax.random.split(jax.random.key(0), 3)
    made = drop_text(batch, keys, TrainingSettings(drop_tokens=1.0, drop_pooled=0.0), null)
    np.testing.assert_array_equal(made["tokens"], [[[5, 6], [7, 8], [0, 0], [0, 0]]] * 3)
    assert made["length"].tolist() == [2, 2, 2] and (made["pooled"] == 1).all()
    made = drop_text(batch, keys, TrainingSettings(drop_tokens=0.0, drop_pooled=1.0), null)
    assert made["pooled"].tolist() == [[9, 10]] * 3 and made["length"].tolist() == [4, 2, 3]


@pytest.fixture
def batch():
    keys = jax.random.split(jax.random.key(3), 3)
    return {
        "latent": jax.random.normal(keys[0], (4, 2, 4, 4, 4)),
        "tokens": jax.random.normal(keys[1], (4, 3, 8)),
        "length": jnp.full(4, 3, jnp.int32),
        "pooled": jax.random.normal(keys[2], (4, 8)),
        "index": jnp.arange(4),
    }


def one_step(batch, network=NETWORK, **settings):
    chosen = TrainingSettings(learning_rate=0.1, warmup_steps=0, lr_schedule="constant", eps=1.0, **settings)
    state = states.create(network, chosen, 10, jax.random.key(0))
    made, values = jax.jit(
        make_step(expert_losses, network, chosen, 10, TimestepSampler("logit_normal", 0.0, 1.0, 1.0), MaskSettings())
    )(state, batch)
    return state, made, values


def test_gradients_are_clipped_by_their_global_norm(batch):
    """With an epsilon far above the gradients, Adam's first step is proportional to them."""
    _, _, free = one_step(batch, max_grad_norm=1e9)
    _, _, clipped = one_step(batch, max_grad_norm=1e-3)
    assert float(free["grad_norm"]) == float(clipped["grad_norm"]) > 1e-3  # as it was before clipping
    assert float(clipped["update_norm"]) == pytest.approx(0.1 * 1e-3, rel=0.01)


@pytest.mark.parametrize("parts", [4, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_batch_in_parts_gives_the_same_update(parts, batch):
    _, whole, values = one_step(batch)
    _, split, same = one_step(batch, grad_accum_steps=parts)
    for name in ("loss", "grad_norm", "bin_sum", "bin_count"):
        np.testing.assert_allclose(same[name], values[name], rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), split.params, whole.params)


def test_parts_of_a_batch_leave_every_sample_on_its_device():
    """Two devices hold samples 0-3 and 4-7; of two parts, each takes two samples of both."""
    parts = microbatches({"index": jnp.arange(8)}, 2)["index"]
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])


def test_updates_and_the_average_follow_their_definitions(batch):
    before, after, values = one_step(batch, ema_decay=0.999)
    change = jax.tree.map(lambda a, b: a - b, after.params, before.params)
    assert float(optax.tree.norm(change)) == pytest.approx(float(values["update_norm"]), rel=1e-4)
    decay = 0.1  # (1 + n) / (10 + n) at the first update
    expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, before.ema, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.ema, expected)


def test_computing_in_bfloat16_keeps_the_state_in_float32(batch):
    _, exact, values = one_step(batch)
    _, half, rounded = one_step(batch, dataclasses.replace(NETWORK, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves((half.params, half.ema))} == {jnp.dtype("float32")}
    assert float(rounded["loss"]) == pytest.approx(float(values["loss"]), rel=0.02)
    assert exact.step == half.step == 1


def test_auto_computes_in_bfloat16_on_accelerators_only():
    assert compute_dtype("auto", "cpu") == "float32"
    assert compute_dtype("bfloat16", "cpu") == "bfloat16"
    assert compute_dtype("auto", "tpu") == compute_dtype("auto", "gpu") == "bfloat16"


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [("6.0", "float32"), ("7.5", "float32"), ("8.0", "bfloat16"), ("9.0", "bfloat16"), ("gfx90a", "bfloat16")],
)
def test_auto_computes_in_float32_on_gpus_without_bfloat16(capability, dtype):
    assert compute_dtype("auto", "gpu", capability) == dtype


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("TPU v5 lite", 197), ("TPU v5p", 459), ("cpu", None)],
)
def test_the_peak_of_a_device_is_found_by_its_kind(kind, teraflops):
    class Device:
        device_kind = kind

    found = flops.chip_of(Device())
    assert (found and found.peak) == (teraflops and teraflops * 1e12)


def test_jobs_that_differ_in_inputs_alone_are_one_program(micro, clustered):
    """So a sweep over learning rates, seeds or data compiles once; another warm-up is another program."""
    data = read_cluster(clustered.cluster(0), micro, clustered)

    def program(scale=None, **changes):
        changed = dataclasses.replace(micro, training=dataclasses.replace(micro.training, **changes))
        job = make_job(changed, clustered, Role("expert", 0), data)
        return ShardedStep(dataclasses.replace(job, scale=scale or job.scale)).lower()

    first = program()
    scale = LatentScale((0.3,), (2.0,))
    for changes in ({"learning_rate": 0.5}, {"seed": 9}, {"log_every_steps": 2}, {"scale": scale}):
        assert program(**changes).as_text() == first.as_text()
    assert program(warmup_steps=3).as_text() != first.as_text()


def test_inputs_are_what_the_settings_and_the_data_say(batch):
    """The same update as with the latents normalised and the seed set beforehand."""
    chosen = TrainingSettings(learning_rate=0.1, warmup_steps=0, seed=5)
    step = jax.jit(
        make_step(expert_losses, NETWORK, chosen, 10, TimestepSampler("logit_normal", 0.0, 1.0, 1.0), MaskSettings())
    )
    state, scale = states.create(NETWORK, chosen, 10, jax.random.key(0)), LatentScale((0.3,), (2.0,))
    _, expected = step(state, batch | {"latent": scale.normalise(batch["latent"])})
    _, found = step(state, batch, StepInputs.of(chosen, scale))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    _, other = step(state, batch, StepInputs.of(dataclasses.replace(chosen, seed=6), scale))
    assert float(other["loss"]) != float(expected["loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_updates_are_proportional_to_the_learning_rate(optimizer, batch):
    """Weight decay among them: the step with a relative schedule is that of the optimizer of the settings."""
    settings = TrainingSettings(learning_rate=0.02, warmup_steps=0, optimizer=optimizer, weight_decay=0.3)
    state = states.create(NETWORK, settings, 10, jax.random.key(0))
    grads = jax.tree.map(lambda p: jnp.cos(1e3 * p + 1), state.params)
    absolute, _ = optimizers.optimizer(settings, 10).update(grads, state.opt_state, state.params)
    relative = optimizers.optimizer(dataclasses.replace(settings, learning_rate=1.0), 10)
    scaled, _ = relative.update(grads, state.opt_state, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.02 * b, rtol=1e-5, atol=1e-9), absolute, scaled)
