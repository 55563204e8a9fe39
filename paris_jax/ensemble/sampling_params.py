"""Validates sampling parameters against an ensemble, and resolves them to arrays."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.artifacts.schemas import LatentSpaceManifest
from paris_jax.config import checks
from paris_jax.config.sampling import SamplingParams
from paris_jax.diffusion import randomness, timesteps
from paris_jax.diffusion.guidance import Strength
from paris_jax.encoders import codecs, text
from paris_jax.ensemble.routing import Routing
from paris_jax.errors import UserError, nearest
from paris_jax.models.dit import PATCH, video_tokens

ENCODERS = ("vae", "t5", "clip")  # published encoders, whose folders a caller names
FIELD_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))
INTEGER_FIELDS = {field.name for field in dataclasses.fields(SamplingParams) if field.type is int}


def resolve(defaults: SamplingParams, params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
    """The parameters of a call: `params` (or the ensemble's own), with overrides (None: as it is).

    `top_k` or `threshold` alone selects its routing rule.

    Raises:
      TypeError: an unknown name, with the nearest one.
      UserError: a value outside its range, or two routing rules at once.
    """
    for name in overrides.keys() - set(FIELD_NAMES):
        raise TypeError(f"unexpected keyword argument {name!r}{nearest(name, FIELD_NAMES)}")
    changes = {name: value for name, value in overrides.items() if value is not None}
    check_one_rule(changes)
    changes |= {name: as_integer(name, changes[name]) for name in INTEGER_FIELDS & changes.keys()}
    implied = next((rule for rule in ("top_k", "threshold") if rule in changes), None)
    if implied and "routing" not in changes:
        changes["routing"] = implied
    resolved = dataclasses.replace(params or defaults, **changes)
    for problem in checkable(resolved).problems():
        raise UserError(problem)
    return resolved


def checkable(params: SamplingParams) -> SamplingParams:
    """The parameters whose range does not depend on the ensemble or the prompts; seeds are checked by `sample_keys`."""
    return dataclasses.replace(params, seed=0)


def check_one_rule(changes: Mapping[str, Any]) -> None:
    """Refuses two routing rules at once, so that neither is ignored in silence."""
    rules = {name: changes.get(name) for name in ("top_k", "threshold", "fixed_expert")}
    rule = changes.get("routing")
    named = [f"{name}={value}" for name, value in rules.items() if value is not None and name != rule]
    if rule is not None and named:
        named.insert(0, f"routing={rule!r}")
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} are different routing rules; give one of them")


def strength(params: SamplingParams) -> Strength:
    """The strength of guidance, as arrays."""
    low, high = params.guidance_interval
    return Strength(
        jnp.float32(params.guidance_scale),
        low=jnp.float32(low),
        high=jnp.float32(high),
        rescale=jnp.float32(params.guidance_rescale),
        momentum=jnp.float32(params.guidance_momentum),
        norm_threshold=jnp.float32(params.guidance_norm_threshold),
        eta=jnp.float32(params.guidance_eta),
        image_scale=jnp.float32(params.image_guidance_scale),
        text_oscillates=jnp.array(params.guidance_oscillation in ("text", "both")),
        image_oscillates=jnp.array(params.guidance_oscillation in ("image", "both")),
        ramp=jnp.array(params.image_guidance_ramp),
    )


def routing(params: SamplingParams, strict: bool, experts: int) -> Routing:
    """The routing rule for so many experts; unless `strict`, a default `top_k` is lowered to their number."""
    rule = "fixed" if params.fixed_expert is not None else params.routing
    k = params.top_k if strict else min(params.top_k, experts)
    chosen = Routing(rule, k if rule == "top_k" else 1, params.threshold if rule == "threshold" else 0.0)
    chosen.check(experts)
    return chosen


def check_previews(params: SamplingParams, has_callback: bool) -> None:
    """Refuses previews without a callback for them, and the reverse."""
    if has_callback != (params.preview_every_steps > 0):
        raise UserError(
            "preview_every_steps and on_preview go together: the number of steps between previews, and the callback"
        )


def check_encoders(folders: Mapping[str, str] | None) -> None:
    """Refuses a folder for an unknown encoder."""
    for name in folders or {}:
        for problem in checks.choice("encoders", name, ENCODERS):
            raise UserError(problem)


def check_cond(cond: jax.Array, noise_shape: tuple[int, ...]) -> None:
    """Refuses a conditioning input that does not fit latents of a shape (N, T, H, W, C)."""
    expected = (*noise_shape[:-1], noise_shape[-1] + 1)
    if cond.shape != expected:
        raise UserError(
            f"cond has shape {cond.shape}; must be {expected}: the mask, then the latent (cond_masks.cond_input)"
        )
    if not np.isfinite(cond).all():
        raise UserError("cond holds values that are not finite")


def dropped_clusters(drop: int | Sequence[int]) -> list[int]:
    """The clusters named by `drop_experts`, one or several."""
    return [as_integer("drop_experts", k) for k in np.atleast_1d(np.asarray(drop, object))]


def present_experts(clusters: list[int], dropped: list[int]) -> np.ndarray:
    """The experts that are used, (E,) bool: all but those of the dropped clusters."""
    absent = sorted(set(dropped) - set(clusters))
    if absent or set(dropped) >= set(clusters):
        remedy = "only these can be dropped" if absent else "at least one must be left"
        known = ", ".join(map(str, clusters))
        raise UserError(f"drop_experts={dropped}: this ensemble has the experts {known}; {remedy}")
    return np.asarray([k not in dropped for k in clusters])


def first_nonfinite(nonfinite_SE: np.ndarray, clusters: list[int]) -> tuple[int, list[int]] | None:
    """The first step with non-finite predictions, and the clusters of their experts."""
    steps = np.flatnonzero(nonfinite_SE.any(-1))
    return (int(steps[0]), [clusters[e] for e in np.flatnonzero(nonfinite_SE[steps[0]])]) if len(steps) else None


def describe_nonfinite(step: int | None, clusters: list[int]) -> str:
    """Which experts predicted non-finite values, and when, as the beginning of a sentence."""
    who = f"xpert{'s' * (len(clusters) > 1)} {', '.join(map(str, clusters))} predicted values that are not finite"
    return f"E{who}" if step is None else f"At step {step}, e{who}"


def expert_schedule(
    fixed_expert: int | Sequence[int] | None, steps: int, clusters: list[int], present: np.ndarray
) -> jax.Array:
    """Indices of the fixed experts, (S,) int32; zeros where the router chooses."""
    if fixed_expert is None:
        return jnp.zeros(steps, jnp.int32)
    named = [as_integer("fixed_expert", k) for k in np.atleast_1d(np.asarray(fixed_expert, object))]
    named = named * steps if np.ndim(fixed_expert) == 0 else named
    if len(named) != steps:
        raise UserError(
            f"fixed_expert names {len(named)} steps where num_inference_steps={steps}; give one expert for each step"
        )
    available = [k for k, is_present in zip(clusters, present, strict=True) if is_present]
    absent = sorted({k for k in named if k not in available})
    if absent:
        raise UserError(f"fixed_expert={absent}: this ensemble has the experts {', '.join(map(str, available))}")
    return jnp.asarray([clusters.index(k) for k in named], jnp.int32)


def resolve_timesteps(
    params: SamplingParams, explicit_steps: bool, trained_shift: float, latent_shape: tuple[int, ...]
) -> jax.Array:
    """Timesteps from 1 to 0, (S + 1,): evenly spaced and shifted, or those given.

    The shift is that of training: a constant, or by the rule for the latent (T, H, W, C) that is sampled.
    """
    if params.timesteps is None:
        shift = params.timestep_shift or timesteps.resolve_shift(
            trained_shift, video_tokens(latent_shape), latent_shape[0]
        )
        return timesteps.timestep_schedule(params.num_inference_steps, shift)
    if params.timestep_shift is not None:
        raise UserError("timesteps are used as they are; leave timestep_shift out, or num_inference_steps instead")
    points = np.asarray(params.timesteps, np.float32)
    if points.ndim != 1 or len(points) < 2 or points[0] != 1 or points[-1] != 0 or not (np.diff(points) < 0).all():
        shown = f"{', '.join(f'{p:g}' for p in points.ravel()[:6])}{', ...' if points.size > 6 else ''}"
        raise UserError(f"timesteps={shown}: must fall from 1 (noise) to 0 (data), such as 1, 0.8, 0.5, 0")
    if explicit_steps and params.num_inference_steps != len(points) - 1:
        raise UserError(
            f"timesteps has {len(points) - 1} steps where num_inference_steps={params.num_inference_steps}; "
            "leave num_inference_steps out"
        )
    return jnp.asarray(points)


def as_integer(name: str, value: Any) -> int:
    """The integer of a value; refuses one that is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value}: must be a whole number") from None


