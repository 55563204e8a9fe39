"""The compute identity: whether ensemble and monolith cost the same training compute, in exact integers."""

import dataclasses
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """Compute of one training job.

    Attributes:
      name: "expert 0", "monolith", "router".
      steps: optimizer steps.
      batch: clips per step.
      flops: FLOPs of one training step on one clip (`models.flops`).
    """

    name: str
    steps: int
    batch: int
    flops: int

    @property
    def total(self) -> int:
        return self.steps * self.batch * self.flops


def identity(experts: Sequence[TrainingCost], monolith: TrainingCost, router: TrainingCost | None) -> dict[str, Any]:
    """Compares steps x batch x FLOPs per clip, summed over the experts, to the monolith's; "equal" is exact.

    The router's cost is reported beside the identity: the published comparison does not count it either.
    """
    total = sum(job.total for job in experts)

    def entry(job: TrainingCost) -> dict[str, Any]:
        return {**dataclasses.asdict(job), "total": job.total}

    return {
        "experts": [entry(job) for job in experts],
        "monolith": entry(monolith),
        "router": entry(router) if router else None,
        "experts_total": total,
        "ratio": total / monolith.total,
        "equal": total == monolith.total,
    }


def describe(found: dict[str, Any]) -> str:
    """Formats the result of `identity` as one line."""
    terms = " + ".join(f"{job['steps']} x {job['batch']} x {job['flops']}" for job in found["experts"])
    monolith, sign = found["monolith"], "=" if found["equal"] else "is not"
    return (
        f"steps x batch x FLOPs/clip: experts {terms} = {found['experts_total']:.6g} {sign} {monolith['total']:.6g} = "
        f"{monolith['steps']} x {monolith['batch']} x {monolith['flops']} of the monolith"
    )
