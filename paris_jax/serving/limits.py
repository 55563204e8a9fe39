"""Limits of the page: the size of a request, and how many may wait."""

import dataclasses

from paris_jax.config.fields import problems_of, setting


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of strangers' requests; flags of `paris-jax serve`."""

    max_waiting: int = setting(8, "requests that wait for their turn; one is sampled at a time", at_least=1)
    max_steps: int = setting(100, "solver steps of a video", at_least=1, at_most=10_000)
    max_frames: int = setting(0, "frames of a video; 0: as many as were trained on", at_least=0)
    max_columns: int = setting(8, "videos of one request: the ensemble, experts alone, the monolith", at_least=1)
    max_prompt_length: int = setting(1000, "characters of a prompt", at_least=1)
    max_image_mb: int = setting(8, "megabytes of an uploaded picture", at_least=1, at_most=256)
    problems = problems_of

    @property
    def image_bytes(self) -> int:
        return self.max_image_mb * 1_000_000

    @property
    def body_bytes(self) -> int:
        """Bytes of a request: a picture in base64, two prompts, and the other fields."""
        return self.image_bytes * 4 // 3 + 8 * self.max_prompt_length + 64_000
