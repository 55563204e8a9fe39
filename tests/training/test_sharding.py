"""One code path from one device to a whole slice: where everything lies, and that it changes no result."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath

from paris_jax.config.network import NETWORK_PRESETS, ROUTER_PRESETS, NetworkSettings
from paris_jax.config.training import TrainingSettings
from paris_jax.errors import UserError
from paris_jax.models import functional, sharding_rules
from paris_jax.models.router import RouterConfig
from paris_jax.training import sharding
from paris_jax.training import state as states
from paris_jax.training.job import Job
from paris_jax.training.losses import TimestepSampler, expert_losses, router_losses
from paris_jax.training.step import ShardedStep
from tests.conftest import QUICK

ROOT = Path(__file__).parents[2]
SIZES = {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 2}
P = jax.P


class FakeMesh:
    """The sizes of a mesh without its devices."""

    def __init__(self, **shape):
        self.shape = dict.fromkeys(sharding_rules.MESH_AXES, 1) | shape


def make_job(router=False, attention="joint", **settings) -> Job:
    """A network of eight heads on samples of 8 + 6 tokens, with every kind of parameter large enough to be split."""
    given = {"channels": 24, "pooled_width": 64, "dtype": "float32", "remat": "none"}
    if router:
        tiny = dataclasses.replace(ROUTER_PRESETS["tiny"], hidden=128, heads=2)
        config = RouterConfig(**dataclasses.asdict(tiny), clusters=3, **given)
    else:
        network = NetworkSettings(preset="tiny", hidden=128, heads=8, single_blocks=1, attention=attention)
        config = functional.network_config(network, text_width=64, **given)
    settings = TrainingSettings(**{"steps": 10, "global_batch_size": 8, "warmup_steps": 2} | settings)
    law = TimestepSampler("logit_normal", 0.0, 1.0, 2.0)
    losses = router_losses if router else expert_losses
    return Job("test", epath.Path("nowhere"), config, settings, settings.steps, law, (2, 4, 4, 24), 6, losses=losses)


def batches(job: Job, count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)

    def batch(n: int) -> dict[str, np.ndarray]:
        B, L = job.settings.global_batch_size, job.padded_text_length
        length = rng.integers(1, job.text_length + 1, B).astype(np.int32)
        tokens = rng.normal(size=(B, job.text_length, 64)) * (
            np.arange(job.text_length)[:, None] < length[:, None, None]
        )
        return {
            "latent": rng.normal(size=(B, *job.latent_shape)).astype(np.float32),
            "tokens": np.pad(tokens, ((0, 0), (0, L - job.text_length), (0, 0))).astype(np.float32),
            "length": length,
            "pooled": rng.normal(size=(B, 64)).astype(np.float32),
            "cluster": rng.integers(0, 3, B).astype(np.int32),
            "index": np.arange(n * B, (n + 1) * B, dtype=np.int32),
        }

    return [batch(n) for n in range(count)]


@functools.cache
def first_state(kind: type) -> states.TrainState:
    """A network's state as one device makes it, on the host."""
    job = make_job(router=kind is RouterConfig)
    return jax.tree.map(np.asarray, ShardedStep(job, jax.devices()[:1]).first_state())


def losses(job: Job, devices: int, steps: int = 3) -> list[float]:
    """Losses of the first steps on so many devices.

    The network is shaken: a fresh one answers nothing but zeros, whatever its attention does.
    """
    program = ShardedStep(job, jax.devices()[:devices])
    state, found, rng = first_state(type(job.config)), [], np.random.default_rng(1)
    moved = [a + 0.1 * rng.normal(size=a.shape).astype(a.dtype) for a in jax.tree.leaves(state.params)]
    state = dataclasses.replace(state, params=jax.tree.unflatten(jax.tree.structure(state.params), moved))
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.state))
    with jax.set_mesh(program.mesh):
        for batch in batches(job, steps):
            state, metrics = program.step(state, sharding.place_batch(batch, program.mesh))
            found.append(float(metrics["loss"]))
    return found


# Devices, and what they split beside the batch.
MESHES = [
    (1, {}),
    (2, {"tensor": 2}),
    (4, {"fsdp": 4, "grad_accum_steps": 2}),
    (4, {"sequence": 4}),
    (8, {}),
    (8, {"fsdp": 2, "tensor": 2, "sequence": 2}),
]


USUAL = (0, 2, 5)  # of MESHES; the others are run by --all


