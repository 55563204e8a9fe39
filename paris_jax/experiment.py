"""The checked, typed view of a config: what an experiment is, field by field.

A config file returns an `ml_collections.ConfigDict` of the same nesting; `Experiment.from_config` turns it into frozen
dataclasses or refuses it by name. Everything after that may rely on the types and ranges stated here.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from paris_jax import checks, manifest
from paris_jax.checks import Problems
from paris_jax.encoders import codecs, features, text
from paris_jax.ensemble.settings import Sampling
from paris_jax.errors import Refused, nearest
from paris_jax.models.presets import Network, Router
from paris_jax.training.settings import ENGINE, Diffusion, Masks, Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
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
class Codec:
    """Video to latent. `pixels` packs time x height x width blocks into channels, without loss.

    `hunyuan` is HunyuanVideo's causal VAE, 4 x 8 x 8.
    """

    name: str = "pixels"
    time: int = 2
    height: int = 2
    width: int = 2
    weights: str = ""  # hunyuan: folder of its weights

    def problems(self) -> Problems:
        yield from checks.choice("name", self.name, codecs.SIZES)
        yield from checks.at_least(1, time=self.time, height=self.height, width=self.width)
        blocks = self.time, self.height, self.width
        if self.name == "hunyuan" and blocks != (4, 8, 8):
            yield f"time, height, width={blocks}: hunyuan has (4, 8, 8)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Caption to token sequence and pooled vector."""

    name: str = "words"  # "words" (frozen table), "minilm" (optional package), "t5+clip" (published, from folders)
    width: int = 64  # of the frozen table; the others have their own
    max_tokens: int = 24
    padded: bool = False  # t5+clip: texts are filled up to max_tokens, and that is attended to, as FLUX.1 has it
    t5: str = ""  # t5+clip: folders of their weights and tokenizers, as Hugging Face publishes them
    clip: str = ""

    def problems(self) -> Problems:
        yield from checks.choice("name", self.name, text.NAMES)
        yield from checks.at_least(8, width=self.width)
        yield from checks.at_least(1, max_tokens=self.max_tokens)
        if self.padded and self.name != "t5+clip":
            yield f"padded=True: text.name={self.name!r} has its texts at their true length; leave it out"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features:
    """Clip to the vector that is clustered."""

    name: str = "statistics"  # or "dinov2" (published)
    weights: str = ""  # dinov2: folder of its weights

    def problems(self) -> Problems:
        yield from checks.choice("name", self.name, features.NAMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
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
class Evaluation:
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


# Fields that do not decide what is learned: a job that goes on may change them.
# What training starts from is known by its hash, which parts carry.
UNTRAINED = {"training": (*ENGINE, "start"), "router_training": ENGINE, "network": ("remat",)}


# Fields that say where something lies on this machine; what lies there is known by its hash.
ELSEWHERE = {"codec": ("weights",), "text": ("t5", "clip"), "features": ("weights",)}

# Fields that came after the first run folders: while they are as it was before there was a choice, they do not count.
# So those folders are still those of their configs.
YOUNGER = {"network": {"attention": "joint"}, "router": {"attention": "joint"}, "text": {"padded": False}}

# The sections that decide the clips and their clusters.
DATA = ("data", "codec", "text", "features", "partition")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment, from clips to comparison."""

    name: str = "experiment"
    wandb: str = ""  # project on Weights & Biases that training tells its metrics to; "": none
    data: Data = Data()
    codec: Codec = Codec()
    text: Text = Text()
    features: Features = Features()
    partition: Partition = Partition()
    network: Network = Network()
    router: Router = Router()
    diffusion: Diffusion = Diffusion()
    masks: Masks = Masks()
    training: Training = Training()
    router_training: Training = Training()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()

    @classmethod
    def from_config(cls, config: Any) -> "Experiment":
        """Checks a ConfigDict (or nested dict) and returns it typed.

        Raises:
          Refused: names every unknown field, wrong type and impossible value at once.
        """
        values = config.to_dict() if hasattr(config, "to_dict") else config
        problems: list[str] = []
        experiment = _build(cls, values, "config", problems)
        if not problems:
            problems += [f"config.{p}" for p in experiment.problems()]
        if problems:
            raise Refused("The config is refused: " + "; ".join(problems))
        return experiment

    def problems(self) -> Problems:
        """What no section can see alone."""
        codec, data = self.codec, self.data
        for axis, size, first, factor in (
            ("frames", data.frames, codecs.SIZES[codec.name].first, codec.time),
            ("height", data.height, 0, codec.height * 2),
            ("width", data.width, 0, codec.width * 2),
        ):
            if (size - first) % factor:
                near = first + max(factor, round((size - first) / factor) * factor)
                more = f"{first} more than " if first else ""
                yield (
                    f"data.{axis}={size}: must be {more}a multiple of {factor} (codec and 2 x 2 packing), "
                    f"for example {near}"
                )
        if self.features.name == "statistics" and min(data.height, data.width) <= 2:  # 3 is no multiple of 2
            yield f"data.height, data.width={data.height}, {data.width}: features.name='statistics' needs at least 4"
        T = (data.frames - codecs.SIZES[codec.name].first) // codec.time + codecs.SIZES[codec.name].first
        if self.masks.kinds and T == 1:
            yield f"masks.{self.masks.kinds[0]} gives frames to clips of a single latent frame; leave masks.none alone"
        if self.router_training.objective != "velocity":
            yield f"router_training.objective={self.router_training.objective!r}: a router has no choice of objectives"
        if self.router_training.start:
            yield f"router_training.start={self.router_training.start!r}: a router starts from fresh parameters"
        if self.sampling.top_k > self.partition.num_clusters:
            yield (
                f"sampling.top_k={self.sampling.top_k}: must be at most "
                f"partition.num_clusters={self.partition.num_clusters}"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(T, H, W, C) of a clip's latent."""
        data = self.data
        return codecs.sizes(**dataclasses.asdict(self.codec)).latent_shape(data.frames, data.height, data.width)

    @property
    def text_widths(self) -> tuple[int, int]:
        """Widths of the text's tokens and of its pooled vector."""
        return text.widths(self.text.name, self.text.width, self.text.t5, self.text.clip)

    @property
    def encoders(self) -> dict[str, str]:
        """Folders of the published encoders that sampling needs, as `Ensemble.load` takes them."""
        named = {"vae": self.codec.weights, "t5": self.text.t5, "clip": self.text.clip}
        return {name: folder for name, folder in named.items() if folder}

    @property
    def data_hash(self) -> str:
        """Hash of what decides the clips and their clusters: what experts of one ensemble have in common."""
        return self._hash(DATA, ELSEWHERE)

    @property
    def hash(self) -> str:
        """Hash of everything that decides what is trained; the rest may change afterwards.

        That is sampling and evaluation, and how a job uses its slice: it may go on upon another one.
        """
        sections = [name for name in self.to_dict() if name not in ("name", "wandb", "sampling", "evaluation")]
        return self._hash(sections, UNTRAINED | ELSEWHERE)

    def _hash(self, sections: Iterable[str], without: Mapping[str, Iterable[str]]) -> str:
        """Hash of sections but for some fields of theirs."""
        kept = {section: dataclasses.asdict(getattr(self, section)) for section in sections}
        for section, fields in kept.items():
            left_out, before = without.get(section, ()), YOUNGER.get(section, {})
            same = [name for name, value in before.items() if fields[name] == value]
            kept[section] = {k: v for k, v in fields.items() if k not in (*left_out, *same)}
        return manifest.hash_text(manifest.canonical_json(kept))

    def settings_of(self, kind: str) -> Training:
        """How a role is trained: experts and monolith alike."""
        return self.router_training if kind == "router" else self.training

    def steps(self, kind: str) -> int:
        """Training steps of a role: the monolith gets the sum of the experts', so both arms cost the same."""
        if kind == "router":
            return self.router_training.steps
        return self.training.steps * (self.partition.num_clusters if kind == "monolith" else 1)


def default_config() -> ConfigDict:
    """Every field with its default, to change in a config file; a field that does not exist cannot be set."""
    return ConfigDict(Experiment().to_dict()).lock()


def _build(cls: type, values: Any, where: str, problems: list[str]) -> Any:
    """Builds dataclass `cls` from a nested dict, adding a sentence to `problems` for each thing that is wrong."""
    if not isinstance(values, dict):
        problems.append(f"{where}={values!r}: must be a group of fields")
        return cls()
    hints = typing.get_type_hints(cls)
    built = {}
    for name, value in values.items():
        if name not in hints:
            problems.append(f"{where}.{name} is unknown; allowed are {', '.join(sorted(hints))}{nearest(name, hints)}")
        elif dataclasses.is_dataclass(hints[name]):
            built[name] = _build(hints[name], value, f"{where}.{name}", problems)
        else:
            built[name] = _typed(hints[name], value, f"{where}.{name}", problems)
    made = cls(**{k: v for k, v in built.items() if v is not None})
    if cls is not Experiment:
        problems += [f"{where}.{p}" for p in made.problems()]
    return made


def _typed(kind: type | types.UnionType, value: Any, where: str, problems: list[str]) -> Any:
    """Returns `value` as `kind`; an int may stand for a float, nothing else is converted."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        problems.append(f"{where}={value!r}: must be {'an' if kind is int else 'a'} {getattr(kind, '__name__', kind)}")
        return None
    if kind is float and not math.isfinite(value):
        problems.append(f"{where}={value!r}: must be finite")
        return None
    return value
