"""Learning-rate schedules, optimizers and the decay of the parameter average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib

from paris_jax.config.training import TrainingSettings
from paris_jax.models import functional


def learning_rate(settings: TrainingSettings, steps: int) -> optax.Schedule:
    """Linear warm-up from 0; then cosine to 0 at `steps`, constant, or constant with a linear end (WSD)."""
    peak, after = settings.learning_rate, max(steps - settings.warmup_steps, 1)
    ending = min(max(1, round(settings.lr_decay_fraction * steps)), after)
    then = {
        "cosine": optax.cosine_decay_schedule(peak, after),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.linear_schedule(peak, 0.0, ending, transition_begin=after - ending),
    }[settings.lr_schedule]
    warmup = optax.linear_schedule(0.0, peak, max(settings.warmup_steps, 1))
    return optax.join_schedules([warmup, then], [settings.warmup_steps])


def optimizer(settings: TrainingSettings, steps: int) -> optax.GradientTransformation:
    """Clip by global norm; then Adam, Muon or Adafactor; then weight decay, scaled by the learning rate as in AdamW.

    Muon (Jordan 2024) orthogonalises the momentum of the blocks' matrices; the rest (input and output
    layers, modulation, norms and biases) takes Adam's step, with Nesterov momentum. Muon's steps are scaled to Adam's
    usual size (Liu et
    al. 2025, arXiv 2502.16982), so that one learning rate serves both. Adafactor (Shazeer and Stern 2018) keeps row and
    column means of the squared gradients only; its learning rate is relative to the size of each parameter.
    """
    rate = learning_rate(settings, steps)
    if settings.optimizer == "muon":
        numbers: Any = _stacked_matrices
        update = optax.contrib.muon(
            rate,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=numbers,
            adam_b1=settings.b1,
            adam_b2=settings.b2,
            eps=settings.eps,
        )
    elif settings.optimizer == "adafactor":
        update = optax.adafactor(rate)
    else:
        update = optax.adam(rate, settings.b1, settings.b2, settings.eps)
    transforms = [optax.clip_by_global_norm(settings.max_grad_norm), update]
    if settings.weight_decay:
        transforms.append(optax.add_decayed_weights(lambda n: -settings.weight_decay * rate(n), mask=_is_matrix))
    return optax.chain(*transforms)


def _is_matrix(params: functional.Params) -> Any:
    """Mask of the parameters with weight decay: the matrices."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _stacked_matrices(params: functional.Params) -> Any:
    """Muon's axes of each stack (layers, inputs, outputs) of the blocks' matrices; None for Adam's parameters."""
    spec = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)

    def of(path: Any, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        names = {key.key for key in path}
        return spec if leaf.ndim == 3 and "modulation" not in names else None  # only stacks have three axes

    return jax.tree_util.tree_map_with_path(of, params)


def ema_decay(settings: TrainingSettings, step: jax.Array) -> jax.Array:
    """Decay of the parameter average at an update.

    min(ema_decay, (1 + n) / (10 + n)): early steps are forgotten quickly. With `ema_sigma_rel`, (1 - 1 / (n + 1))^(g
    + 1): the horizon grows with training at a constant relative width (power-function average, Karras et al. 2024,
    arXiv 2312.02696, equation 2).
    """
    if settings.ema_sigma_rel:
        return (1.0 - 1.0 / (1.0 + step)) ** (ema_power(settings.ema_sigma_rel) + 1.0)
    return jnp.minimum(settings.ema_decay, (1.0 + step) / (10.0 + step))


def ema_power(width: float) -> float:
    """The exponent g whose average has the relative standard deviation `width` (ibid., equation 4).

    width^2 (g + 2)^2 (g + 3) = g + 1; between 0 and about 0.28 there is one g above 0.
    """
    roots = np.roots([width**2, 7 * width**2, 16 * width**2 - 1, 12 * width**2 - 1])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))
