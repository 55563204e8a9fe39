"""What a caller asks of an ensemble, checked before anything is computed: rules, times, seeds and sizes."""

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.config import checks
from paris_jax.config.sampling import SamplingParams
from paris_jax.diffusion import randomness, timesteps
from paris_jax.diffusion.guidance import Strength
from paris_jax.encoders import codecs, text
from paris_jax.ensemble.routing import Routing
from paris_jax.errors import UserError, nearest
from paris_jax.models.dit import PATCH

ENCODERS = ("vae", "t5", "clip")  # published ones, whose folders a caller names
FIELD_NAMES = sorted(
    {field.name for field in dataclasses.fields(SamplingParams)} - {"steps"}
)  # of settings, as keywords
INTEGER_FIELDS = {field.name for field in dataclasses.fields(SamplingParams) if field.type is int}


def check_names(given: dict[str, Any]) -> None:
    """Raises what Python does for a keyword that no one takes."""
    for name in given.keys() - set(FIELD_NAMES):
        raise TypeError(f"unexpected keyword argument {name!r}{nearest(name, FIELD_NAMES)}")


def resolve(defaults: SamplingParams, given: dict[str, Any]) -> SamplingParams:
    """The defaults with what a caller gives (None: nothing); a routing rule is implied by its own number."""
    given = {name: value for name, value in given.items() if value is not None}
    given |= {name: as_integer(name, given[name]) for name in INTEGER_FIELDS & given.keys()}
    implied = next((rule for rule in ("top_k", "threshold") if rule in given), None)
    if implied and "routing" not in given:
        given["routing"] = implied
    chosen = dataclasses.replace(defaults, **given)
    for problem in chosen.problems():
        raise UserError(problem)
    return chosen


def strength(chosen: SamplingParams) -> Strength:
    """How strong guidance is, as the sampler is told."""
    names = ("low", "high", "rescale", "momentum", "radius", "parallel", "image")
    return Strength(
        jnp.float32(chosen.guidance),
        **{name: jnp.float32(getattr(chosen, f"guidance_{name}")) for name in names},
        text_oscillates=jnp.array(chosen.guidance_oscillation in ("text", "both")),
        image_oscillates=jnp.array(chosen.guidance_oscillation in ("image", "both")),
        ramp=jnp.array(chosen.guidance_ramp),
    )


def routing(chosen: SamplingParams, given: dict[str, Any], forced: bool, experts: int) -> Routing:
    """The routing rule for so many experts."""
    rule = "forced" if forced else chosen.routing
    # The default may ask for more experts than are present; what the caller asks for may not.
    k = chosen.top_k if given.get("top_k") is not None else min(chosen.top_k, experts)
    made = Routing(rule, k if rule == "top_k" else 1, chosen.threshold if rule == "threshold" else 0.0)
    made.check(experts)
    return made


def check_one_rule(given: dict[str, Any], experts: Any) -> None:
    """One rule at a time: of two that are asked for, neither is passed over in silence."""
    rules = {"top_k": given.get("top_k"), "threshold": given.get("threshold"), "experts": experts}
    rule = given.get("routing")
    asked = [f"{name}={value}" for name, value in rules.items() if value is not None and name != rule]
    if rule is not None and asked:
        asked.insert(0, f"routing={rule!r}")
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different routing rules; give one of them")


def check_previews(broken: str, preview_every: int, previewed: bool) -> None:
    """Refuses what says nothing about when to preview, or what to do with a broken expert."""
    for problem in checks.choice("broken", broken, ("refuse", "drop")):
        raise UserError(problem)
    for problem in checks.at_least(0, preview_every=preview_every):
        raise UserError(problem)
    if previewed != (preview_every > 0):
        raise UserError("preview_every and on_preview go together: after how many steps, and what to call then")


def check_encoders(folders: Mapping[str, str] | None) -> None:
    """Refuses the folder of an encoder that there is not."""
    for name in folders or {}:
        for problem in checks.choice("encoders", name, ENCODERS):
            raise UserError(problem)


def check_cond(kept: jax.Array, start: tuple[int, ...]) -> None:
    """Refuses what does not tell of given frames of latents (N, T, H, W, C)."""
    expected = (*start[:-1], start[-1] + 1)
    if kept.shape != expected:
        raise UserError(
            f"kept has shape {kept.shape}; must be {expected}: the mask, then the latent (diffusion.masks.kept)"
        )
    if not np.isfinite(kept).all():
        raise UserError("kept holds values that are not finite")


def dropped_clusters(drop: int | Sequence[int]) -> list[int]:
    """The clusters named, one or several."""
    return [as_integer("drop", k) for k in np.atleast_1d(np.asarray(drop, object))]


def present_experts(clusters: list[int], dropped: list[int]) -> np.ndarray:
    """Which experts are used, (E,) bool: all but those of the clusters that are dropped."""
    absent = sorted(set(dropped) - set(clusters))
    if absent or set(dropped) >= set(clusters):
        what = "only these can be dropped" if absent else "at least one must be left"
        raise UserError(f"drop={dropped}: this ensemble has the experts {', '.join(map(str, clusters))}; {what}")
    return np.asarray([k not in dropped for k in clusters])


