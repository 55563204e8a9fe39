"""Training timesteps: their distribution, and which network draws from which."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from paris_jax.artifacts.run_folder import Role
from paris_jax.config.experiment import Experiment
from paris_jax.config.training import MaskSettings
from paris_jax.diffusion import timesteps
from paris_jax.encoders.codecs import LatentScale
from paris_jax.training.job import job_of
from paris_jax.training.losses import TimestepSampler, add_cond_frames

KEYS = jax.random.split(jax.random.key(0), 20_000)


def quantiles(kind: str, shift: float) -> np.ndarray:
    drawn = TimestepSampler(kind, 0.0, 1.0, shift).draw(KEYS)
    return np.quantile(drawn, [0.1, 0.5, 0.9])


def test_uniform_timesteps_are_uniform_whatever_the_shift():
    np.testing.assert_allclose(quantiles("uniform", 8.0), [0.1, 0.5, 0.9], atol=0.02)
    np.testing.assert_array_equal(quantiles("uniform", 8.0), quantiles("uniform", 1.0))


def test_shifted_uniform_timesteps_are_those_of_the_sampling_schedule():
    expected = np.asarray(timesteps.timestep_schedule(10, 8.0))[[9, 5, 1]]
    np.testing.assert_allclose(quantiles("shifted_uniform", 8.0), expected, atol=0.02)


@pytest.mark.parametrize("prediction_type, kind", [("velocity", "logit_normal"), ("noise", "uniform")])
def test_noise_predicting_experts_draw_uniform_timesteps(prediction_type, kind):
    experiment = Experiment()
    training = dataclasses.replace(experiment.training, prediction_type=prediction_type)
    experiment = dataclasses.replace(experiment, training=training)
    job = job_of(experiment, epath.Path("."), Role("expert", 0), (2, 4, 4, 24), (8, 8), 5, "float32")
    assert job.timestep_sampler.kind == kind


@pytest.mark.parametrize("kind", ["first", "last", "both", "prefix"])
def test_a_first_or_last_frame_is_given_as_the_encoded_image_and_a_prefix_as_the_clip(kind):
    """As sampling gives them: a codec's last latent frame knows the frames before it."""
    masks = MaskSettings(**({"none": 0.0} | {kind: 1.0}))
    x_0, images = jax.random.normal(jax.random.key(1), (6, 3, 2, 2, 4)), jnp.full((6, 2, 2, 2, 4), 7.0, jnp.float16)
    scale = LatentScale((1.0,), (2.0,))
    batch = add_cond_frames({"latent": x_0, "cond_images": images}, KEYS[:6], masks, scale.normaliser)
    mask, latent = batch["cond"][..., :1], batch["cond"][..., 1:]
    assert (batch["latent"] == x_0).all() and 0 < mask.mean() < 1
    expected = x_0 if kind == "prefix" else jnp.full_like(x_0, (7 - 1) / 2)
    np.testing.assert_array_equal(latent, jnp.where(mask > 0, expected, 0.0))
