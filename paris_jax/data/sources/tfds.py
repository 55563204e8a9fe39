"""TensorFlow Datasets as a source of clips: any builder with a video feature whose data are prepared as array_record.

Works without TensorFlow where the builder's features do: tensors, texts, class labels and sequences of images.
"""

import dataclasses
import functools
import hashlib
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paris_jax.artifacts.schemas import SourceItem
from paris_jax.config.sections import CurationSettings
from paris_jax.data import video
from paris_jax.data.decoding.footage import Frame
from paris_jax.data.sources.captions import CAPTION_COLUMNS
from paris_jax.data.sources.clip import OFF, Clip, Dropped, Video
from paris_jax.data.sources.source import Source
from paris_jax.data.sources.video_file import Cutting, clip_id
from paris_jax.errors import UserError, first_line

VIDEO_FEATURES = ("video", "image_sequence")  # preferred where several features are videos
EXTRA = "pip install 'paris-jax[tfds]', which has TensorFlow"


@dataclasses.dataclass(frozen=True)
class Builder:
    """A prepared data set: the name of its builder or the directory of its files, and a split."""

    name: str
    split: str

    def load(self) -> tuple[Any, Any]:
        """Its builder and its examples.

        Raises:
          UserError: no such data set, split or file, data that are not prepared as array_record, no TensorFlow.
        """
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.registered import DatasetNotFoundError

        try:
            builder = self._builder(tfds)
            return builder, builder.as_data_source(split=self.split)
        except ImportError as error:
            raise UserError(
                f"data.path={self.name}: a feature of this builder needs a package that is missing "
                f"({first_line(error)[:200]}); {EXTRA}"
            ) from error
        except DatasetNotFoundError as error:
            raise UserError(
                f"data.path={self.name}: tensorflow-datasets knows no such builder, and it is not the directory of a "
                "prepared one; give the name of a builder, or the directory that holds dataset_info.json"
            ) from error
        except (NotImplementedError, AssertionError, ValueError, FileNotFoundError, OSError) as error:
            name = self.name.split("/")[0]
            raise UserError(
                f"data.path={self.name}, data.split={self.split!r}: cannot be read ({first_line(error)[:300]}); "
                f"prepare it as array_record: tfds build {name} --file_format=array_record, or give another split"
            ) from error

    def _builder(self, tfds: Any) -> Any:
        if os.path.isdir(self.name) or "://" in self.name:
            return tfds.builder_from_directory(self.name)
        module = f"tensorflow_datasets.video.{self.name.split('/')[0].split(':')[0]}"
        try:
            importlib.import_module(module)  # registers it: tensorflow-datasets imports these lazily
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
        return tfds.builder(self.name)


@functools.lru_cache(maxsize=4)
def _examples(builder: Builder) -> tuple[Any, Any]:
    """A builder and its examples, opened once in each process."""
    return builder.load()


@dataclasses.dataclass(frozen=True)
class Features:
    """Which features of an example are its video and its caption.

    Attributes:
      video: name of the frames, (T, H, W, 1 or 3) uint8; dots lead inside of dictionaries.
      caption: name of a text or class label; "" with a template.
      template: caption with names of features in braces.
      labels: names of the classes of each class label.
    """

    video: str
    caption: str
    template: str
    labels: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, features: Any, data: Any) -> "Features":
        """Chooses the features that the config names, or the only ones that fit.

        Raises:
          UserError: none fits, or several; names them.
        """
        kinds = dict(sorted(_flat(features)))
        labels = {name: tuple(kind.names) for name, kind in kinds.items() if getattr(kind, "names", None)}
        shapes, dtypes = dict(sorted(_flat_values(features.shape))), dict(_flat_values(features.np_dtype))
        videos = [n for n, shape in shapes.items() if len(shape) == 4 and shape[-1] in (1, 3) and _is_uint8(dtypes[n])]
        texts = [name for name, kind in kinds.items() if type(kind).__name__ == "Text"]
        wanted = _choose(data.path, "video", videos, data.video_column, VIDEO_FEATURES, "data.video_column", shapes)
        if data.caption_template:
            for name in re.findall(r"\{([^{}]*)\}", data.caption_template):
                if name not in kinds:
                    raise UserError(
                        f"data.caption_template={data.caption_template!r}: {data.path} has no feature {name!r}; it has "
                        f"{', '.join(kinds)}"
                    )
            return cls(wanted, "", data.caption_template, labels)
        named = [*texts, *labels]
        usual = (*CAPTION_COLUMNS, *texts[:1], "label")
        hint = "data.caption_column, or data.caption_template='a video of {label}'"
        caption = _choose(data.path, "caption", named, data.caption_column, usual, hint, kinds)
        return cls(wanted, caption, "", labels)

    def text(self, example: Mapping[str, Any]) -> str:
        """The caption of an example."""
        if not self.template:
            return self._words(example, self.caption)
        return re.sub(r"\{([^{}]*)\}", lambda match: self._words(example, match[1]), self.template)

    def _words(self, example: Mapping[str, Any], name: str) -> str:
        value = _at(example, name)
        if name in self.labels:
            return self.labels[name][int(value)].replace("_", " ")
        value = value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)

    def attributes(self, example: Mapping[str, Any]) -> dict[str, str]:
        """The classes of an example."""
        return {name: names[int(_at(example, name))] for name, names in self.labels.items() if "." not in name}


