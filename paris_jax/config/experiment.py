"""The checked, typed view of a config: an experiment, field by field.

A config file returns an `ml_collections.ConfigDict` of the same nesting; `Experiment.from_config` turns it into frozen
dataclasses or refuses it by name. Everything after that may rely on the types and ranges stated here.
"""

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from paris_jax.config import hashing
from paris_jax.config.checks import Problems
from paris_jax.config.network import NetworkSettings, RouterSettings
from paris_jax.config.sampling import SamplingSettings
from paris_jax.config.sections import (
    ClusteringSettings,
    CodecSettings,
    CurationSettings,
    DataSettings,
    EvaluationSettings,
    FeatureSettings,
    TextSettings,
)
from paris_jax.config.training import EXECUTION_FIELDS, DiffusionSettings, MaskSettings, TrainingSettings
from paris_jax.errors import UserError, nearest

# Fields without influence on the trained weights: a resumed job may change them.
# Initial weights are known by their hash, which exported networks carry.
UNHASHED_FIELDS = {
    "training": (*EXECUTION_FIELDS, "init_from"),
    "router_training": EXECUTION_FIELDS,
    "network": ("remat",),
    "router": ("remat",),
}
# Limits within which clips are made; clips lost to them are listed with the data.
LIMIT_FIELDS = {"data": ("max_dropped_share", "decode_seconds", "decode_memory_mb")}
# Paths on this machine; their contents are known by hash.
LOCATION_FIELDS = {"codec": ("weights",), "text": ("t5", "clip"), "features": ("weights",)}
# Fields that came after the first run folders: while they are as it was before there was a choice, they do not count.
# So those folders are still those of their configs.
LATER_FIELDS = {
    "data": {
        "cond_images": False,
        "captions": "",
        "video_column": "",
        "caption_column": "",
        "caption_template": "",
        "split": "train",
        "hdr": "drop",
        "alpha_background": (0, 0, 0),
        "validation_share": 0.0,
    },
    "codec": {"posterior": "mean"},
    "clustering": {"batch_size": 0, "balance_tolerance": 0.0},
    "network": {"attention": "joint"},
    "router": {"attention": "joint"},
    "text": {"pad_to_max_tokens": False, "suffix": ""},
}
# The sections that decide the prepared clips; their fields that decide only the held-out clips; the sections that
# decide the clusters, too.
PREPARED_SECTIONS = ("data", "curation", "codec", "text", "features")
SPLIT_FIELDS = {"data": ("heldout_fraction", "validation_share")}
DATA_SECTIONS = (*PREPARED_SECTIONS, "clustering")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment, from clips to comparison."""

    name: str = "experiment"
    wandb_project: str = ""  # project on Weights & Biases that training tells its metrics to; "": none
    data: DataSettings = DataSettings()
    curation: CurationSettings = CurationSettings()
    codec: CodecSettings = CodecSettings()
    text: TextSettings = TextSettings()
    features: FeatureSettings = FeatureSettings()
    clustering: ClusteringSettings = ClusteringSettings()
    network: NetworkSettings = NetworkSettings()
    router: RouterSettings = RouterSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    masks: MaskSettings = MaskSettings()
    training: TrainingSettings = TrainingSettings()
    router_training: TrainingSettings = TrainingSettings()
    sampling: SamplingSettings = SamplingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @classmethod
    def from_config(cls, config: Any) -> "Experiment":
        """Checks a ConfigDict (or nested dict) and returns it typed.

        Raises:
          UserError: names every unknown field, wrong type and impossible value at once.
        """
        values = config.to_dict() if hasattr(config, "to_dict") else config
        problems: list[str] = []
        experiment = _build(cls, values, "config", problems)
        if not problems:
            problems += [f"config.{p}" for p in experiment.problems()]
        if problems:
            raise UserError("Invalid config: " + "; ".join(problems))
        return experiment

    def problems(self) -> Problems:
        """Checks across sections."""
        codec, data = self.codec, self.data
        for axis, size, first, factor in (
            ("num_frames", data.num_frames, codec.first_frames, codec.time),
            ("height", data.height, 0, codec.height * 2),
            ("width", data.width, 0, codec.width * 2),
        ):
            image = axis == "num_frames" and size == 1
            if (size - first) % factor and not image:
                near = first + max(factor, round((size - first) / factor) * factor)
                more = f"{first} more than " if first else ""
                yield (
                    f"data.{axis}={size}: must be {more}a multiple of {factor} (codec and 2 x 2 packing), "
                    f"for example {near}"
                )
        if self.features.name == "statistics" and min(data.height, data.width) <= 2:  # 3 is no multiple of 2
            yield f"data.height, data.width={data.height}, {data.width}: features.name='statistics' needs at least 4"
        T = max((data.num_frames - codec.first_frames) // codec.time + codec.first_frames, 1)
        if self.masks.kinds and T == 1:
            yield f"masks.{self.masks.kinds[0]} gives frames to clips of a single latent frame; leave masks.none alone"
        if self.masks.image_kinds and not data.cond_images:
            yield (
                f"masks.{self.masks.image_kinds[0]} needs data.cond_images=True: sampling is given an encoded image, "
                "not a latent of the clip"
            )
        if self.router_training.prediction_type != "velocity":
            yield (
                f"router_training.prediction_type={self.router_training.prediction_type!r}: a router has no choice "
                "of objectives"
            )
        if self.router_training.init_from:
            yield f"router_training.init_from={self.router_training.init_from!r}: a router starts from fresh parameters"
        if self.sampling.top_k > self.clustering.num_clusters:
            yield (
                f"sampling.top_k={self.sampling.top_k}: must be at most "
                f"clustering.num_clusters={self.clustering.num_clusters}"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def encoders(self) -> dict[str, str]:
        """Folders of the published encoders that sampling needs, as `Ensemble.load` takes them."""
        named = {"vae": self.codec.weights, "t5": self.text.t5, "clip": self.text.clip}
        return {name: folder for name, folder in named.items() if folder}

    @property
    def prepared_hash(self) -> str:
        """Hash of the fields that decide the prepared clips, which several partitions and trainings may share."""
        without = {"data": (*LIMIT_FIELDS["data"], *SPLIT_FIELDS["data"])}
        return self._hash(PREPARED_SECTIONS, LOCATION_FIELDS | without)

    @property
    def data_hash(self) -> str:
        """Hash of the fields that decide the clips and their clusters, which experts of one ensemble have in common."""
        return self._hash(DATA_SECTIONS, LOCATION_FIELDS | LIMIT_FIELDS)

    @property
    def hash(self) -> str:
        """Hash of the fields that decide the trained weights; the rest may change afterwards.

        That is sampling and evaluation, and how a job uses its slice: it may go on upon another one.
        """
        sections = [name for name in self.to_dict() if name not in ("name", "wandb_project", "sampling", "evaluation")]
        return self._hash(sections, UNHASHED_FIELDS | LOCATION_FIELDS | LIMIT_FIELDS)

    def _hash(self, sections: Iterable[str], without: Mapping[str, Iterable[str]]) -> str:
        """Hash of sections but for some fields of theirs."""
        kept = {section: dataclasses.asdict(getattr(self, section)) for section in sections}
        for section, fields in kept.items():
            left_out, before = without.get(section, ()), LATER_FIELDS.get(section, {})
            same = [name for name, value in before.items() if fields[name] == value]
            kept[section] = {k: v for k, v in fields.items() if k not in (*left_out, *same)}
        if kept.get("curation") == dataclasses.asdict(CurationSettings()):  # a section that came later
            del kept["curation"]
        return hashing.hash_text(hashing.canonical_json(kept))

    def settings_of(self, kind: str) -> TrainingSettings:
        """How a role is trained: experts and monolith alike."""
        return self.router_training if kind == "router" else self.training

    def steps(self, kind: str) -> int:
        """Training steps of a role: the monolith gets the sum of the experts', so that both models cost the same."""
        if kind == "router":
            return self.router_training.steps
        return self.training.steps * (self.clustering.num_clusters if kind == "monolith" else 1)


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


def _typed(kind: Any, value: Any, where: str, problems: list[str]) -> Any:
    """Returns `value` as `kind`; an int may stand for a float and a list for a tuple, nothing else is converted."""
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            problems.append(f"{where}={value!r}: must be {len(kinds)} numbers, such as 0.0,1.0")
            return None
        items = [_typed(each, one, where, problems) for each, one in zip(kinds, value, strict=True)]
        return None if None in items else tuple(items)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        problems.append(f"{where}={value!r}: must be {'an' if kind is int else 'a'} {getattr(kind, '__name__', kind)}")
        return None
    if kind is float and not math.isfinite(value):
        problems.append(f"{where}={value!r}: must be finite")
        return None
    return value
