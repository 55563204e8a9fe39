"""One training step as a pure function: (state, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paris_jax.diffusion import masks, objectives, path, randomness, times
from paris_jax.models import functional
from paris_jax.models.router import RouterConfig
from paris_jax.training import state as states
from paris_jax.training.settings import Masks, Training
from paris_jax.training.state import TrainState

TIME_BINS = 8
MASKS = 3  # folded into a sample's key for what frames it is given: another number than the splits that follow

Batch = dict[str, jax.Array]
Losses = Callable[[functional.Params, Batch, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class TimeLaw:
    """The law of training times: sigmoid(normal(mean, std)) or uniform, then shifted."""

    kind: str
    mean: float
    std: float
    shift: float

    def draw(self, keys_B: jax.Array) -> jax.Array:
        if self.kind == "uniform":
            return times.shift(jax.vmap(jax.random.uniform)(keys_B), self.shift)
        return times.logit_normal(randomness.normal(keys_B, ()), self.mean, self.std, self.shift)


def drop_text(
    batch: Batch, keys_B: jax.Array, settings: Training, null: Mapping[str, np.ndarray] | None = None
) -> Batch:
    """Replaces the token sequence and, independently, the pooled vector of some samples by "no text".

    That is zeros, or what `null` holds: tokens (L, X) and pooled (P,).
    """
    chance = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    keep_tokens, keep_pooled = chance[:, 0] >= settings.drop_tokens, chance[:, 1] >= settings.drop_pooled
    tokens, pooled, length = jnp.zeros(()), jnp.zeros(()), 1
    if null:
        length, more = len(null["tokens"]), batch["tokens"].shape[1] - len(null["tokens"])
        tokens = jnp.pad(jnp.asarray(null["tokens"], jnp.float32), ((0, more), (0, 0)))
        pooled = jnp.asarray(null["pooled"], jnp.float32)
    return batch | {
        "tokens": jnp.where(keep_tokens[:, None, None], batch["tokens"], tokens),
        "length": jnp.where(keep_tokens, batch["length"], length),
        "pooled": jnp.where(keep_pooled[:, None], batch["pooled"], pooled),
    }


def expert_losses(config: Any, params, batch: Batch, x_0, noise, t_B) -> jax.Array:
    """Flow-matching loss of each sample, or DDPM's where the network predicts noise, (B,)."""
    told = batch["tokens"], batch["length"], batch["pooled"], batch.get("kept")
    objective = {"velocity": objectives.flow_matching, "noise": objectives.noise_prediction}[config.predicts]
    return objective(lambda x, t: functional.apply(config, params, x, t, *told), x_0, noise, t_B)


def router_losses(config: functional.Config, params, batch: Batch, x_0, noise, t_B) -> jax.Array:
    """Cross-entropy of each sample's cluster given its noised latent, (B,)."""
    told = batch["pooled"], batch.get("kept")
    logits = functional.apply(config, params, path.interpolate(x_0, noise, t_B), t_B, *told)
    return objectives.cross_entropy(logits, batch["cluster"])


def give_frames(batch: Batch, keys_B: jax.Array, drawn: Masks) -> Batch:
    """Adds the frames of each sample that the network is given."""
    x_0 = batch["latent"]
    return batch | {"kept": masks.kept(x_0, masks.draw(keys_B, drawn.weights, x_0.shape[1]))}


def make_step(
    config: functional.Config,
    settings: Training,
    steps: int,
    time_law: TimeLaw,
    drawn: Masks,
    null: Mapping[str, np.ndarray] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
    """Builds the step of an expert, a monolith or a router (told by its config), not yet jitted.

    `null` is what is said where no text is said, `drop_text`.
    """
    losses_of = router_losses if isinstance(config, RouterConfig) else expert_losses
    transform, schedule = states.optimizer(settings, steps), states.learning_rate(settings, steps)

    def gradient(params: functional.Params, step: jax.Array, batch: Batch) -> tuple[functional.Params, Any]:
        """Gradient of the mean loss, and each sample's loss and time."""
        keys = randomness.sample_keys(settings.seed, step, batch["index"])
        noise_keys, time_keys, drop_keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
        x_0 = batch["latent"]
        noise, t_B = randomness.normal(noise_keys, x_0.shape[1:]), time_law.draw(time_keys)
        inputs = drop_text(batch, drop_keys, settings, null)
        if config.kept_frames:
            inputs = give_frames(inputs, jax.vmap(lambda key: jax.random.fold_in(key, MASKS))(keys), drawn)

        def mean_loss(params: functional.Params) -> tuple[jax.Array, jax.Array]:
            losses_B = losses_of(config, params, inputs, x_0, noise, t_B)
            return losses_B.mean(), losses_B

        grads, losses_B = jax.grad(mean_loss, has_aux=True)(params)
        return grads, (losses_B, t_B)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        if settings.accumulate == 1:
            grads, (losses_B, t_B) = gradient(state.params, state.step, batch)
        else:

            def one_part(total: functional.Params, part: Batch) -> tuple[functional.Params, Any]:
                grads, of_samples = gradient(state.params, state.step, part)
                return jax.tree.map(jnp.add, total, grads), of_samples

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            total, of_samples = jax.lax.scan(one_part, zeros, in_parts(batch, settings.accumulate))
            grads = jax.tree.map(lambda g: g / settings.accumulate, total)
            losses_B, t_B = (x.reshape(-1) for x in of_samples)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        decay = states.ema_decay(settings, state.step)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
        bin_sum, bin_count = objectives.by_time_bin(losses_B, t_B, TIME_BINS)
        metrics = {
            "loss": losses_B.mean(),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step),
            "bin_sum": bin_sum,
            "bin_count": bin_count,
        }
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def in_parts(batch: Batch, parts: int) -> Batch:
    """A batch (B, ...) as (parts, B / parts, ...), every device keeping the samples it has."""
    return {name: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for name, x in batch.items()}
