"""What training changes: parameters, their average, and the optimizer's moments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from paris_jax.models import functional
from paris_jax.training.settings import Training


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that is saved and restored, apart from the position in the data.

    There is no key here: every draw is a function of the seed, `step` and the sample's global index.
    """

    step: jax.Array  # () int32, updates made
    params: functional.Params  # float32
    ema: functional.Params  # float32, starts at the parameters
    opt_state: Any


def learning_rate(settings: Training, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine to 0 at `steps`, or constant."""
    warmup = optax.linear_schedule(0.0, settings.learning_rate, max(settings.warmup, 1))
    if settings.decay == "cosine":
        after = optax.cosine_decay_schedule(settings.learning_rate, max(steps - settings.warmup, 1))
    else:
        after = optax.constant_schedule(settings.learning_rate)
    return optax.join_schedules([warmup, after], [settings.warmup])


def optimizer(settings: Training, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate(settings, steps), settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay
        ),
    )


def create(config: functional.Config, settings: Training, steps: int, key: jax.Array) -> TrainState:
    """A fresh state; call it under jit with out_shardings to make it in place."""
    params = functional.init(config, key)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer(settings, steps).init(params))


def ema_decay(settings: Training, step: jax.Array) -> jax.Array:
    """Decay of the average at an update, min(ema, (1 + n) / (10 + n)): early steps are forgotten quickly."""
    return jnp.minimum(settings.ema, (1.0 + step) / (10.0 + step))
