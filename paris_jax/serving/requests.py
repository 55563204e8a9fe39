"""Requests of the page: their fields, and the checks of a browser's values."""

import base64
import binascii
import contextlib
import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from paris_jax.config import checks
from paris_jax.config.sampling import Fit, SamplingParams
from paris_jax.ensemble.routing import RULES
from paris_jax.errors import UserError
from paris_jax.serving.limits import Limits

ENSEMBLE, MONOLITH = "ensemble", "monolith"  # columns; those of experts are "expert K"
# Fields of `SamplingParams` that the page shows, in its order. Help, ranges and types are those of the declaration.
MAIN = ("negative_prompt", "num_inference_steps", "guidance_scale", "seed")
ROUTING = ("routing", "top_k", "threshold", "fixed_expert")  # `routing` has the rule "fixed", too
FRAMES = ("fit", "image_guidance_scale")
MORE = (
    *("num_frames", "solver", "guidance_method", "guidance_rescale", "router_temperature", "timestep_shift"),
    *("drop_experts", "on_nonfinite"),
)
FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams)}
HINTS = typing.get_type_hints(SamplingParams)
LARGEST_SEED = 2**53 - 1  # the largest integer that a browser holds exactly
NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclasses.dataclass(frozen=True)
class Request:
    """A request: a prompt in each of the columns, with parameters of `Ensemble.sample`; `image` as uploaded."""

    prompt: str
    columns: tuple[str, ...]
    params: dict[str, Any]
    image: bytes | None = None


def kind(name: str) -> type:
    """The type of one value of a field: int, float, str or bool."""
    options = typing.get_args(HINTS[name]) or (HINTS[name],)
    return next(option for option in options if option in NAMES)


def choices(name: str) -> tuple[str, ...]:
    """The allowed values of a field; `routing` has the rule "fixed", too, and those of `fit` depend on the call."""
    return {"routing": RULES, "fit": typing.get_args(Fit)}.get(name, FIELDS[name].metadata["choices"])


def most(limits: Limits, frames: int, experts: int) -> dict[str, int]:
    """The largest values of fields that the page allows, where this is less than `SamplingParams` allow.

    Args:
      frames: of the videos that were trained on.
      experts: their number.
    """
    largest = {"num_inference_steps": limits.max_steps, "num_frames": limits.max_frames or frames}
    return largest | {"top_k": experts, "seed": LARGEST_SEED}


def read(form: Mapping[str, Any], limits: Limits, columns: Sequence[str], largest: Mapping[str, int]) -> Request:
    """The request of a form: prompt, columns, image (a data: address) and fields of `SamplingParams`.

    Args:
      columns: those that there are.
      largest: values of fields, by `most`.

    Raises:
      UserError: a value of another type, outside the limits, or a picture that is none.
    """
    for name in ("prompt", "negative_prompt"):
        text = form.get(name) or ""
        if not isinstance(text, str) or len(text) > limits.max_prompt_length:
            raise UserError(f"{name} must be text of at most {limits.max_prompt_length} characters; shorten it")
    wanted = form.get("columns")
    if not isinstance(wanted, list) or not wanted:
        raise UserError(f"No model is chosen; choose at least one of {', '.join(columns)}")
    for column in wanted:
        for problem in checks.choice("columns", column, columns):
            raise UserError(problem)
    if len(wanted) > limits.max_columns:
        raise UserError(f"{len(wanted)} models are chosen; must be at most {limits.max_columns}")
    params = {name: _typed(name, form[name]) for name in (*MAIN, *ROUTING, *FRAMES, *MORE) if _is_given(form.get(name))}
    _route(params)
    _check_limits(params, largest)
    image = _image(form.get("image"), limits)
    if image is None:
        params = {name: value for name, value in params.items() if name not in FRAMES}
    return Request(form.get("prompt") or "", tuple(c for c in columns if c in wanted), params, image)


def _is_given(value: Any) -> bool:
    return value is not None and value not in ("", [])


def _typed(name: str, value: Any) -> Any:
    """A value of a field, or a list of them."""
    return [_single(name, each) for each in value] if isinstance(value, list) else _single(name, value)


def _single(name: str, given: Any) -> Any:
    """A value of a field; browsers send whole numbers for floats, the reverse, and both as text."""
    wanted, value = kind(name), given
    if wanted in (int, float) and type(given) in (int, float, str):
        with contextlib.suppress(ValueError, OverflowError):
            number = float(given)
            exact = type(given) is int and wanted is int
            value = given if exact else int(number) if wanted is int and number.is_integer() else number
    if type(value) is not wanted or value in (math.inf, -math.inf) or value != value:
        raise UserError(f"{name}={str(given)[:40]!r}: must be {NAMES[wanted]}")
    return value


def _route(params: dict[str, Any]) -> None:
    """Keeps the field of the chosen routing rule only; without a rule, the ensemble's own holds."""
    rule = params.pop("routing", None)
    of_rules = {"top_k": "top_k", "threshold": "threshold", "fixed": "fixed_expert"}
    for problem in checks.choice("routing", rule or "full", RULES):
        raise UserError(problem)
    if rule == "fixed" and "fixed_expert" not in params:
        raise UserError("routing='fixed' has no expert; choose one as fixed_expert")
    for name in of_rules.values():
        if of_rules.get(rule or "") != name:
            params.pop(name, None)
    if rule and rule != "fixed":
        params["routing"] = rule


def _check_limits(params: Mapping[str, Any], largest: Mapping[str, int]) -> None:
    for name, value in largest.items():
        given = params.get(name, 0)
        if isinstance(given, list) or given > value:
            raise UserError(f"{name}={given}: this page allows at most {value}")


def _image(address: Any, limits: Limits) -> bytes | None:
    """The bytes of a data: address, not decoded."""
    if not address:
        return None
    head, _, text = address.partition(",") if isinstance(address, str) else ("", "", "")
    if not (head.startswith("data:") and head.endswith(";base64")):
        raise UserError("The picture did not arrive as a file; choose it again")
    if len(text) > limits.image_bytes * 4 // 3 + 4:
        raise UserError(f"The picture has more than {limits.max_image_mb} MB; choose a smaller one")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise UserError("The picture arrived damaged; choose it again") from None
