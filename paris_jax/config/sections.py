"""Config sections of the data and of the evaluation: clips, codec, text encoder, features, clustering, scores."""

import dataclasses
import typing
from typing import Literal

from paris_jax.config import checks, fields
from paris_jax.config.checks import Problems
from paris_jax.config.fields import setting

SourceName = Literal["shapes", "folder", "tfds", "webdataset"]
Hdr = Literal["drop", "tonemap"]
Flip = Literal["off", "on", "forced"]
CodecName = Literal["pixels", "hunyuan"]
Posterior = Literal["mean", "sample"]
TextEncoderName = Literal["words", "minilm", "t5+clip"]
FeaturesName = Literal["statistics", "dinov2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The clips."""

    source: str = setting(
        "shapes",
        "shapes: embedded, procedural; folder: videos and captions; tfds: TensorFlow Datasets; webdataset: tar shards",
        choices=SourceName,
    )
    path: str = setting(
        "",
        "folder: directory of videos; tfds: name or directory of a prepared builder; webdataset: directory or pattern "
        "of tar shards, local or gs://",
    )
    split: str = setting("train", "tfds: the split")
    captions: str = setting("", "folder: caption table, relative to path; '' for captions.* and metadata.* in it")
    video_column: str = setting(
        "", "column of the files' names, feature of the frames; '' for file, path, video, video_path or file_name"
    )
    caption_column: str = setting("", "column, field or feature of the captions; '' for caption, text or prompt")
    caption_template: str = setting("", "tfds: caption with features in braces, such as 'a video of {label}'")
    num_clips: int = setting(4096, "shapes: clips to draw; other sources: maximum, 0 for all", at_least=0)
    num_frames: int = setting(8, "frames per clip; 1 trains a network of images", at_least=1)
    height: int = setting(20, "pixels", at_least=1)
    width: int = setting(20, "pixels", at_least=1)
    fps: float = setting(8.0, "frames per second", above=0)
    seed: int = fields.seed()
    cond_images: bool = setting(
        False, "also encode each clip's first and last frame as images, as image-to-video is given them"
    )
    heldout_fraction: float = setting(
        0.05, "fraction of the videos held out before clustering, never trained on", at_least=0.0, at_most=0.5
    )
    validation_share: float = setting(
        0.3,
        "share of the held-out videos that settings are tuned on (validation); the others are reported on (test)",
        at_least=0.0,
        at_most=0.9,
    )

    hdr: str = setting("drop", "video in PQ or HLG: drop it, or tonemap it to SDR", choices=Hdr)
    alpha_background: tuple[int, int, int] = setting(
        (0, 0, 0), "colour (R, G, B) below transparent pixels", at_least=0, at_most=255
    )
    max_dropped_share: float = setting(
        0.05, "share of the clips and files that may be unusable before prepare refuses", at_least=0.0, at_most=1.0
    )
    decode_seconds: float = setting(120.0, "time limit for decoding one clip", above=0)
    decode_memory_mb: int = setting(4096, "memory limit of a decoding process, in MB", at_least=64)

    def problems(self) -> Problems:
        if self.source in typing.get_args(SourceName)[1:] and not self.path:
            yield f"path is empty; source {self.source!r} needs the place of its videos"
        if self.source == "shapes" and self.num_clips == 0:
            yield from checks.at_least(1, num_clips=self.num_clips)
        yield from fields.problems_of(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationSettings:
    """Which clips are cut from videos and kept. Clips that are left out are listed as curated, not as faults."""

    stride_frames: int = setting(0, "frames from the start of a clip to that of the next; 0: end to end", at_least=0)
    scene_cuts: bool = setting(False, "no clip spans a cut between scenes (extra curation: PySceneDetect)")
    scene_threshold: float = setting(27.0, "change of content between two frames that is a cut", above=0)
    min_side: int = setting(0, "pixels of a video's shorter side, as displayed", at_least=0)
    min_seconds: float = setting(0.0, "duration of a video", at_least=0)
    min_motion: float = setting(0.0, "mean change of a pixel from frame to frame, in levels of 255", at_least=0)
    min_brightness: float = setting(0.0, "mean level of a clip", at_least=0, at_most=255)
    max_brightness: float = setting(255.0, "mean level of a clip", at_least=0, at_most=255)
    min_caption_words: int = setting(0, "words of a caption", at_least=0)
    max_caption_words: int = setting(0, "words of a caption; 0 for any number", at_least=0)
    near_duplicate_bits: int = setting(
        -1,
        "clips whose perceptual hashes (192 bits) differ in at most so many are one; -1: all stay",
        at_least=-1,
        at_most=11,
    )
    horizontal_flip: str = setting(
        "off", "on: also each clip mirrored, refused where a caption names left or right; forced: anyway", choices=Flip
    )

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
        if self.min_brightness > self.max_brightness:
            yield f"min_brightness={self.min_brightness}: must be at most max_brightness={self.max_brightness}"
        if self.max_caption_words and self.min_caption_words > self.max_caption_words:
            most = self.max_caption_words
            yield f"min_caption_words={self.min_caption_words}: must be at most max_caption_words={most}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """Video to latent. `pixels` packs blocks of time x height x width into channels, without loss.

    `hunyuan` is HunyuanVideo's causal VAE, 4 x 8 x 8.
    """

    name: str = setting("pixels", "the codec", choices=CodecName)
    time: int = setting(2, "frames per latent frame", at_least=1)
    height: int = setting(2, "pixel rows per latent row", at_least=1)
    width: int = setting(2, "pixel columns per latent column", at_least=1)
    weights: str = setting("", "hunyuan: folder of its weights")
    posterior: str = setting("mean", "hunyuan: latents are the mean of the posterior, or a sample", choices=Posterior)

    @property
    def first_frames(self) -> int:
        """Frames at the start that are encoded on their own: one for a causal VAE."""
        return 1 if self.name == "hunyuan" else 0

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
        blocks = self.time, self.height, self.width
        if self.name == "hunyuan" and blocks != (4, 8, 8):
            yield f"time, height, width={blocks}: hunyuan has (4, 8, 8)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Caption to text tokens and a pooled text embedding."""

    name: str = setting(
        "words", "words: frozen table; minilm: optional package; t5+clip: published weights", choices=TextEncoderName
    )
    width: int = setting(64, "words: width of the table; the others have their own", at_least=8)
    max_tokens: int = setting(24, "longest text, in tokens", at_least=1)
    pad_to_max_tokens: bool = setting(False, "t5+clip: pad every text to max_tokens and attend to all, as FLUX.1")
    suffix: str = setting("", "t5+clip: words after every text, such as '24 FPS. 4 motion score.'")
    t5: str = setting("", "t5+clip: folder of T5's weights and tokenizer, as Hugging Face publishes them")
    clip: str = setting("", "t5+clip: folder of CLIP's weights and tokenizer")

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
        if self.pad_to_max_tokens and self.name != "t5+clip":
            yield f"pad_to_max_tokens=True: text.name={self.name!r} has its texts at their true length; leave it out"
        if self.suffix and self.name != "t5+clip":
            yield f"suffix={self.suffix!r}: text.name={self.name!r} has none; leave it out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Clip to the feature vector that is clustered."""

    name: str = setting("statistics", "statistics: colours, edges, motion; dinov2: published", choices=FeaturesName)
    weights: str = setting("", "dinov2: folder of its weights")

    def problems(self) -> Problems:
        yield from fields.problems_of(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusteringSettings:
    """Clips to clusters, one expert each."""

    num_clusters: int = setting(3, "clusters, and so experts", at_least=1)
    fine_clusters: int = setting(0, "k-means in two stages: this many, then merged; 0: one stage", at_least=0)
    iterations: int = setting(50, "iterations of k-means", at_least=1)
    restarts: int = setting(8, "runs of k-means, of which the best is kept", at_least=1)
    batch_size: int = setting(
        0, "clips per mini-batch of k-means, read from disk; 0: exact k-means, with all features in memory", at_least=0
    )
    balance_tolerance: float = setting(
        0.0,
        "above 0: clusters of equal size, within this fraction of it, such as 0.05; 0: natural sizes",
        at_least=0.0,
        at_most=1.0,
    )
    seed: int = fields.seed()

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
        if self.fine_clusters and self.fine_clusters < self.num_clusters:
            yield f"fine_clusters={self.fine_clusters}: must be 0 or at least num_clusters={self.num_clusters}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How the ensemble and the monolith are compared."""

    num_clips: int = setting(96, "held-out prompts, the same for both models", at_least=2)
    num_loss_clips: int = setting(192, "held-out clips whose flow loss is measured", at_least=2)
    loss_timesteps: int = setting(8, "timesteps per clip, one in each of as many bins", at_least=1)
    num_shown: int = setting(12, "videos side by side in the report", at_least=1)
    seed: int = fields.seed()

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