def first_nonfinite(broken_SE: np.ndarray, clusters: list[int]) -> tuple[int, list[int]] | None:
    """The first step at which experts answered with values that are not finite, and their clusters."""
    steps = np.flatnonzero(broken_SE.any(-1))
    return (int(steps[0]), [clusters[e] for e in np.flatnonzero(broken_SE[steps[0]])]) if len(steps) else None


def describe_nonfinite(step: int | None, clusters: list[int]) -> str:
    who = f"xpert{'s' * (len(clusters) > 1)} {', '.join(map(str, clusters))} answered with values that are not finite"
    return f"E{who}" if step is None else f"At step {step}, e{who}"


def expert_schedule(
    experts: int | Sequence[int] | None, steps: int, clusters: list[int], present: np.ndarray
) -> jax.Array:
    """Positions of the forced experts, (S,) int32; zeros where none is forced."""
    if experts is None:
        return jnp.zeros(steps, jnp.int32)
    named = [as_integer("experts", k) for k in np.atleast_1d(np.asarray(experts, object))]
    named = named * steps if np.ndim(experts) == 0 else named
    if len(named) != steps:
        raise UserError(f"experts names {len(named)} steps where num_steps={steps}; give one expert for each step")
    there = [k for k, is_there in zip(clusters, present, strict=True) if is_there]
    absent = sorted({k for k in named if k not in there})
    if absent:
        raise UserError(f"experts={absent}: this ensemble has the experts {', '.join(map(str, there))}")
    return jnp.asarray([clusters.index(k) for k in named], jnp.int32)


def resolve_timesteps(given: Sequence[float] | None, num_steps: int | None, default: int, shift: float) -> jax.Array:
    """Times from 1 to 0, (S + 1,): evenly spaced and shifted as in training, or those given."""
    for problem in checks.at_least(1, num_steps=1 if num_steps is None else num_steps):
        raise UserError(problem)
    if given is None:
        return timesteps.timestep_schedule(num_steps or default, shift)
    points = np.asarray(given, np.float32)
    if points.ndim != 1 or len(points) < 2 or points[0] != 1 or points[-1] != 0 or not (np.diff(points) < 0).all():
        shown = f"{', '.join(f'{p:g}' for p in points.ravel()[:6])}{', ...' if points.size > 6 else ''}"
        raise UserError(f"times={shown}: must fall from 1 (noise) to 0 (data), such as 1, 0.8, 0.5, 0")
    if num_steps not in (None, len(points) - 1):
        raise UserError(f"times has {len(points) - 1} steps where num_steps={num_steps}; leave num_steps out")
    return jnp.asarray(points)


def as_integer(name: str, value: Any) -> int:
    """The whole number that a value is; refuses one that it is not."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name}={value}: must be a whole number") from None


def sample_keys(seed: int | Sequence[int], count: int) -> jax.Array:
    """A key for each of `count` samples, from one seed and the sample's index or from a seed of its own."""
    seeds = [as_integer("seed", s) for s in np.atleast_1d(np.asarray(seed, object))]
    for problem in (p for s in seeds for p in checks.seed(seed=s)):
        raise UserError(problem)
    if np.ndim(seed) == 0:
        return randomness.sample_keys(seeds[0], 0, jnp.arange(count))
    if len(seeds) != count:
        raise UserError(f"seed names {len(seeds)} for {count} prompts; give one seed for all, or one for each")
    return jnp.concatenate([randomness.sample_keys(s, 0, jnp.arange(1)) for s in seeds])


def check_sizes(codec: codecs.Codec, encoder: Any, shared: dict[str, Any]) -> None:
    """Refuses encoders of other sizes than the experts know: weights whose hash nobody promised may be any."""
    expected, found = text.described_widths(shared["text"]), (encoder.width, encoder.pooled_width)
    if found != expected:
        raise UserError(
            f"The text encoder makes tokens of {found[0]} and a pooled vector of {found[1]} numbers, these experts "
            f"know {expected[0]} and {expected[1]}; name the encoders that they were trained with"
        )
    known, made = shared["latent"]["shape"][-1], getattr(codec, "channels", None)
    if made is not None and made != known:
        raise UserError(f"The codec has latents of {made} channels, these experts know {known}; name their VAE")


def latent_shape(
    trained: tuple[int, int, int, int], codec: codecs.Codec, frames: int | None, height: int | None, width: int | None
) -> tuple[int, int, int, int]:
    """The latent (T, H, W, C) of videos of this size, by default of the size trained on.

    Raises:
      Refused: a size that the codec or the network's patches do not divide, with the nearest that they do.
    """
    T, H, W, C = trained
    blocks = {"frames": codec.time, "height": codec.height * PATCH, "width": codec.width * PATCH}
    sizes = {
        "frames": codec.first + (T - codec.first) * codec.time,
        "height": H * codec.height,
        "width": W * codec.width,
    }
    sizes |= {k: v for k, v in {"frames": frames, "height": height, "width": width}.items() if v is not None}
    for name, size in sizes.items():
        block, first = blocks[name], codec.first if name == "frames" else 0
        least = first or block
        if size < least or (size - first) % block:
            low = max((size - first) // block * block + first, least)
            near = f"{low} or {low + block}" if size > least else f"{least}"
            more = f"{first} more than " if first else ""
            raise UserError(f"{name}={size}: must be {more}a multiple of {block}; the nearest is {near}")
    T, H, W, _ = codec.latent_shape(**sizes)
    return T, H, W, C
