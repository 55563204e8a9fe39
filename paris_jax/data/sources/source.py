"""The interface of every source of clips: items first, their clips on demand."""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Any

from paris_jax.artifacts.schemas import SourceItem
from paris_jax.config.sections import CurationSettings
from paris_jax.data.sources.clip import OFF, Clip, Dropped, Video


class Source(abc.ABC):
    """An indexed source: items first (files, tar shards, records), their clips on demand.

    Picklable, with the same items and clips on every machine.

    Attributes:
      isolated: whether clips are decoded by worker processes, which a broken file may take down.
      items_per_shard: items that go into one shard of the latent cache.
      dropped: items found unusable while they were listed.
    """

    isolated: bool = True
    items_per_shard: int = 512
    dropped: tuple[Dropped, ...] = ()

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of items."""

    @abc.abstractmethod
    def videos(self, index: int) -> Iterator[Video | Dropped]:
        """The videos of an item, not decoded yet, in order."""

    @abc.abstractmethod
    def item(self, index: int) -> SourceItem:
        """The state of an item, known without reading it: id, size, time of change, hash of its caption."""

    def identity(self) -> dict[str, Any]:
        """The identity of a source, apart from its items; by default its description."""
        return self.describe()

    def content(self, index: int) -> str:
        """Hash of an item's contents; "" where they cannot be read cheaply: its state decides alone."""
        return ""

    def caption(self, index: int) -> str | None:
        """The caption of an item's clips where it is known without reading them; None otherwise."""
        return None

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """The manifest's entry of the source."""


class ClipSource(Source):
    """A source whose items are single clips that are computed: subclasses have a length and `__getitem__`."""

    isolated = False

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Clip: ...

    def __iter__(self) -> Iterator[Clip]:
        return (self[index] for index in range(len(self)))

    def videos(self, index: int) -> Iterator[Video | Dropped]:
        yield Computed(self, index)

    def item(self, index: int) -> SourceItem:
        return SourceItem(str(index))


@dataclasses.dataclass(frozen=True)
class Computed:
    """The clip of an item of a ClipSource."""

    source: ClipSource
    index: int

    @property
    def id(self) -> str:
        return f"item {self.index}"

    def clips(self, first: int = 0, curation: CurationSettings = OFF) -> Iterator[tuple[int, Clip | Dropped]]:
        yield 0, self.source[self.index]
