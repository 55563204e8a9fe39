"""How videos are drawn from an ensemble, unless flags say otherwise."""

import dataclasses

from paris_jax import checks
from paris_jax.checks import Problems
from paris_jax.diffusion.solvers import SOLVERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Solver, guidance and routing. A config states them, `assemble` writes them into the ensemble's manifest."""

    steps: int = 50
    solver: str = "euler"  # or "heun"
    guidance: float = 7.5  # 1: no guidance
    routing: str = "top_k"  # "top_k", "full" or "threshold"
    top_k: int = 1
    threshold: float = 0.9

    def problems(self) -> Problems:
        yield from checks.at_least(1, steps=self.steps, top_k=self.top_k)
        yield from checks.choice("solver", self.solver, SOLVERS)
        yield from checks.choice("routing", self.routing, ("top_k", "full", "threshold"))
        yield from checks.at_least(0, guidance=self.guidance)
        yield from checks.between(0.0, 1.0, threshold=self.threshold)
