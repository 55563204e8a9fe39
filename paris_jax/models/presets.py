"""Every size of network in one table, and the functions that build them.

Parameter counts (of `channels=16, text 4096, pooled 768` for the large ones) are asserted by abstract evaluation in
tests/models/test_presets.py.
"""

import dataclasses
from typing import Any, Protocol

from paris_jax.checks import Problems
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    hidden: int
    heads: int
    double_blocks: int
    single_blocks: int
    rope_axes: tuple[int, int, int]
    theta: float = 1e4
    mlp_ratio: int = 4


NETWORKS = {
    # Five tokens a side: rotations that tell thousands of places apart would all look alike there, hence the small theta.
    "tiny": Preset(hidden=128, heads=2, double_blocks=1, single_blocks=1, rope_axes=(16, 24, 24), theta=20.0, mlp_ratio=3),
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


ROUTERS = {
    "tiny": RouterPreset(hidden=64, heads=1, blocks=2, rope_axes=(16, 24, 24), theta=20.0),
    "small": RouterPreset(hidden=256, heads=4, blocks=6, rope_axes=(16, 24, 24)),
    "b": RouterPreset(hidden=768, heads=12, blocks=12, rope_axes=(16, 24, 24)),  # DiT-B, as published
}


class Overrides(Protocol):
    """A preset's name and the fields that replace it; see `experiment.Network`."""

    preset: str
    hidden: int
    heads: int
    double_blocks: int
    single_blocks: int


def preset_of(chosen: Overrides) -> Preset:
    """The preset with its overrides."""
    given = {"hidden": chosen.hidden or None, "heads": chosen.heads or None}
    given |= {name: value for name in ("double_blocks", "single_blocks") if (value := getattr(chosen, name)) >= 0}
    return dataclasses.replace(NETWORKS[chosen.preset], **{k: v for k, v in given.items() if v is not None})


def network_problems(chosen: Overrides) -> Problems:
    """What makes a preset with its overrides impossible."""
    preset = preset_of(chosen)
    if preset.hidden % preset.heads or preset.hidden // preset.heads != sum(preset.rope_axes):
        head = sum(preset.rope_axes)
        yield (
            f"network: hidden={preset.hidden} over heads={preset.heads} is not {head} a head, the width that preset "
            f"{chosen.preset!r} gives its positions; use hidden = {head} * heads, for example hidden={head * preset.heads}"
        )
    if preset.double_blocks + preset.single_blocks < 1:
        yield "network: double_blocks and single_blocks are both 0; at least one block is needed"


def network_config(chosen: Overrides, **given: Any) -> DiTConfig:
    """A preset with its overrides, for a latent and text encoder given as `channels`, `text_width`, `pooled_width`."""
    return DiTConfig(**dataclasses.asdict(preset_of(chosen)), **given)


def router_config(name: str, **given: Any) -> RouterConfig:
    """A router preset for a latent, text encoder and number of clusters."""
    return RouterConfig(**dataclasses.asdict(ROUTERS[name]), **given)
