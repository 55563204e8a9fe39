"""`plan`: compiled for simulated devices everywhere, and for real TPU slices where libtpu is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from etils import epath

from paris_jax.errors import UserError
from paris_jax.planning import search, topologies
from paris_jax.planning.compiled import Footprint, Planned
from paris_jax.planning.topologies import Topology
from tests.training.test_sharding import make_job

ROOT = Path(__file__).parents[2]
LIBTPU = importlib.util.find_spec("libtpu") is not None
CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None
GIB = 2**30


def plan(*arguments, **environment):
    """The command in a process of its own, on a screen wide enough for its tables."""
    command = [sys.executable, "-m", "paris_jax", "plan", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def blocks(text: str) -> dict[str, dict[str, str]]:
    """The lines of each role: what its first line says, and the others by their first word."""
    found: dict[str, dict[str, str]] = {}
    role = ""
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        if line.startswith(" " * 12):
            found[role]["network"] += f" {line.strip()}"
        elif line.startswith("  "):
            found[role][word] = rest.strip()
        elif word in ("expert", "monolith", "router"):
            role = word
            found[role] = {"": rest.strip()}
    return found


def test_the_real_step_is_compiled_for_devices_that_are_not_here():
    done = plan("--config=configs/shapes.py:tiny", "--target=cpu:4", "--config.training.fsdp=2", COLUMNS="80")
    assert done.returncode == 0, done.stderr[-3000:]
    found = blocks(done.stdout)
    assert "batch 8, fsdp 2, float32, remat none" in found["expert"][""]
    assert found["expert"]["run"] == "3 x 4,000 steps" and found["monolith"]["run"] == "1 x 12,000 steps"
    assert found["expert"]["memory"] == found["monolith"]["memory"] and "temporary = " in found["router"]["memory"]
    assert "all-gather" in found["expert"]["network"] and "all-gather" not in found["router"]["network"]
    assert "data 2 x fsdp 2" in " ".join(done.stderr.split())
    roles = done.stdout.split("Text is counted")[0]
    assert max(map(len, roles.splitlines())) <= 80


def test_a_plan_is_readable_by_programs():
    done = plan(
        "--config=configs/shapes.py:tiny",
        "--target=cpu:2",
        "--role=expert",
        "--json",
        "--config.training.optimizer=adamw",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    expert = found["roles"]["expert"]
    assert (found["target"], found["devices"], expert["attention"], expert["jobs"]) == ("cpu:2", 2, "xla", 3)
    assert expert["memory"]["peak"] >= expert["memory"]["arguments"] > 1e6
    assert 0.9 < 2 * expert["program"]["flops"]["f32"] / expert["model_flops"] < 1.1  # of two devices


@pytest.mark.skipif(not CUDA, reason="needs JAX for CUDA, without a GPU: pip install -e '.[cuda12]'")
@pytest.mark.parametrize("target", ["h100:2", "h200:1", "a100:16"])
def test_a_step_is_compiled_for_gpus(target):
    """Routers with their odd number of tokens included; the step of every role has flash attention."""
    flags = ("--config.network.hidden=256", "--config.network.heads=4", "--config.network.double_blocks=1")
    done = plan(
        "--config=configs/shapes.py:small", f"--target={target}", "--nosearch", "--json", *flags,
        "--config.network.single_blocks=1", "--config.data.height=48", "--config.data.width=48",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for role, blocks in (("expert", 2), ("router", 6)):
        program, memory = found["roles"][role]["program"], found["roles"][role]["memory"]
        assert program["kernels"]["__cudnn$fmhaSoftmax"] == program["kernels"]["__cudnn$fmhaSoftmaxBackward"] == blocks
        assert memory["fits"] and memory["memory"] > 70e9 and found["roles"][role]["attention"] == "cudnn"


def test_offload_is_not_planned_for_gpus():
    done = plan("--config=configs/shapes.py:tiny", "--target=h100:1", "--config.network.remat=offload")
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert ("remat=offload cannot be planned" in said) if CUDA else ("pip install -e '.[cuda12]'" in said)


def test_the_flags_are_those_of_the_launch_scripts():
    script = (
        "for kind in tpu gpu; do source launch/device_flags.sh $kind; done; echo $LIBTPU_INIT_ARGS; echo $XLA_FLAGS"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment)
    tpu, gpu = done.stdout.splitlines()
    assert tuple(tpu.split()) == topologies.TPU_FLAGS
    assert gpu == "--xla_gpu_enable_latency_hiding_scheduler=true"
    assert topologies.GPU_OPTIONS["xla_gpu_enable_latency_hiding_scheduler"] is True


@pytest.mark.skipif(not LIBTPU, reason="needs libtpu: pip install -e '.[tpu]'")
@pytest.mark.parametrize("target", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_step_is_compiled_for_a_tpu_slice(target):
    flags = ("--config.network.hidden=256", "--config.network.heads=4", "--config.network.double_blocks=1")
    done = plan(
        "--config=configs/shapes.py:small", f"--target={target}", "--role=expert", "--nosearch", "--price=2", *flags,
        "--config.network.single_blocks=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = blocks(done.stdout)["expert"]
    assert re.search(r" of (32|16|95) GiB: fits$", found["memory"]) and found["attention"] == "the Pallas flash kernel"
    numbers = re.findall(r"([\d.,]+) (?:hours|chip-hours)|cost ([\d.,]+)", found["run"])
    hours, work, cost = (float("".join(pair).replace(",", "")) for pair in numbers)
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


@pytest.mark.parametrize(
    "target", ["v7:2x2", "h100:2x2", "v5p:16", "v5p:2x2", "v5e:2x2x2", "cpu", "cpu:0", "v6e:4xx4", "cpu:2x2"]
)
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
        (("--target=cpu:4", "--config.training.tensor=4"), "does not divide the network's 3 heads"),
    ],
)
def test_wrong_input_is_one_sentence(flags, said):
    done = plan("--config=configs/shapes.py:tiny", "--role=expert", *flags)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


class Pretended:
    """Stands for the compiler: 8 GiB of state over fsdp; 2 GiB a sample of each part, or a quarter recomputed."""

    def __init__(self, memory: float):
        self.memory, self.compiled = memory, []

    def __call__(self, job, target, devices):
        self.compiled.append((job.settings.global_batch_size, job.settings.fsdp, job.config.remat))
        state = 8 * GIB / job.settings.fsdp
        each = 2 * GIB * (0.25 if job.config.remat == "full" else 1)
        used = each * job.settings.global_batch_size / target.size / job.settings.grad_accum_steps
        return Planned(job, target, Footprint(state, used, state + used, self.memory), None, 0.0)


def pretended_step(job, devices):
    return types.SimpleNamespace(job=job, argument_bytes=lambda: 8 * GIB / job.settings.fsdp)


@pytest.fixture
def pretended(monkeypatch):
    def use(memory):
        compiler = Pretended(memory)
        monkeypatch.setattr(Topology, "devices", lambda self: [])
        monkeypatch.setattr(search, "ShardedStep", pretended_step)
        return compiler

    return use


def look_further(compiler, **settings):
    job = make_job(**settings)
    assert job.folder == epath.Path("nowhere")
    target = Topology.parse("v6e:2x4")
    return list(search.suggestions(compiler(job, target, []), [], compiler))


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


def test_the_search_tries_settings_until_the_job_fits(pretended):
    """8 GiB of state are too much for fsdp=1; a batch of 16 a device is cut into the parts that fit."""
    said = look_further(pretended(10 * GIB), global_batch_size=128)
    assert said[0].startswith("does not fit: each device needs 40.00 GiB and has 10.00 GiB")
    assert said[1] == "tried --config.training.fsdp=8: 33.00 GiB"
    parts = "--config.training.fsdp=8 --config.training.grad_accum_steps=4"
    assert said[2:] == [f"tried {parts}: 9.00 GiB, which fits"]


def test_recomputation_is_tried_where_a_single_sample_is_too_large(pretended):
    said = look_further(pretended(2.5 * GIB), global_batch_size=128, fsdp=8)
    parts = "--config.training.grad_accum_steps=16"
    assert said[1:] == [f"tried {parts}: 3.00 GiB", f"tried {parts} --config.network.remat=full: 1.50 GiB, which fits"]


def test_one_change_that_is_enough_is_the_only_one(pretended):
    said = look_further(pretended(6 * GIB), global_batch_size=8)
    assert said[1:] == ["tried --config.training.fsdp=8: 3.00 GiB, which fits"]


@pytest.mark.parametrize("memory", [4, 32])
def test_every_batch_that_is_tried_divides_into_the_parts_that_are_accumulated(memory, pretended):
    compiler = pretended(memory * GIB)
    look_further(compiler, global_batch_size=144, grad_accum_steps=3)
    assert len(compiler.compiled) > 2 and all(batch % (3 * fsdp) == 0 for batch, fsdp, _ in compiler.compiled)
    assert all(batch % 24 == 0 for batch, *_ in compiler.compiled)


def test_a_job_that_no_setting_fits_is_reported(pretended):
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
