"""Sampling parameters. Each is declared once, here: flags, checks, the config section and docs/config.md follow."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from paris_jax.config import fields
from paris_jax.config.checks import Problems
from paris_jax.config.fields import setting

Solver = Literal["euler", "heun", "ab2", "dpm++2m", "ancestral"]
GuidanceMethod = Literal["classifier_free", "projected"]
GuidanceOscillation = Literal["none", "text", "image", "both"]
RoutingRule = Literal["top_k", "full", "threshold"]
RouterConditioning = Literal["prompt", "branch", "null"]
NonfinitePolicy = Literal["error", "drop"]
Fit = Literal["crop", "letterbox"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Solver, guidance and routing: the section `sampling` of a config, stored in an ensemble's manifest."""

    num_inference_steps: int = setting(50, "solver steps", at_least=1, at_most=10_000)
    solver: str = setting("euler", "heun evaluates twice a step; ancestral is stochastic", choices=Solver)
    guidance_scale: float = setting(7.5, "classifier-free guidance; 1 disables it", at_least=0)
    guidance_method: str = setting("classifier_free", "projected: adaptive projected guidance", choices=GuidanceMethod)
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0), "timesteps with guidance, lowest and highest (1 is noise); the others cost half", at_least=0.0,
        at_most=1.0,
    )  # fmt: skip
    guidance_rescale: float = setting(
        0.0, "classifier_free: fraction rescaled to the standard deviation without guidance", at_least=0.0, at_most=1.0
    )
    guidance_momentum: float = setting(-0.5, "projected: momentum of the guidance direction", above=-1, below=1)
    guidance_norm_threshold: float = setting(15.0, "projected: largest norm of the guidance of one latent", above=0)
    guidance_eta: float = setting(
        0.0, "projected: fraction kept of the component parallel to the prediction", at_least=0.0, at_most=1.0
    )
    image_guidance_scale: float = setting(3.0, "guidance by conditioning frames; 1 disables it", at_least=0)
    guidance_oscillation: str = setting(
        "none", "guidance applied at every other step only, from step 10 on", choices=GuidanceOscillation
    )
    image_guidance_ramp: bool = setting(False, "guidance by conditioning frames grows along the frames")
    routing: str = setting("top_k", "rule that selects the experts", choices=RoutingRule)
    top_k: int = setting(1, "top_k: experts per step", at_least=1, at_most=1024)
    threshold: float = setting(
        0.9, "threshold: smallest set of experts with this routing weight", at_least=0.0, at_most=1.0
    )
    router_temperature: float = setting(
        1.0, "of the router's softmax: above 1 more even, towards 0 the largest weight alone", at_least=1e-4
    )
    expert_batch_size: int = setting(
        0, "samples (or guidance branches) per pass of an expert; 1 takes least memory, 0 chooses", at_least=0
    )
    router_conditioning: str = setting(
        "prompt",
        "text that the router sees: the prompt, each guidance branch's own, or none",
        choices=RouterConditioning,
    )

    def __post_init__(self):
        # JSON and config files have lists.
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingSettings":
        """The settings of a manifest.

        Raises:
          ValueError: an unknown field, or a value of another type or outside its range.
        """
        for name in values.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"{name} is a field that this version does not know")
        settings = msgspec.convert(values, cls)
        for problem in settings.problems():
            raise ValueError(problem)
        return settings

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
        low, high = self.guidance_interval
        if low > high:
            yield f"guidance_interval={self.guidance_interval}: its first timestep must not be above the second"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingSettings):
    """All arguments of `Ensemble.sample` besides prompts: the settings, and those of one call."""

    negative_prompt: str | Sequence[str] | None = setting(
        None, "prompt that guidance leads away from: one for all prompts, or one for each; default: no text"
    )
    seed: int | Sequence[int] = setting(
        0, "seed of the noise: one for all prompts, or one for each", at_least=0, at_most=2**64 - 1
    )
    height: int | None = setting(None, "of the videos, in pixels; default: as trained")
    width: int | None = setting(None, "of the videos, in pixels; default: as trained")
    num_frames: int | None = setting(None, "of the videos; default: as trained")
    timesteps: Sequence[float] | None = setting(
        None, "the timesteps themselves, falling from 1 to 0, instead of num_inference_steps ones spaced as in training"
    )
    timestep_shift: float | None = setting(
        None, "a in t <- a t / (1 + (a - 1) t); default: as in training, for the size of the videos", above=0,
        at_most=1000,
    )  # fmt: skip
    fixed_expert: int | Sequence[int] | None = setting(
        None, "expert to use regardless of the router: one cluster, or one for each step"
    )
    drop_experts: int | Sequence[int] = setting((), "clusters whose experts are left out")
    on_nonfinite: str = setting(
        "error", "where an expert predicts non-finite values: stop, or drop it and start again", choices=NonfinitePolicy
    )
    image: Any = setting(None, "picture that is the first frame, one for all prompts, or one for each")
    last_image: Any = setting(None, "picture that is the last frame, one for all prompts, or one for each")
    video: Any = setting(None, "video to continue, one for all prompts, or one for each")
    num_cond_frames: int | None = setting(None, "last frames of `video` to continue from; default: all")
    fit: str | None = setting(None, "where an image has another aspect ratio than the video: crop or letterbox")
    preview_every_steps: int = setting(0, "steps between previews; 0: none", at_least=0)


# Fields that belong to one call, in order.
CALL_FIELDS = tuple(
    field for field in dataclasses.fields(SamplingParams) if field.name not in SamplingSettings.__dataclass_fields__
)
