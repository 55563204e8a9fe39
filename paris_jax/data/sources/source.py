"""Sources of clips, by the name in the `data` section of a config."""

from typing import Any, Protocol

from paris_jax.data.sources.clip import Clip
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.errors import UserError, nearest


class Source(Protocol):
    """An indexed source of clips: picklable, with the same clip at each index on every machine."""

    @property
    def fps(self) -> float: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...

    def describe(self) -> dict[str, Any]: ...


def source(data: Any) -> Source:
    """Returns the source that the `data` section of an experiment names; raises UserError if it is unusable."""
    if data.source == "shapes":
        return ShapesSource(data.seed, data.num_clips, data.num_frames, data.height, data.width, data.fps)
    if data.source == "folder":
        from paris_jax.data.sources.folder import FolderSource

        folder = FolderSource.open(data.path, data.num_frames, data.height, data.width, data.fps)
        return folder.first(data.num_clips) if data.num_clips else folder
    raise UserError(
        f"data.source={data.source!r}: must be shapes or folder{nearest(data.source, ('shapes', 'folder'))}"
    )
