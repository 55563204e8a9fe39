"""Sections of a config that describe the data: clips, codec, text encoder, features, clustering, evaluation."""

import dataclasses
from typing import Literal, get_args

from paris_jax.config import checks
from paris_jax.config.checks import Problems

CodecName = Literal["pixels", "hunyuan"]
TextEncoderName = Literal["words", "minilm", "t5+clip"]
FeaturesName = Literal["statistics", "dinov2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The clips."""

    source: str = "shapes"  # "shapes" (embedded, procedural) or "folder" (videos and captions in `path`)
    path: str = ""  # folder: directory of mp4, webm, gif files or frame folders, with captions
    num_clips: int = 4096  # shapes: clips to draw; folder: the most to take (0 = all)
    frames: int = 8
    height: int = 20  # pixels
    width: int = 20  # pixels
    fps: float = 8.0  # frames a second
    seed: int = 0
    heldout_fraction: float = 0.05  # set apart before clustering, never trained on

    def problems(self) -> Problems:
        yield from checks.choice("source", self.source, ("shapes", "folder"))
        if self.source == "folder" and not self.path:
            yield "path is empty; source 'folder' needs the directory of the videos"
        yield from checks.at_least(1 if self.source == "shapes" else 0, num_clips=self.num_clips)
        yield from checks.at_least(1, frames=self.frames, height=self.height, width=self.width)
        yield from checks.seed(seed=self.seed)
        yield from checks.above(0, fps=self.fps)
        yield from checks.between(0.0, 0.5, heldout_fraction=self.heldout_fraction)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """Video to latent. `pixels` packs time x height x width blocks into channels, without loss.

    `hunyuan` is HunyuanVideo's causal VAE, 4 x 8 x 8.
    """

    name: str = "pixels"
    time: int = 2
    height: int = 2
    width: int = 2
    weights: str = ""  # hunyuan: folder of its weights

    @property
    def first_frames(self) -> int:
        """Frames at the start that are encoded on their own: one for a causal VAE."""
        return 1 if self.name == "hunyuan" else 0

    def problems(self) -> Problems:
        yield from checks.choice("name", self.name, get_args(CodecName))
        yield from checks.at_least(1, time=self.time, height=self.height, width=self.width)
        blocks = self.time, self.height, self.width
        if self.name == "hunyuan" and blocks != (4, 8, 8):
            yield f"time, height, width={blocks}: hunyuan has (4, 8, 8)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Caption to token sequence and pooled vector."""

    name: str = "words"  # "words" (frozen table), "minilm" (optional package), "t5+clip" (published, from folders)
    width: int = 64  # of the frozen table; the others have their own
    max_tokens: int = 24
    padded: bool = False  # t5+clip: texts are filled up to max_tokens, and that is attended to, as FLUX.1 has it
    t5: str = ""  # t5+clip: folders of their weights and tokenizers, as Hugging Face publishes them
    clip: str = ""

    def problems(self) -> Problems:
        yield from checks.choice("name", self.name, get_args(TextEncoderName))
        yield from checks.at_least(8, width=self.width)
        yield from checks.at_least(1, max_tokens=self.max_tokens)
        if self.padded and self.name != "t5+clip":
            yield f"padded=True: text.name={self.name!r} has its texts at their true length; leave it out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Clip to the vector that is clustered."""

    name: str = "statistics"  # or "dinov2" (published)
    weights: str = ""  # dinov2: folder of its weights

    def problems(self) -> Problems:
        yield from checks.choice("name", self.name, get_args(FeaturesName))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusteringSettings:
    """Clips to clusters, one expert each."""

    num_clusters: int = 3
    fine_clusters: int = 0  # k-means in two stages (fine, then merged); 0 for one stage
    iterations: int = 50
    restarts: int = 8
    seed: int = 0

    def problems(self) -> Problems:
        yield from checks.at_least(
            1, num_clusters=self.num_clusters, iterations=self.iterations, restarts=self.restarts
        )
        yield from checks.seed(seed=self.seed)
        if self.fine_clusters and self.fine_clusters < self.num_clusters:
            yield f"fine_clusters={self.fine_clusters}: must be 0 or at least num_clusters={self.num_clusters}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How the arms are compared."""

    clips: int = 96  # held-out prompts, the same for every arm
    loss_clips: int = 192  # held-out clips whose flow loss is measured
    loss_times: int = 8  # times a clip, one in each bin
    shown: int = 12  # videos side by side in the report
    seed: int = 0

    def problems(self) -> Problems:
        yield from checks.at_least(2, clips=self.clips, loss_clips=self.loss_clips)
        yield from checks.at_least(1, loss_times=self.loss_times, shown=self.shown)
        yield from checks.seed(seed=self.seed)