def on_eight_devices(exhaustive: bool) -> dict:
    """Everything that the tests below compare; called in a process with eight simulated devices."""
    assert jax.device_count() == 8
    job = make_job(**MESHES[-1][1])
    offload = dataclasses.replace(job, config=dataclasses.replace(job.config, remat="offload"))
    state, alone = ShardedStep(job).first_state(), first_state(type(job.config))
    rest = {}
    if exhaustive:
        rest["offload"] = losses(offload, 8, 2)
        rest["factorised"] = [losses(make_job(attention="factorised", **s), n, 2) for n, s in (MESHES[0], MESHES[-1])]
    meshes = range(len(MESHES)) if exhaustive else USUAL
    return rest | {
        "far": max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (state, alone)), strict=True)),
        "losses": {str(i): losses(make_job(**MESHES[i][1]), MESHES[i][0]) for i in meshes},
        "router": [losses(make_job(router=True, **s), n) for n, s in ((1, {}), (8, {"fsdp": 4, "tensor": 2}))],
        "pieces": {name: leaf.addressable_shards[0].data.shape for name, leaf in leaves(state).items()},
    }


def leaves(tree) -> dict:
    """Names like params.single_blocks.out.kernel to leaves."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def found(exhaustive) -> dict:
    script = "import json; from tests.training.test_sharding import on_eight_devices as f"
    script += f"; print(json.dumps(f({exhaustive})))"
    flags = f"--xla_force_host_platform_device_count=8 {QUICK}"
    flags = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "which",
    [pytest.param(i, marks=[] if i in USUAL else pytest.mark.exhaustive) for i in range(1, len(MESHES))],
    ids=lambda i: f"{MESHES[i][0]}-{MESHES[i][1]}",
)
def test_the_loss_is_the_same_on_every_mesh(which, found):
    np.testing.assert_allclose(found["losses"][str(which)], found["losses"]["0"], rtol=1e-6)
    assert len(set(found["losses"]["0"])) == 3  # it learns, or at least moves


def test_the_first_state_is_the_same_on_every_mesh(found):
    assert found["far"] < 1e-6


@pytest.mark.exhaustive
def test_the_loss_is_the_same_with_factorised_attention(found):
    one, eight = found["factorised"]
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[0] != pytest.approx(one[1], rel=1e-3)


@pytest.mark.exhaustive
def test_the_loss_is_the_same_with_activations_kept_on_the_host(found):
    np.testing.assert_allclose(found["offload"], found["losses"]["0"][:2], rtol=1e-6)


def test_the_routers_loss_is_the_same_on_one_device_and_eight(found):
    np.testing.assert_allclose(*found["router"], rtol=1e-6)


# Every parameter that is split, on a mesh that splits everything; norms, small ones and the rest are whole.
WIDTH, HEADS = ("fsdp", "sequence"), "tensor"
SPECS = {
    "qkv.kernel": [None, WIDTH, HEADS],
    "mlp_in.kernel": [None, WIDTH, HEADS],
    "qkv_mlp.kernel": [None, WIDTH, HEADS],
    "modulation.out.kernel": [None, WIDTH, HEADS],
    "mlp_out.kernel": [None, HEADS, WIDTH],
    "out.kernel": [None, HEADS, WIDTH],
    "inner.kernel": [None, WIDTH],
    "outer.kernel": [None, WIDTH],
    "final_modulation.out.kernel": [WIDTH],
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_parameters_and_moments_are_sharded_by_the_rules(optimizer):
    job = make_job(optimizer=optimizer)
    shapes = jax.eval_shape(lambda: states.create(job.config, job.settings, job.steps, jax.random.key(0)))
    lies = leaves(sharding.state_specs(shapes, SIZES))
    shapes = leaves(shapes)
    parameters = {name.removeprefix("params."): s.shape for name, s in shapes.items() if name.startswith("params.")}
    assert len(parameters) == len(jax.tree.leaves(functional.abstract(job.config)))
    split = 0
    for name, leaf in shapes.items():
        of = next((p for p in parameters if name.endswith("." + p)), None)
        ends = [end for end in SPECS if of and of.endswith(end)]
        large = of and parameters[of] == leaf.shape and leaf.size >= sharding_rules.SMALLEST_SPLIT
        expected = P(*SPECS[max(ends, key=len)]) if ends and large else P()
        assert lies[name] == expected, name
        split += bool(expected)
    # Parameters and EMA; beside them Adam's two moments, Muon's one of most, none of Adafactor's.
    assert split >= {"adamw": 4, "muon": 3, "adafactor": 2}[optimizer] * len(SPECS)


def test_every_device_holds_its_piece_of_the_state(found):
    job = make_job()
    shapes = leaves(jax.eval_shape(lambda: states.create(job.config, job.settings, job.steps, jax.random.key(0))))
    for name, leaf in shapes.items():
        spec = next((s for p, s in table(job).items() if name.endswith("." + p)), P())
        ways = [np.prod([SIZES[m] for m in np.ravel(part)]) if part else 1 for part in spec]
        whole = leaf.shape[len(ways) :]
        assert found["pieces"][name] == [n // way for n, way in zip(leaf.shape, ways)] + list(whole), name


def table(job) -> dict:
    names = functional.to_names(functional.abstract(job.config))
    return {name: sharding_rules.parameter_spec(name, leaf.shape, SIZES) for name, leaf in names.items()}


def test_the_table_names_every_matrix_of_every_preset():
    for name in NETWORK_PRESETS:
        config = functional.network_config(NetworkSettings(preset=name), channels=16, text_width=4096, pooled_width=768)
        for parameter in functional.to_names(functional.abstract(config)):
            if parameter.endswith("kernel"):
                assert any(parameter.endswith(end) for end in sharding_rules.PARAMETER_RULES), parameter


def test_the_published_network_is_split_to_its_last_percents():
    """11.89B parameters over fsdp = 64: what is left whole on every device is less than a fiftieth of its share."""
    config = functional.network_config(NetworkSettings(preset="11b"), channels=16, text_width=4096, pooled_width=768)
    names = functional.to_names(functional.abstract(config))
    whole = sum(
        leaf.size for name, leaf in names.items() if not sharding_rules.parameter_spec(name, leaf.shape, {"fsdp": 64})
    )
    assert whole < functional.count(config) / 64 / 50


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"fsdp": 3}, r"training.fsdp=3 x training.tensor=1 x training.sequence=1 = 3 does not divide the 1 devices"),
        ({"tensor": 2}, r"training.tensor=2 .* does not divide the 1 devices"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        sharding.make_mesh(TrainingSettings(steps=10, warmup_steps=0, **settings), jax.devices()[:1])


@pytest.mark.parametrize(
    "router, shape, said",
    [
        (False, {"fsdp": 3}, r"training.fsdp=3 x training.sequence=1: 3 does not divide the network's 128 width"),
        (False, {"tensor": 16}, r"training.tensor=16 .* 16 does not divide the network's 8 heads"),
        (
            False,
            {"sequence": 16},
            r"training.tensor=1 x training.sequence=16: 16 does not divide the network's 8 heads",
        ),
        (True, {"sequence": 2}, r"training.sequence=2: a router's tokens are not split"),
    ],
)
def test_a_mesh_that_does_not_divide_the_network_is_refused(router, shape, said):
    with pytest.raises(UserError, match=said):
        sharding.check_network(make_job(router).config, FakeMesh(**shape), 8)


def test_a_batch_that_does_not_divide_into_its_parts_is_refused():
    with pytest.raises(
        UserError,
        match=r"training.global_batch_size=8 does not divide into training.grad_accum_steps=8 parts over .* = 2",
    ):
        sharding.make_mesh(
            TrainingSettings(steps=10, warmup_steps=0, global_batch_size=8, fsdp=2, grad_accum_steps=8),
            jax.devices()[:1] * 2,
        )


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"training.global_batch_size=3 does not divide over data x fsdp = 2"):
        sharding.make_mesh(
            TrainingSettings(steps=10, warmup_steps=0, global_batch_size=3, fsdp=2), jax.devices()[:1] * 2
        )


class FakeDevices:
    """Devices of several processes, in the order of a mesh."""

    def __init__(self, processes, **shape):
        from types import SimpleNamespace

        self.shape = dict.fromkeys(sharding_rules.MESH_AXES, 1) | shape
        self.devices = np.array([SimpleNamespace(process_index=p) for p in processes]).reshape(
            [self.shape[name] for name in sharding_rules.MESH_AXES]
        )


@pytest.mark.parametrize(
    "mesh, parts",
    [
        (FakeDevices([0, 0, 1, 1], data=2, fsdp=2), [(0, 2), (1, 2)]),
        (FakeDevices([0, 0, 1, 1], data=2, tensor=2), [(0, 2), (1, 2)]),
        (FakeDevices([0, 0, 1, 1], tensor=4), [(0, 1), (0, 1)]),  # both hold every sample
        (FakeDevices([0, 0, 1, 1, 2, 2, 3, 3], data=2, tensor=4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (FakeDevices([0, 1, 0, 1], data=4), [(0, 2), (1, 2)]),  # not in one piece
    ],
)
def test_processes_that_hold_the_same_samples_bring_the_same_rows(mesh, parts, monkeypatch):
    for process, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert sharding.rows_of_this_process(mesh) == part


def test_a_mesh_across_which_samples_are_shared_unevenly_is_refused():
    with pytest.raises(UserError, match="the same samples"):
        sharding.rows_of_this_process(FakeDevices([0, 1, 1, 2], data=2, tensor=2))
