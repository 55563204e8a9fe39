"""Every factorisation of eight devices over the mesh's axes gives the networks, gradients and samples of one device.

XLA's partitioner has computed other networks, without an error, where data, fsdp and tensor were all above 1.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax.diffusion.guidance import Strength
from paris_jax.ensemble import device_placement, sparse_velocity
from paris_jax.ensemble.conditioning import Condition, EncodedText
from paris_jax.ensemble.routing import Routing
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig
from paris_jax.models.sharding_rules import MESH_AXES, device_mesh, parameter_spec
from tests.conftest import QUICK, forget_programs

ROOT = Path(__file__).parents[2]
FACTORISATIONS = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
ALWAYS = [(2, 2, 2, 1), (2, 1, 2, 2), (1, 2, 2, 2)]  # the others, the router and rematerialisation: --all
DIT = DiTConfig(
    channels=4, text_width=8, pooled_width=8, hidden=128, heads=8, double_blocks=1, single_blocks=1, rope_axes=(4, 6, 6)
)
NETWORKS = {
    "joint": DIT,
    "factorised": dataclasses.replace(DIT, attention="factorised"),
    "remat": dataclasses.replace(DIT, remat="named"),
    "factorised remat": dataclasses.replace(DIT, attention="factorised", remat="full"),
    "router": RouterConfig(
        channels=4, pooled_width=8, clusters=3, hidden=128, heads=8, blocks=2, rope_axes=(4, 6, 6), remat="named"
    ),
}


def random_params(config):
    leaves, tree = jax.tree.flatten(functional.abstract(config))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([0.1 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def inputs(config):
    keys = jax.random.split(jax.random.key(1), 3)
    x, t = jax.random.normal(keys[0], (16, 2, 4, 4, 4)), jnp.linspace(0.1, 0.9, 16)
    pooled = jax.random.normal(keys[1], (16, 8))
    if isinstance(config, RouterConfig):
        return x, t, pooled
    return x, t, jax.random.normal(keys[2], (16, 8, 8)), jnp.arange(16) % 8 + 1, pooled


def value_and_gradient(config, params, given):
    """The network's output of each sample and the gradient of a loss that differs from sample to sample."""

    def loss(params):
        out = functional.apply(config, params, *given)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (weight * out**2).mean(), out

    gradient, out = jax.grad(loss, has_aux=True)(params)
    return out, gradient


def samples(config, params, given):
    """Three steps of the sampler with guidance, for an ensemble of one expert."""
    x, _, *text = given
    encoded = EncodedText(*text)
    negative = dataclasses.replace(encoded, tokens=-encoded.tokens)
    condition = Condition(encoded, negative, Strength(jnp.float32(3.0)))
    sampler = sparse_velocity.SamplerConfig((config,), ((0, 0),), None, Routing("full"), guidance="classifier_free")
    ensemble = sparse_velocity.EnsembleParams((params,), None, jnp.zeros(1, jnp.int32))
    keys = jax.random.key_data(jax.random.split(jax.random.key(2), len(x)))
    schedule, fixed = jnp.array([1.0, 0.7, 0.3, 0.0]), jnp.zeros(3, jnp.int32)
    state = sparse_velocity.initial_state(sampler, x, 3)
    return sparse_velocity.take_steps(sampler, ensemble, state, 0, 3, keys, schedule, condition, fixed).x


def distance(actual, expected) -> float:
    """The largest error of any array, in units of its own largest value."""
    pairs = zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
    return max(float(np.abs(np.asarray(a) - b).max() / (np.abs(b).max() + 1e-6)) for a, b in pairs)


def on_eight_devices(exhaustive: bool) -> dict[str, float]:
    """Distances from one device, by network and mesh; called in a process with eight simulated devices."""
    assert jax.device_count() == 8
    found = {}
    for name, config in NETWORKS.items():
        if name not in ("joint", "factorised") and not exhaustive:
            continue
        params, given = random_params(config), inputs(config)
        expected = jax.tree.map(np.asarray, jax.jit(value_and_gradient, static_argnums=0)(config, params, given))
        for sizes in FACTORISATIONS if exhaustive else ALWAYS if name == "joint" else ALWAYS[:1]:
            mesh = device_mesh(MESH_AXES, sizes, jax.devices())

            def place(path, leaf, mesh=mesh):
                spec = parameter_spec(jax.tree_util.keystr(path, simple=True, separator="."), leaf.shape, mesh.shape)
                return jax.device_put(leaf, jax.NamedSharding(mesh, spec))

            placed = jax.tree_util.tree_map_with_path(place, params)
            split = jax.tree.map(
                lambda a, m=mesh: jax.device_put(a, jax.NamedSharding(m, jax.P(("data", "fsdp")))), given
            )
            with jax.set_mesh(mesh):
                actual = jax.jit(value_and_gradient, static_argnums=0)(config, placed, split)
            found[f"{name} {sizes}"] = distance(actual, expected)
            forget_programs()
    config = NETWORKS["joint"]
    params, given = jax.tree.map(np.asarray, random_params(config)), inputs(config)
    expected = np.asarray(samples(config, jax.tree.map(lambda a: a[None], params), given))
    for sizes in FACTORISATIONS if exhaustive else ALWAYS[:1]:
        options = device_placement.placement_options(dict(zip(MESH_AXES, sizes, strict=True)), "auto", False)
        with jax.set_mesh(options.mesh):
            placed = options.place(config, [params])
            actual = samples(config, placed, device_placement.replicate(given, options.mesh))
        found[f"sampler {sizes}"] = distance(actual, expected)
        forget_programs()
    return found


@pytest.fixture(scope="module")
def distances(exhaustive) -> dict[str, float]:
    script = "import json; from tests.models.test_every_mesh import on_eight_devices as f"
    script += f"; print(json.dumps(f({exhaustive})))"
    flags = f"--xla_force_host_platform_device_count=8 {QUICK}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_networks_gradients_and_samples_are_the_same_on_every_mesh(distances):
    assert len(distances) >= 5
    wrong = {name: distance for name, distance in distances.items() if not distance < 1e-4}
    assert not wrong