def _choose(
    path: str, what: str, found: list[str], named: str, usual: tuple[str, ...], field: str, every: Mapping[str, Any]
) -> str:
    if named:
        if named in every:
            return named
        raise UserError(f"{field.split(',')[0]}={named!r}: {path} has no such feature; it has {', '.join(every)}")
    preferred = [name for name in usual if name in found]
    if preferred or len(found) == 1:
        return (preferred or found)[0]
    listed = f"several features ({', '.join(found)})" if found else f"no feature (there are {', '.join(every)})"
    raise UserError(f"data.path={path}: {listed} may be the {what}; name it with {field}")


def _flat(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and kinds of all features, also of those in dictionaries and in sequences of dictionaries."""
    inside: Any = features if hasattr(features, "keys") else getattr(features, "feature", None)
    if not hasattr(inside, "keys"):
        yield prefix, features
        return
    for name in inside.keys():  # noqa: SIM118, no dictionary
        yield from _flat(inside[name], f"{prefix}.{name}" if prefix else name)


def _flat_values(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for name in values:
            yield from _flat_values(values[name], f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix, values


def _at(example: Any, name: str) -> Any:
    for part in name.split("."):
        example = example[part]
    return example


def _is_uint8(dtype: Any) -> bool:
    return getattr(dtype, "name", str(dtype)).endswith("uint8") or dtype == np.uint8


@dataclasses.dataclass(frozen=True)
class TfdsSource(Source):
    """Consecutive clips of every example of a split; its frames are assumed to be at the clips' frame rate."""

    builder: Builder
    name: str  # with config and version
    count: int
    features: Features
    cutting: Cutting
    files: str  # hash of the split's files

    @classmethod
    def open(cls, data: Any) -> "TfdsSource":
        """Opens a prepared builder; raises UserError where it cannot be read, or its features do not fit."""
        builder = Builder(data.path, data.split)
        info, examples = _examples(builder)
        features = Features.of(info.info.features, data)
        if len(examples):
            try:
                examples[0]
            except ImportError as error:
                raise UserError(
                    f"data.path={data.path}: its features need a package that is missing "
                    f"({first_line(error)[:200]}); {EXTRA}"
                ) from error
            except Exception:  # a broken example is dropped in its turn
                pass
        name = info.info.full_name.replace("/", "-")
        return cls(builder, name, len(examples), features, Cutting.of(data), _files(str(info.data_dir), data.split))

    def __len__(self) -> int:
        return self.count

    def videos(self, index: int) -> Iterator[Video | Dropped]:
        yield Example(f"{self.name}-{self.builder.split}-{index:08d}", self, index)

    def item(self, index: int) -> SourceItem:
        return SourceItem(f"{self.name}-{self.builder.split}-{index:08d}", self.files)

    def identity(self) -> dict[str, Any]:
        return {"name": "tfds", "builder": self.name, "split": self.builder.split}

    def describe(self) -> dict[str, Any]:
        return {"name": "tfds", "builder": self.name, "split": self.builder.split, "examples": self.count}


def _files(folder: str, split: str) -> str:
    """A hash of the sizes of a data set's files and of their description; "" where they are not local."""
    root = Path(folder)
    if "://" in folder or not root.is_dir():
        return ""
    sizes = [(path.name, path.stat().st_size) for path in sorted(root.iterdir()) if path.is_file()]
    described = [path.read_bytes() for path in sorted(root.glob("*.json"))]  # with the checksums of the shards
    return hashlib.sha256(repr((split, sizes, described)).encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class Example:
    """An example of a data set, cut into clips."""

    id: str
    source: TfdsSource
    index: int

    def clips(self, first: int = 0, curation: CurationSettings = OFF) -> Iterator[tuple[int, Clip | Dropped]]:
        _, examples = _examples(self.source.builder)
        try:
            example = examples[self.index]
            caption = " ".join(self.source.features.text(example).split())
            frames = np.asarray(_at(example, self.source.features.video))
            attributes = self.source.features.attributes(example)
        except Exception as error:  # whatever a damaged record makes the readers raise
            yield 0, Dropped(self.id, "read", "cannot be read", f"{type(error).__name__}: {first_line(error)[:300]}")
            return
        if not caption:
            yield 0, Dropped(self.id, "read", "has no caption")
            return
        cutting = self.source.cutting
        cutter = cutting.cutter(first, curation)
        if len(frames) < cutting.num_frames:
            detail = f"{len(frames)} frames of {cutting.num_frames}"
            yield 0, Dropped(self.id, "decode", "is shorter than one clip", detail)

        def scaled() -> Iterator[Frame]:
            for position in range(cutter.instant, len(frames)):
                frame = frames[position]
                frame = frame.repeat(3, -1) if frame.shape[-1] == 1 else frame
                image = video.fit(frame, cutting.height, cutting.width)
                yield Frame(position / cutting.fps, 1 / cutting.fps, image, False)

        for window in cutter.cut(scaled(), cutting.height, cutting.width):
            assert window.frames is not None  # none is damaged
            name = clip_id(self.id, window.number)
            yield window.number, Clip(name, window.frames, cutting.fps, caption, attributes)