def sample_keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """A key for each of `count` samples, from one seed and the sample's index, or from its own seed."""
    seeds = [as_integer("seed", s) for s in np.atleast_1d(np.asarray(seed, object))]
    for s in seeds:
        if not 0 <= s < 2**64:
            raise UserError(f"seed={s}: must be from 0 to {2**64 - 1}")
    if np.ndim(seed) == 0:
        return randomness.sample_keys(seeds[0], 0, jnp.arange(count))
    if len(seeds) != count:
        raise UserError(f"seed names {len(seeds)} for {count} prompts; give one seed for all, or one for each")
    return jnp.concatenate([randomness.sample_keys(s, 0, jnp.arange(1)) for s in seeds])


def check_encoder_sizes(codec: codecs.Codec, encoder: Any, shared: LatentSpaceManifest) -> None:
    """Refuses encoders of other sizes than the experts': weights without a recorded hash may be any."""
    expected, actual = text.described_widths(shared.text), (encoder.width, encoder.pooled_width)
    if actual != expected:
        raise UserError(
            f"The text encoder has tokens of width {actual[0]} and a pooled width of {actual[1]}, these experts were "
            f"trained with {expected[0]} and {expected[1]}; name the encoders that they were trained with"
        )
    channels, trained = getattr(codec, "channels", None), shared.latent.shape[-1]
    if channels is not None and channels != trained:
        raise UserError(
            f"The codec has latents of {channels} channels, these experts were trained with {trained}; name their VAE"
        )


