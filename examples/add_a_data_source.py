"""A data source of one's own: a class with a length, clips by number, and a description.

python examples/add_a_data_source.py runs/stripes
"""

import dataclasses
import sys

import numpy as np

from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.config.experiment import Experiment
from paris_jax.config.files import load
from paris_jax.data.preparation import prepare
from paris_jax.data.sources.clip import Clip
from paris_jax.data.sources.source import ClipSource


@dataclasses.dataclass(frozen=True)
class Stripes(ClipSource):
    """Gray stripes that move; the same clip for the same number on every machine."""

    count: int = 40
    fps: float = 8.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Clip:
        speed, columns = 1 + index % 3, np.arange(20)
        video = np.stack([np.tile(columns + speed * frame, (20, 1)) % 8 * 32 for frame in range(8)])
        video = video[..., None].repeat(3, -1).astype(np.uint8)  # (T, H, W, 3)
        return Clip(f"stripes-{index}", video, self.fps, f"stripes moving at speed {speed}")

    def describe(self) -> dict:
        return {"name": "stripes", "count": self.count}


experiment = Experiment.from_config(load("examples/write_a_config.py:short"))
prepare(experiment, RunFolder(sys.argv[1]), clips=Stripes())
