"""How videos are drawn from an ensemble, unless flags say otherwise."""

import dataclasses
from typing import Literal, get_args

from paris_jax.config import checks
from paris_jax.config.checks import Problems

Solver = Literal["euler", "heun", "ab2", "dpm++2m", "ancestral"]
GuidanceMethod = Literal["classifier_free", "projected"]
GuidanceOscillation = Literal["nothing", "text", "image", "both"]
RoutingRule = Literal["top_k", "full", "threshold"]
RouterConditioning = Literal["prompt", "branch", "nothing"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Solver, guidance and routing. A config states them, `assemble` writes them into the ensemble's manifest."""

    steps: int = 50
    solver: str = "euler"  # "heun" (two evaluations a step), "ab2", "dpm++2m", or "ancestral" (stochastic)
    guidance: float = 7.5  # 1: no guidance
    guidance_method: str = "classifier_free"  # or "projected": adaptive projected guidance
    guidance_low: float = 0.0  # guided at times from here ...
    guidance_high: float = 1.0  # ... to here (1 is noise); the others cost half
    guidance_rescale: float = 0.0  # classifier-free: share brought back to the spread without guidance
    guidance_momentum: float = -0.5  # projected: of the earlier differences
    guidance_radius: float = 15.0  # projected: the longest difference, as a norm over one latent
    guidance_parallel: float = 0.0  # projected: share of the part along the prediction that is kept
    guidance_image: float = 3.0  # by frames that are given, where some are; 1: none
    guidance_oscillation: str = "nothing"  # "text", "image" or "both": from step 10 on, guided at every other step
    guidance_ramp: bool = False  # guidance by the image grows along the frames
    routing: str = "top_k"  # "top_k", "full" or "threshold"
    top_k: int = 1
    threshold: float = 0.9
    temperature: float = 1.0  # of the router's softmax: above 1 more even, towards 0 the heaviest alone
    rows_at_once: int = 0  # of one expert (1: guidance in passes of its own); more or fewer change the speed; 0: chosen
    routed_by: str = "prompt"  # what the router reads; "branch": for guidance's other branch its own text; "nothing"

    def problems(self) -> Problems:
        yield from checks.at_least(1, steps=self.steps, top_k=self.top_k)
        yield from checks.choice("solver", self.solver, get_args(Solver))
        yield from checks.choice("routing", self.routing, get_args(RoutingRule))
        yield from checks.choice("guidance_method", self.guidance_method, get_args(GuidanceMethod))
        yield from checks.choice("routed_by", self.routed_by, get_args(RouterConditioning))
        yield from checks.choice("guidance_oscillation", self.guidance_oscillation, get_args(GuidanceOscillation))
        amounts = {"guidance": self.guidance, "guidance_image": self.guidance_image, "rows_at_once": self.rows_at_once}
        yield from checks.at_least(0, **amounts)
        yield from checks.above(0, guidance_radius=self.guidance_radius)
        yield from checks.at_least(1e-4, temperature=self.temperature)
        yield from checks.between(0.0, 1.0, threshold=self.threshold, guidance_rescale=self.guidance_rescale)
        yield from checks.between(0.0, 1.0, guidance_low=self.guidance_low, guidance_high=self.guidance_high)
        yield from checks.between(0.0, 1.0, guidance_parallel=self.guidance_parallel)
        if not -1 < self.guidance_momentum < 1:
            yield f"guidance_momentum={self.guidance_momentum}: must be above -1 and below 1"
        if self.guidance_low > self.guidance_high:
            yield f"guidance_low={self.guidance_low}: must not be above guidance_high={self.guidance_high}"