def video_size(latent: tuple[int, int, int, int], codec: codecs.Codec) -> dict[str, int]:
    """num_frames, height and width of the videos of a latent (T, H, W, C)."""
    T, H, W, _ = latent
    frames = codec.first + (T - codec.first) * codec.time
    return {"num_frames": frames, "height": H * codec.height, "width": W * codec.width}


def latent_shape(
    trained: tuple[int, int, int, int], codec: codecs.Codec, params: SamplingParams
) -> tuple[int, int, int, int]:
    """The latent (T, H, W, C) of videos of the size in `params`, by default of the size trained on.

    Raises:
      UserError: a size that the codec or the network's patches do not divide, with the nearest that they do.
    """
    blocks = {"num_frames": codec.time, "height": codec.height * PATCH, "width": codec.width * PATCH}
    sizes = video_size(trained, codec)
    sizes |= {name: getattr(params, name) for name in sizes if getattr(params, name) is not None}
    for name, size in sizes.items():
        block, first = blocks[name], codec.first if name == "num_frames" else 0
        least = first or block
        if size < least or (size - first) % block:
            low = max((size - first) // block * block + first, least)
            near = f"{low} or {low + block}" if size > least else f"{least}"
            more = f"{first} more than " if first else ""
            raise UserError(f"{name}={size}: must be {more}a multiple of {block}; the nearest is {near}")
    T, H, W, _ = codec.latent_shape(sizes["num_frames"], sizes["height"], sizes["width"])
    return T, H, W, trained[-1]
