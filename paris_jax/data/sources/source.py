"""Sources of clips, by the name in the `data` section of a config."""

from typing import Any, Protocol

from paris_jax.data.sources.clip import Clip
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.errors import UserError, nearest


class Source(Protocol):
    """Clips by number. Picklable; the same clip for the same number on every machine."""

    @property
    def fps(self) -> float: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Clip: ...

    def describe(self) -> dict[str, Any]: ...


def source(data: Any) -> Source:
    """Returns the source that the `data` section of an experiment names; refuses what it cannot read."""
    if data.source == "shapes":
        return ShapesSource(data.seed, data.num_clips, data.num_frames, data.height, data.width, data.fps)
    if data.source == "folder":
        from paris_jax.data.sources.folder import FolderSource

        found = FolderSource.open(data.path, data.num_frames, data.height, data.width, data.fps)
        return found.first(data.num_clips) if data.num_clips else found
    raise UserError(
        f"data.source={data.source!r}: must be shapes or folder{nearest(data.source, ('shapes', 'folder'))}"
    )
