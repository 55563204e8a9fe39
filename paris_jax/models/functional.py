"""Networks as pure functions of a nested dictionary of arrays.

A config describes a network; its parameters are plain data, so that jit, optax, Orbax and safetensors all see the same
tree, and a call has no overhead per module.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from paris_jax.config.network import ROUTER_PRESETS, NetworkSettings, RouterSettings
from paris_jax.models.dit import DiTConfig, SpatiotemporalDiT
from paris_jax.models.router import Router, RouterConfig

Params = dict[str, Any]
Config = DiTConfig | RouterConfig
BLOCKS = ("double_blocks", "single_blocks")  # of a DiT: stacks of layers


def _module(config: Config, rngs: nnx.Rngs) -> nnx.Module:
    return SpatiotemporalDiT(config, rngs) if isinstance(config, DiTConfig) else Router(config, rngs)


def init(config: Config, key: jax.Array) -> Params:
    """Initial float32 parameters."""
    return nnx.to_pure_dict(nnx.state(_module(config, nnx.Rngs(key)), nnx.Param))


@functools.lru_cache(maxsize=32)
def _structure(config: Config) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: _module(config, nnx.Rngs(0))), nnx.Param)


def abstract(config: Config) -> Params:
    """Shapes and dtypes of the parameters, without allocating them."""
    return nnx.to_pure_dict(_structure(config)[1])


def apply(config: Config, params: Params, *inputs: jax.Array | None, **named: jax.Array) -> jax.Array:
    """The network's output; see `SpatiotemporalDiT.__call__` and `Router.__call__` for the inputs.

    A config of any other type, such as an analytic velocity field, has its own `apply(params, *inputs)`, and the fields
    `prediction_type` and `cond_frames`.
    """
    if not isinstance(config, DiTConfig | RouterConfig):
        return config.apply(params, *inputs)
    graph, state = _structure(config)
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(*inputs, **named)


def apply_member(config: Config, stacks: Params, member: jax.Array, *inputs: jax.Array | None) -> jax.Array:
    """The output of one of several networks with the same config, their parameters stacked on a leading axis.

    `member` is a traced () int32. The blocks are read in place, layer by layer; the few parameters outside them are
    copied, which costs little time and memory compared to a forward pass.
    """
    params = {name: a if name in BLOCKS else jax.tree.map(lambda x: x[member], a) for name, a in stacks.items()}
    return apply(config, params, *inputs, **({"member": member} if isinstance(config, DiTConfig) else {}))


def count(config: Config) -> int:
    """The number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)))


def to_names(params: Params) -> dict[str, Any]:
    """Flat `a.b.c` names to leaves: the names of parameters in files."""
    return flatten_dict(params, sep=".")


def from_names(flat: dict[str, Any]) -> Params:
    return unflatten_dict(flat, sep=".")


def network_config(chosen: NetworkSettings, **fields: Any) -> DiTConfig:
    """The config of a preset with its overrides; `fields` are the others: `channels`, `text_width`, `pooled_width`."""
    return DiTConfig(**dataclasses.asdict(chosen.resolve()), attention=chosen.attention, **fields)


def router_config(chosen: RouterSettings, **fields: Any) -> RouterConfig:
    """The config of a router preset; `fields` are the others: `channels`, `pooled_width`, `clusters`."""
    return RouterConfig(**dataclasses.asdict(ROUTER_PRESETS[chosen.preset]), attention=chosen.attention, **fields)
