"""`plan`: compiled for simulated devices everywhere, and for real TPU slices where libtpu is installed."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from etils import epath

from paris_jax.errors import UserError
from paris_jax.planning import estimate as stage
from paris_jax.planning.topologies import Footprint, Topology
from tests.training.test_sharding import make_job

ROOT = Path(__file__).parents[2]
LIBTPU = importlib.util.find_spec("libtpu") is not None
GIB = 2**30


def plan(*arguments, **environment):
    """The command in a process of its own, on a screen wide enough for its tables."""
    command = [sys.executable, "-m", "paris_jax", "plan", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def rows(text: str) -> dict[str, list[list[str]]]:
    """The rows of every table by their first cell."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells:
            found.setdefault(cells[0], []).append(cells[1:])
    return found


def test_the_real_step_is_compiled_for_devices_that_are_not_here():
    done = plan("--config=configs/shapes.py:tiny", "--target=cpu:4", "--config.training.fsdp=2")
    assert done.returncode == 0, done.stderr[-3000:]
    found = rows(done.stdout)
    for role in ("expert", "monolith", "router"):
        memory, time = found[role]
        assert memory[-1] == "yes" and float(memory[4]) >= float(memory[2]) > 0
        assert time[0] == ("3" if role == "expert" else "1")
    assert found["expert"][0] == found["monolith"][0]
    assert found["monolith"][1][4] == "3,900"  # three times the experts' steps
    assert "data 2 x fsdp 2" in " ".join(done.stderr.split())


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -e '.[tpu]'")
@pytest.mark.parametrize("target", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_step_is_compiled_for_a_tpu_slice(target):
    flags = ("--config.network.hidden=256", "--config.network.heads=4", "--config.network.double_blocks=1")
    done = plan(
        "--config=configs/shapes.py:small", f"--target={target}", "--role=expert", "--nosearch", "--price=2", *flags,
        "--config.network.single_blocks=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    memory, time = rows(done.stdout)["expert"]
    assert memory[-1] == "yes" and memory[-2] in ("32", "16", "95")
    hours, work, cost = (float(cell.replace(",", "")) for cell in time[-3:])
    assert work == pytest.approx(hours * 4 * 3, rel=0.02) and cost == pytest.approx(2 * work, rel=0.02)
    assert "attention: pallas" in " ".join(done.stderr.split())


LAYERS_FROM_THE_HOST = """
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from paris_jax.models import blocks, stacks
from paris_jax.planning.topologies import Topology

device = Topology.parse("v5e:2x2").devices()[0]
here, away = (SingleDeviceSharding(device, memory_kind=kind) for kind in ("device", "pinned_host"))
of = lambda shape, dtype, place=here: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
layers, width = 24, 1024
values = stacks.OnHost(of((2 * layers, width // 4, width), jnp.int32, away))
stack = {"w": stacks.Int8(values, of((2, layers, 1, width), jnp.float32))}
run = lambda x, layer: (x @ layer["w"].astype(x.dtype)).astype(x.dtype)
step = jax.jit(lambda stack, member, x: blocks._scan_member(run, stack, member, x))
found = step.lower(stack, of((), jnp.int32), of((256, width), jnp.bfloat16)).compile().memory_analysis()
print(found.temp_size_in_bytes, found.host_temp_size_in_bytes)
"""


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -e '.[tpu]'")
def test_8_bit_layers_are_cut_where_they_lie_in_a_tpus_host_memory():
    done = subprocess.run([sys.executable, "-c", LAYERS_FROM_THE_HOST], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    device, host = map(int, done.stdout.split())
    assert device < 16 * 2**20 and host == 0  # of 48 layers of 1 MiB


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_without_libtpu_the_extra_is_named():
    done = plan("--config=configs/shapes.py:tiny", "--target=v5p:2x2x1")
    assert done.returncode == 1
    assert "pip install -e '.[tpu]'" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("target", ["v7:2x2", "v5p:16", "v5p:2x2", "v5e:2x2x2", "cpu", "cpu:0", "v6e:4xx4", "cpu:2x2"])
def test_a_slice_that_cannot_be_is_refused(target):
    with pytest.raises(UserError, match=f"--target={target}: must be a TPU slice such as"):
        Topology.parse(target)


@pytest.mark.parametrize(
    "flags, said",
    [
        ((), "error: --target is missing"),
        (("--target=cpu:2", "--mfu=0"), "error: --mfu=0.0: must be above 0"),
        (("--target=cpu:2", "--price=-1"), "error: --price=-1.0: must be at least 0"),
        (("--target=cpu:4", "--config.training.fsdp=3"), "error: training.fsdp=3 x "),
        (("--target=cpu:4", "--config.training.tensor=4"), "does not divide the network's 7 heads"),
    ],
)
def test_wrong_input_is_one_sentence(flags, said):
    done = plan("--config=configs/shapes.py:tiny", "--role=expert", *flags)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


class Pretended:
    """Stands for the compiler: 8 GiB of state over fsdp; 2 GiB a sample of each device, or a quarter recomputed."""

    def __init__(self, memory: float):
        self.memory, self.compiled = memory, []

    def __call__(self, job, target, devices):
        self.compiled.append((job.settings.global_batch_size, job.settings.fsdp, job.config.remat))
        state = 8 * GIB / job.settings.fsdp
        each = 2 * GIB * (0.25 if job.config.remat == "full" else 1)
        used = each * job.settings.global_batch_size / target.size
        return stage.Planned(job, target, Footprint(state, used, state + used, self.memory), 0.0)


def pretended_step(job, devices):
    return types.SimpleNamespace(job=job, argument_bytes=lambda: 8 * GIB / job.settings.fsdp)


@pytest.fixture
def pretended(monkeypatch):
    def use(memory):
        compiler = Pretended(memory)
        monkeypatch.setattr(stage, "_compile", compiler)
        monkeypatch.setattr(Topology, "devices", lambda self: [])
        monkeypatch.setattr(stage, "ShardedStep", pretended_step)
        return compiler

    return use


def look_further(compiler, **settings):
    job = make_job(**settings)
    assert job.folder == epath.Path("nowhere")
    target = Topology.parse("v6e:2x4")
    return list(stage._suggestions(compiler(job, target, []), []))


def test_the_largest_batch_and_the_smallest_slice_are_found_and_compiled(pretended):
    """32 GiB: 1 of state leaves 31, or 30 with a margin, so 15 samples on each of eight devices; one holds 8 + 16."""
    compiler = pretended(32 * GIB)
    largest, smallest = look_further(compiler, fsdp=8)
    assert "is 120 (training.global_batch_size=120)" in largest
    assert (120, 8, "none") in compiler.compiled
    assert "fits batch 8 is v6e:1x1, with training.fsdp=1" in smallest


def test_a_slice_too_small_for_the_state_is_not_even_compiled(pretended):
    compiler = pretended(5 * GIB)
    _, smallest = look_further(compiler, fsdp=8)
    assert "is v6e:2x4" in smallest or "is v6e:2x2" in smallest
    assert all(fsdp != 1 for _, fsdp, _ in compiler.compiled)


def test_what_makes_it_fit_is_tried_and_said(pretended):
    """6 GiB: 8 of state are too much for fsdp=1; then full recomputation; then fewer samples."""
    compiler = pretended(4 * GIB)
    said = look_further(compiler, global_batch_size=128)
    assert said[0].startswith("does not fit: each device needs 40.00 GiB and has 4.00 GiB")
    assert said[1] == "tried --config.training.fsdp=8: 33.00 GiB"
    assert said[2] == "tried --config.training.fsdp=8 --config.network.remat=full: 9.00 GiB"
    assert said[-1].endswith("which fits")
    assert compiler.compiled[-1][0] < 128 and compiler.compiled[-1][1:] == (8, "full")


def test_one_change_that_is_enough_is_the_only_one(pretended):
    said = look_further(pretended(6 * GIB), global_batch_size=8)
    assert said[1:] == ["tried --config.training.fsdp=8: 3.00 GiB, which fits"]


@pytest.mark.parametrize("memory", [4, 32])
def test_every_batch_that_is_tried_divides_into_the_parts_that_are_accumulated(memory, pretended):
    compiler = pretended(memory * GIB)
    look_further(compiler, global_batch_size=144, grad_accum_steps=3)
    assert len(compiler.compiled) > 2 and all(batch % (3 * fsdp) == 0 for batch, fsdp, _ in compiler.compiled)
    assert all(batch % 24 == 0 for batch, *_ in compiler.compiled)


def test_what_nothing_helps_is_said(pretended):
    said = look_further(pretended(0.5 * GIB), global_batch_size=8)
    assert said[-1].startswith("no configuration tried fits; use a larger slice")


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -e '.[tpu]'")
def test_every_split_of_a_slice_makes_a_mesh():
    """jax.make_mesh finds none where two axes of the mesh share an axis of the slice."""
    code = """
from paris_jax.config.training import TrainingSettings
from paris_jax.planning.topologies import Topology
from paris_jax.training.sharding import make_mesh
for slice, splits in (("v6e:4x4", (2, 4, 8, 16)), ("v6e:4x8", (2, 16)), ("v4:4x4x4", (2, 8, 32))):
    devices = Topology.parse(slice).devices()
    for fsdp in splits:
        assert make_mesh(TrainingSettings(global_batch_size=64, fsdp=fsdp), devices).shape["fsdp"] == fsdp
print("all")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["all"], done.stderr[-3000:]


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -e '.[tpu]'")
def test_parts_of_a_host_are_slices_too():
    code = """
from paris_jax.planning.topologies import Topology
print(*(len(Topology.parse(slice).devices()) for slice in ("v5e:1x1", "v6e:1x1", "v4:1x1x1", "v5p:1x1x1", "v5e:1x2")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "1", "1", "1", "2"], done.stderr[-3000:]
