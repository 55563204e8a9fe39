"""The part of the data that one of several workers prepares, from flags or from the engine that started it."""

import dataclasses
import os
import re
from collections.abc import Mapping

from paris_jax.errors import UserError

# (index, first index, count) in the environment of a SLURM array, of an indexed job of Kubernetes, of SkyPilot.
ENGINES = (
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"),
    ("JOB_COMPLETION_INDEX", "", ""),
    ("SKYPILOT_NODE_RANK", "", "SKYPILOT_NUM_NODES"),
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Worker `index` of `count`: it prepares every count-th shard, from shard `index` on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> "Part":
        """Reads "2/8", "auto" or "auto/8".

        "auto" takes the index from the engine that started this process, and, without "/8", their number, too.

        Raises:
          UserError: other text, an index beyond the number, or no such engine.
        """
        matched = re.fullmatch(r"(auto|\d{1,7})(?:/(\d{1,7}))?", text, re.ASCII)
        if not matched or (matched[1] != "auto" and matched[2] is None):
            raise UserError(f"--shard={text}: must be I/N, such as 0/8, or auto or auto/N for a job array")
        if matched[1] != "auto":
            index, count = int(matched[1]), int(matched[2])
        else:
            index, known = _from_engine(text, environment)
            count = int(matched[2]) if matched[2] else known
            if not count:
                raise UserError(f"--shard={text}: this engine does not say how many workers there are; give auto/N")
        if not 0 <= index < count:
            raise UserError(f"--shard={text}: worker {index} of {count}: must be from 0 to {count - 1}")
        return cls(index, count)


def _from_engine(text: str, environment: Mapping[str, str]) -> tuple[int, int]:
    """Index and number of workers, 0 where it is not known."""
    for index, first, count in ENGINES:
        if index in environment:
            try:
                found = [int(environment.get(name, "0") or 0) for name in (index, first, count)]
            except ValueError:
                raise UserError(f"--shard={text}: {index}={environment[index]!r} must be a number") from None
            return found[0] - found[1], found[2]
    names = ", ".join(index for index, _, _ in ENGINES)
    raise UserError(f"--shard={text}: none of {names} is set; give I/N, such as 0/8")
