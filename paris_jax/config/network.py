"""Network presets, and the config sections that choose one and override its sizes.

Parameter counts (of `channels=16, text 4096, pooled 768` for the large ones) are asserted by abstract evaluation in
tests/models/test_networks.py.
"""

import dataclasses
from typing import Literal

from paris_jax.config import fields
from paris_jax.config.checks import Problems
from paris_jax.config.fields import setting

Attention = Literal["joint", "factorised"]
Remat = Literal["none", "named", "full", "offload"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    hidden: int
    heads: int
    double_blocks: int
    single_blocks: int
    rope_axes: tuple[int, int, int]
    theta: float = 1e4
    mlp_ratio: int = 4


NETWORK_PRESETS = {
    # Measured: with five tokens per side, RoPE frequencies for thousands of positions are indistinguishable, hence the
    # small theta; a network of few blocks needs many heads.
    "tiny": Preset(hidden=112, heads=7, double_blocks=1, single_blocks=2, rope_axes=(4, 6, 6), theta=20.0, mlp_ratio=3),
    "small": Preset(hidden=384, heads=6, double_blocks=4, single_blocks=8, rope_axes=(16, 24, 24)),
    "base": Preset(hidden=768, heads=12, double_blocks=6, single_blocks=12, rope_axes=(16, 24, 24)),
    "large": Preset(hidden=1280, heads=20, double_blocks=8, single_blocks=16, rope_axes=(16, 24, 24)),
    "xl": Preset(hidden=2048, heads=16, double_blocks=12, single_blocks=24, rope_axes=(16, 56, 56)),
    "11b": Preset(hidden=3072, heads=24, double_blocks=19, single_blocks=38, rope_axes=(16, 56, 56)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterPreset:
    hidden: int
    heads: int
    blocks: int
    rope_axes: tuple[int, int, int]
    theta: float = 1e4


ROUTER_PRESETS = {
    "tiny": RouterPreset(hidden=64, heads=1, blocks=2, rope_axes=(16, 24, 24), theta=20.0),
    "small": RouterPreset(hidden=256, heads=4, blocks=6, rope_axes=(16, 24, 24)),
    "b": RouterPreset(hidden=768, heads=12, blocks=12, rope_axes=(16, 24, 24)),  # DiT-B, as published
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkSettings:
    """The network of the experts and the monolith: a preset, with fields to override."""

    preset: str = setting("tiny", "named sizes; see config/network.py", choices=NETWORK_PRESETS)
    hidden: int = setting(0, "width D; 0: the preset's", at_least=0)
    heads: int = setting(0, "attention heads; 0: the preset's", at_least=0)
    double_blocks: int = setting(-1, "double-stream blocks; -1: the preset's", at_least=-1)
    single_blocks: int = setting(-1, "single-stream blocks; -1: the preset's", at_least=-1)
    remat: str = setting("none", "activations that the backward pass recomputes (models.blocks.REMAT)", choices=Remat)
    attention: str = setting(
        "joint", "joint over space and time, or factorised into both, for long videos", choices=Attention
    )

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
        if self.preset in NETWORK_PRESETS:
            yield from self._size_problems()

    def _size_problems(self) -> Problems:
        preset = self.resolve()
        head = sum(preset.rope_axes)
        if preset.hidden != head * preset.heads:
            yield (
                f"hidden={preset.hidden} over heads={preset.heads} is not {head} a head, the width that preset "
                f"{self.preset!r} gives its positions; use {head} * heads, for example hidden={head * preset.heads}"
            )
        if preset.double_blocks + preset.single_blocks < 1:
            yield "double_blocks and single_blocks are both 0; at least one block is needed"

    def resolve(self) -> Preset:
        """The preset with its overrides."""
        overrides: dict[str, int] = {name: n for name in ("hidden", "heads") if (n := getattr(self, name)) > 0}
        overrides |= {name: n for name in ("double_blocks", "single_blocks") if (n := getattr(self, name)) >= 0}
        return dataclasses.replace(NETWORK_PRESETS[self.preset], **overrides)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterSettings:
    """The network of the router."""

    preset: str = setting("tiny", "named sizes; see config/network.py", choices=ROUTER_PRESETS)
    remat: str = setting("none", "as network.remat", choices=Remat)
    attention: str = setting("joint", "as network.attention", choices=Attention)

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
