"""Per-sample training losses: timesteps, noise, text dropout, conditioning frames, and the loss of each role."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.config.training import MaskSettings, TrainingSettings
from paris_jax.diffusion import cond_masks, losses, path, randomness, timesteps
from paris_jax.encoders.codecs import UNIT_SCALE, Normaliser
from paris_jax.models import functional

TIME_BINS = 8
MASK_KEY = (
    3  # folded into a sample's key for its conditioning mask; differs from the splits for noise, timestep and dropout
)
LOSSES = {"velocity": losses.flow_matching, "noise": losses.noise_prediction, "x0": losses.data_prediction}
Batch = dict[str, jax.Array]
PerSampleLosses = Callable[..., jax.Array]  # (config, params, batch, x_0, noise, t_B) -> (B,)


@dataclasses.dataclass(frozen=True)
class TimestepSampler:
    """Distribution of training timesteps.

    "logit_normal": sigmoid(normal(mean, std)), then shifted; "uniform"; "shifted_uniform": uniform, then shifted.
    """

    kind: str
    mean: float
    std: float
    shift: float

    def draw(self, keys_B: jax.Array) -> jax.Array:
        """A timestep in [0, 1] for each key, (B,) float32."""
        if self.kind in ("uniform", "shifted_uniform"):
            uniform_B = jax.vmap(jax.random.uniform)(keys_B)
            return uniform_B if self.kind == "uniform" else timesteps.shift(uniform_B, self.shift)
        return timesteps.logit_normal(randomness.normal(keys_B, ()), self.mean, self.std, self.shift)


def drop_text(
    batch: Batch, keys_B: jax.Array, settings: TrainingSettings, null: Mapping[str, np.ndarray] | None = None
) -> Batch:
    """Replaces the text tokens and, independently, the pooled text of some samples by the null embedding.

    It is zeros, or `null`: tokens (L, X) and pooled (P,). A router's batch has no tokens.
    """
    chance = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    keep_tokens, keep_pooled = chance[:, 0] >= settings.drop_tokens, chance[:, 1] >= settings.drop_pooled
    pooled = jnp.asarray(null["pooled"] if null else 0, batch["pooled"].dtype)
    batch = batch | {"pooled": jnp.where(keep_pooled[:, None], batch["pooled"], pooled)}
    if "tokens" not in batch:
        return batch
    tokens, length = jnp.zeros((), batch["tokens"].dtype), 1
    if null:
        length, more = len(null["tokens"]), batch["tokens"].shape[1] - len(null["tokens"])
        tokens = jnp.pad(jnp.asarray(null["tokens"], batch["tokens"].dtype), ((0, more), (0, 0)))
    return batch | {
        "tokens": jnp.where(keep_tokens[:, None, None], batch["tokens"], tokens),
        "length": jnp.where(keep_tokens, batch["length"], length),
    }


def expert_losses(
    config: Any, params: functional.Params, batch: Batch, x_0: jax.Array, noise: jax.Array, t_B: jax.Array
) -> jax.Array:
    """Flow-matching loss of each sample, or that of the noise or the data where the network predicts these, (B,)."""
    condition = batch["tokens"], batch["length"], batch["pooled"], batch.get("cond")
    loss = LOSSES[config.prediction_type]
    return loss(lambda x, t: functional.apply(config, params, x, t, *condition), x_0, noise, t_B)


def router_losses(
    config: functional.Config, params: functional.Params, batch: Batch, x_0: jax.Array, noise: jax.Array, t_B: jax.Array
) -> jax.Array:
    """Cross-entropy of each sample's cluster given its noised latent, (B,)."""
    condition = batch["pooled"], batch.get("cond")
    logits = functional.apply(config, params, path.interpolate(x_0, noise, t_B), t_B, *condition)
    return losses.cross_entropy(logits, batch["cluster"])


def add_cond_frames(
    batch: Batch, keys_B: jax.Array, masks: MaskSettings, normalise: Normaliser = UNIT_SCALE.normaliser
) -> Batch:
    """Adds the conditioning input `cond` of each sample, with a mask drawn from its key.

    A first or last frame is the frame encoded as an image (`cond_images`, not normalised): a codec's last latent frame
    knows the frames before it, which sampling does not have. A prefix is the clip's own latent, as of a video.
    """
    x_0 = batch["latent"]
    mask_BT, is_prefix_B = cond_masks.draw(keys_B, masks.weights, x_0.shape[1])
    clean = x_0
    if "cond_images" in batch:
        images = normalise(batch["cond_images"])
        ends = cond_masks.with_images(x_0, images)
        clean = jnp.where(path.per_sample(is_prefix_B, x_0), x_0, ends)
    return batch | {"cond": cond_masks.cond_input(clean, mask_BT)}
