"""Provenance of prepared clips: the items they were made from, and changes of these since.

The marker beside each shard holds the config, the encoders' weights, the rules of decoding, and each item of the source
with its size and time, its caption's hash and its content's hash. Size and time are compared first, contents only where
they differ.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import ShardMarker, SourceItem
from paris_jax.data.sources.source import Source
from paris_jax.errors import UserError

TEXT = ("caption", "text encoder")  # kinds of change that leave latents and features as they are
NAMES = {"codec": "codec", "text": "text encoder", "features": "feature encoder"}


@dataclasses.dataclass
class Changes:
    """Changes since shards were written.

    Attributes:
      found: names of changed things, by kind: "caption" and "pixels" with ids of items, "codec" and others with what is
        different.
      added, gone: ids of items that are only there now, or were only there then.
      touched: whether sizes or times changed, and contents did not.
    """

    found: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    added: set[str] = dataclasses.field(default_factory=set)
    gone: set[str] = dataclasses.field(default_factory=set)
    touched: bool = False

    def add(self, kind: str, name: str) -> None:
        self.found.setdefault(kind, []).append(name)

    def __bool__(self) -> bool:
        return bool(self.found or self.added or self.gone)

    @property
    def is_text_only(self) -> bool:
        """Whether latents and features are still those of the source."""
        return bool(self) and not (self.added or self.gone) and all(kind in TEXT for kind in self.found)

    def merge(self, other: "Changes") -> None:
        """Adds the changes of another shard; an item that only moved between shards is neither new nor gone."""
        for kind, names in other.found.items():
            known = self.found.setdefault(kind, [])
            known += [name for name in names if name not in NAMES.values() or name not in known]
        moved = (self.added & other.gone) | (self.gone & other.added)
        self.added = (self.added | other.added) - moved
        self.gone = (self.gone | other.gone) - moved
        self.touched |= other.touched

    def __str__(self) -> str:
        sentences = {
            "caption": "{} captions changed ({})",
            "pixels": "{} videos changed in place ({})",
            "codec": "the weights of the codec changed",
            "text encoder": "the weights of the text encoder changed",
            "feature encoder": "the weights of the feature encoder changed",
            "decoding": "the rules of decoding changed ({1})",
            "source": "the source changed",
            "config": "the config changed",
        }
        found = [
            sentences[kind].format(len(names), _some(names)) for kind, names in sorted(self.found.items()) if names
        ]
        for number, text in ((self.added, "{} videos are new ({})"), (self.gone, "{} videos are gone ({})")):
            found += [text.format(len(number), _some(sorted(number)))] if number else []
        return ", ".join(found)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def read_items(source: Source, indices: Iterable[int]) -> tuple[SourceItem, ...]:
    """The items of a source as they are now, with their contents' hashes; none for clips that are computed."""
    if not source.isolated:
        return ()
    return tuple(with_content(source, index) for index in indices)


def with_content(source: Source, index: int) -> SourceItem:
    item = source.item(index)
    return SourceItem(item.id, item.state, item.caption, source.content(index))


def check_unchanged(items: Sequence[SourceItem], source: Source, indices: Sequence[int]) -> None:
    """Raises UserError for an item that changed while its clips were decoded."""
    for item, index in zip(items, indices, strict=source.isolated):
        now = source.item(index)
        if (now.state, now.caption) != (item.state, item.caption):
            raise UserError(
                f"{item.id} changed while it was read; run the same command again once nobody writes to the source"
            )


def trained_networks(run: RunFolder) -> list[str]:
    """The folders of the run's networks that were trained, or have begun to be."""
    experts = run.path / "experts"
    folders = [*(sorted(experts.iterdir()) if experts.exists() else ()), run.path / "router", run.path / "monolith"]
    parts = ("checkpoints", "export")
    return [str(f) for f in folders if any((f / part).exists() and any((f / part).iterdir()) for part in parts)]


def compare(
    marker: ShardMarker, origin: Mapping[str, Any], source: Source, indices: Sequence[int]
) -> tuple[Changes, tuple[SourceItem, ...]]:
    """Returns the changes since a shard was written, and its items with their present sizes and times.

    Args:
      marker: of the shard.
      origin: config, encoders, source and decoding as they are now.
      source, indices: the items that the shard would have now.
    """
    changes = Changes()
    _compare_origins(changes, marker.origin, origin)
    if not source.isolated:
        if marker.origin.get("indices") != origin["indices"]:
            changes.add("source", "source")
        return changes, ()
    then = {item.id: item for item in marker.items}
    now = []
    for index in indices:
        item = source.item(index)
        before = then.pop(item.id, None)
        if before is None:
            changes.added.add(item.id)
            continue
        if item.caption != before.caption:
            changes.add("caption", item.id)
        content = before.content
        if item.state != before.state:
            content = source.content(index)
            if content != before.content or not content:
                changes.add("pixels", item.id)
            else:
                changes.touched = True
        now.append(SourceItem(item.id, item.state, item.caption, content))
    changes.gone |= then.keys()
    return changes, tuple(now)


def _compare_origins(changes: Changes, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, known in NAMES.items():
        if (then.get("encoders") or {}).get(name) != now["encoders"][name]:
            changes.add(known, known)
    if then.get("decoding") != now["decoding"]:
        changes.add("decoding", f"{then.get('decoding')} -> {now['decoding']}")
    for name in ("config", "source"):
        key = {"config": "config_hash"}.get(name, name)
        if then.get(key) != now[key]:
            changes.add(name, name)
