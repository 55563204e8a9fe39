"""What training changes: parameters, their average, and the optimizer's moments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from paris_jax.models import functional
from paris_jax.training.settings import Training
from paris_jax.training.sharding import STACKED


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
    """Clip by global norm, then AdamW or Muon.

    Muon (Jordan 2024) orthogonalises the momentum of the blocks' matrices; the rest (what goes in and out, modulation,
    norms and biases) takes AdamW's step, with Nesterov momentum. Muon's steps are scaled to AdamW's usual size (Liu et
    al. 2025, arXiv 2502.16982), so that one learning rate serves both.
    """
    rate, decay = learning_rate(settings, steps), settings.weight_decay
    if settings.optimizer == "muon":
        update = optax.contrib.muon(
            rate,
            weight_decay=decay,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            eps=settings.eps,
            adam_weight_decay=decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_matrices,
        )
    else:
        update = optax.adamw(rate, settings.b1, settings.b2, settings.eps, weight_decay=decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)


def _matrices(params: functional.Params) -> Any:
    """How Muon reads each stack (layers, inputs, outputs) of matrices; None for what is AdamW's."""
    spec = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def of(path: Any, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = {key.key for key in path}
        stacked = leaf.ndim == 3 and not names.isdisjoint(STACKED)
        return spec if stacked and "modulation" not in names else None

    return jax.tree_util.tree_map_with_path(of, params)


def create(config: functional.Config, settings: Training, steps: int, key: jax.Array) -> TrainState:
    """A fresh state; call it under jit with out_shardings to make it in place."""
    params = functional.init(config, key)
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer(settings, steps).init(params))


def ema_decay(settings: Training, step: jax.Array) -> jax.Array:
    """Decay of the average at an update, min(ema, (1 + n) / (10 + n)): early steps are forgotten quickly."""
    return jnp.minimum(settings.ema, (1.0 + step) / (10.0 + step))
