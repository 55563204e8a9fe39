"""Sources of clips, by the name in the `data` section of a config."""

from collections.abc import Callable
from typing import Any

from paris_jax.data.sources.source import Source
from paris_jax.errors import UserError, nearest


def _shapes(data: Any) -> Source:
    from paris_jax.data.sources.shapes import ShapesSource

    return ShapesSource(data.seed, data.num_clips, data.num_frames, data.height, data.width, data.fps)


def _folder(data: Any) -> Source:
    from paris_jax.data.sources.folder import FolderSource

    return FolderSource.open(data)


def _tfds(data: Any) -> Source:
    from paris_jax.data.sources.tfds import TfdsSource

    return TfdsSource.open(data)


def _webdataset(data: Any) -> Source:
    from paris_jax.data.sources.webdataset import WebDatasetSource

    return WebDatasetSource.open(data)


SOURCES: dict[str, Callable[[Any], Source]] = {
    "shapes": _shapes,
    "folder": _folder,
    "tfds": _tfds,
    "webdataset": _webdataset,
}


def source(data: Any) -> Source:
    """Returns the source that the `data` section of an experiment names; raises UserError if it is unusable."""
    if data.source not in SOURCES:
        raise UserError(
            f"data.source={data.source!r}: must be one of {', '.join(SOURCES)}{nearest(data.source, SOURCES)}"
        )
    return SOURCES[data.source](data)
