"""An ensemble on several devices: groups with experts of their own, equal to one device, on one process and on two."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paris_jax import Ensemble
from paris_jax.cli import run
from paris_jax.commands.sample import sample
from paris_jax.data.decoding import footage
from paris_jax.ensemble import device_placement, sampling_params, sparse_velocity
from paris_jax.ensemble.routing import Routing
from paris_jax.ensemble.sparse_velocity import experts_by_group
from paris_jax.errors import UserError
from paris_jax.models import precision
from tests.conftest import QUICK, free_address
from tests.ensemble.test_mixture import NETWORK, inputs, random_params

ROOT = Path(__file__).parents[2]
PROMPTS = [
    "a large red circle moving right fast on a white ground",
    "a digit nine on a black ground",
    "a red",
    "a ball",
]
MESHES = [
    {"expert": 2},
    {"expert": 3, "data": 2},  # four prompts over two, and three experts over three
    {"expert": 4, "data": 2},  # one group has nothing to do
    {"expert": 2, "fsdp": 2, "data": 2},
    {"tensor": 7},
    {"fsdp": 2},
    {"data": 3},  # four prompts over three
]
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
HOW = {"num_inference_steps": 3, "seed": [3, 1, 4, 5], "guidance_scale": 2.0}
WAYS = [{"top_k": 1}, {"top_k": 2}, {"routing": "full"}, {"threshold": 0.9}, {"fixed_expert": [2, 0, 1]}]


def drawn(ensemble, **how) -> list[float]:
    return np.asarray(ensemble.sample(PROMPTS, **(HOW | how)).videos).ravel()[::61].tolist()


USUAL = MESHES[:1] + MESHES[3:4]  # the others are run by --all


def on_eight_devices(exhaustive: bool) -> dict:
    """Everything that the tests below compare; called in a process with eight simulated devices."""
    assert jax.device_count() == 8
    found: dict = {"videos": {}, "collectives": {}, "passes": []}
    ways = WAYS if exhaustive else WAYS[:3:2]
    for mesh in ({}, *(MESHES if exhaustive else USUAL)):
        ensemble = Ensemble.load("bundled:shapes", mesh=mesh)
        found["videos"][str(mesh)] = [drawn(ensemble, **way) for way in (ways if mesh == MESHES[0] else ways[:1])]
    found["videos"]["one, every way"] = [drawn(Ensemble.load("bundled:shapes"), **way) for way in ways]
    kept = {"weights_dtype": "int8", "offload": True}
    for name, mesh in (("kept on one", {}), ("kept on four", {"expert": 2, "fsdp": 2})):
        found["videos"][name] = [drawn(Ensemble.load("bundled:shapes", mesh=mesh, **kept))]
    ensemble = Ensemble.load("bundled:shapes", mesh={"expert": 3})
    plan, condition, x, text = compiled_velocity(ensemble, PROMPTS, 1.0)
    found["collectives"] = [m.groups() for m in re.finditer(rf"= (\S+) ({COLLECTIVES})\(", text)]
    found["latent"] = x.size
    found["crossing"] = crossing({"expert": 2, "fsdp": 2})
    found |= watched_draw(Ensemble.load("bundled:shapes", mesh={"expert": 2, "fsdp": 2}))
    meshes = ({}, {"expert": 2, "fsdp": 2}, {"expert": 2, "tensor": 2})[: None if exhaustive else 2]
    found["two kinds"] = [two_kinds(mesh)[0] for mesh in meshes]
    found["broken"] = [two_kinds(mesh, breaking=2)[1] for mesh in meshes]
    found["pieces"] = sorted(
        {leaf.addressable_shards[0].data.shape[0] for leaf in jax.tree.leaves(ensemble._placed.params.experts)}
    )
    run = sparse_velocity.expert_velocity

    def counted(*given):
        jax.debug.callback(lambda g: found["passes"].append(int(g)), jax.lax.axis_index("expert"))
        return run(*given)

    sparse_velocity.expert_velocity = counted
    sparse_velocity.ensemble_velocity.clear_cache()
    for experts in (np.arange(4) % 3, np.zeros(4, int)):  # samples that disagree, and samples that agree
        weight = jnp.asarray(np.eye(3, dtype=np.float32)[experts])
        with jax.set_mesh(ensemble._placed.mesh):
            merged = jax.jit(sparse_velocity.merge_experts, static_argnums=0)
            jax.block_until_ready(merged(plan, ensemble._placed.params, weight, x, jnp.full(4, 0.5), condition.text))
        jax.effects_barrier()
        found["passes"].append(-1)
    return found


def watched_draw(ensemble: Ensemble) -> dict:
    """A draw with a bar and previews, which draw themselves, on one device; and how many programs it took."""
    alone, seen = Ensemble.load("bundled:shapes"), []
    sparse_velocity.take_steps.clear_cache()
    drawn(alone, num_inference_steps=1)  # compiles

    def preview(step: int, videos: np.ndarray) -> None:
        drawn(alone, num_inference_steps=1)
        seen.append([step, jax.sharding.get_abstract_mesh().empty])

    videos = drawn(ensemble, top_k=1, progress=True, preview_every_steps=2, on_preview=preview)
    drawn(ensemble, top_k=1)
    return {"watched": videos, "seen": seen, "programs": sparse_velocity.take_steps._cache_size()}


def compiled_velocity(ensemble: Ensemble, prompts: list[str], guidance: float) -> tuple[Any, Any, Any, str]:
    """An ensemble's velocity on its mesh: the plan, its condition, the latents, and XLA's text."""
    params = sampling_params.resolve(ensemble.params, None, {"guidance_scale": guidance, "top_k": 1})
    plan, condition, _ = ensemble._prepare(params, ensemble.encode(prompts), [], 1, None, True)
    x = ensemble.noise(len(prompts))
    assert ensemble._placed.mesh
    with jax.set_mesh(ensemble._placed.mesh):
        given = device_placement.replicate(
            (x, jnp.full(len(prompts), 0.5), condition, jnp.int32(0)), ensemble._placed.mesh
        )
        return (
            plan,
            condition,
            x,
            sparse_velocity.ensemble_velocity.lower(plan, ensemble._placed.params, *given).compile().as_text(),
        )


def crossing(mesh: dict[str, int]) -> dict:
    """The largest array that groups of devices exchange with each other, and within a group, for one prompt."""
    ensemble = Ensemble.load("bundled:shapes", mesh=mesh)
    plan, _, x, text = compiled_velocity(ensemble, ["a"], 2.0)
    assert ensemble._placed.mesh
    group_of = np.arange(ensemble._placed.mesh.size) // (ensemble._placed.mesh.size // mesh["expert"])
    most = {"between groups": 0, "within a group": 0}
    for shapes, _, rest in re.findall(rf"= (\S+|\([^=]*\)) ({COLLECTIVES})(?:-start)?\((.*)", text):
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shapes)]
        which = "between groups" if any(len(set(group_of[d])) > 1 for d in talkers(rest)) else "within a group"
        most[which] = max(most[which], *sizes)
    return most | {"latents": plan.branches * x.size}


def talkers(rest: str) -> list[np.ndarray]:
    """Sets of devices that exchange something, from the end of a line of XLA's text."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", rest):
        return [np.array([int(n) for n in group.split(",")]) for group in re.findall(r"\{([\d,]+)\}", found[1])]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):  # jax 0.12 names the mesh's axes
        assert re.fullmatch(r"(?:'\w+'=\d+,?)+", found[1]), rest  # no order of devices, no part of an axis
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        talking = re.findall(r"'(\w+)'", found[2])
        silent = [name for name in axes if name not in talking]
        order = [list(axes).index(name) for name in silent + talking]
        devices = np.arange(np.prod(list(axes.values()))).reshape(list(axes.values()))
        return list(devices.transpose(order).reshape(-1, int(np.prod([axes[name] for name in talking]))))
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    assert found, rest
    dims = [int(n) for n in found[3].split(",")]
    order = [int(n) for n in found[4].split(",")] if found[4] else list(range(len(dims)))
    return list(np.arange(np.prod(dims)).reshape(dims).transpose(order).reshape(int(found[1]), int(found[2])))


def two_kinds(mesh: dict[str, int], breaking: int | None = None) -> tuple[list[float], list[int]]:
    """Rows that chose experts of two depths, one of which is held by each group: merged velocities, and who broke."""
    shallow = dataclasses.replace(NETWORK, hidden=128, heads=2, rope_axes=(16, 24, 24))
    deep = dataclasses.replace(shallow, single_blocks=2)
    keeping = device_placement.placement_options(mesh, "auto", False)
    kinds = ((shallow, [0]), (deep, [1, 2]))

    def params(network: Any, expert: int) -> Any:
        huge = 3e38 if expert == breaking else 1.0
        return jax.tree.map(lambda a: np.asarray(huge * a), random_params(network, expert))

    stacks = [keeping.place(network, [params(network, e) for e in experts]) for network, experts in kinds]
    plan = sparse_velocity.SamplerConfig((shallow, deep), ((0, 0), (1, 0), (1, 1)), None, Routing("top_k", 1))
    arrays = sparse_velocity.EnsembleParams(
        tuple(stacks), None, device_placement.replicate(jnp.arange(3), keeping.mesh)
    )
    weight = jnp.asarray(np.eye(3, dtype=np.float32)[[1, 2, 2]])
    merged = jax.jit(sparse_velocity.merge_experts, static_argnums=0)
    with jax.set_mesh(keeping.mesh) if keeping.mesh else contextlib.nullcontext():
        v, broken = merged(plan, arrays, *device_placement.replicate((weight, *inputs()), keeping.mesh))
    return np.asarray(v).ravel().tolist(), np.asarray(broken).tolist()


def in_another_process(code: str, devices: int) -> subprocess.Popen:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | flags | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def found(exhaustive) -> dict:
    code = "import json; from tests.ensemble.test_device_placement import on_eight_devices as f"
    code += f"; print(json.dumps(f({exhaustive})))"
    return ended(in_another_process(code, 8))


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=[] if m in USUAL else pytest.mark.exhaustive) for m in MESHES], ids=str
)
def test_groups_of_devices_give_the_samples_of_one_device(mesh, found):
    for there, here in zip(found["videos"][str(mesh)], found["videos"]["one, every way"], strict=False):
        np.testing.assert_allclose(there, here, atol=2e-3)
    np.testing.assert_allclose(found["videos"]["{}"][0], found["videos"]["one, every way"][0], atol=1e-6)


def test_groups_may_keep_their_experts_small_and_in_the_hosts_memory(found):
    np.testing.assert_allclose(found["videos"]["kept on four"], found["videos"]["kept on one"], atol=2e-3)


def test_a_progress_bar_on_a_mesh_does_not_change_the_samples(found):
    np.testing.assert_allclose(found["watched"], found["videos"]["one, every way"][0], atol=2e-3)


def test_a_mesh_that_is_watched_shows_previews_and_compiles_one_program(found):
    assert found["seen"] == [[2, True]]  # nothing of the mesh is around what previews do
    assert found["programs"] == 2  # one for the mesh, and one for the draws of the previews


def test_groups_that_are_at_experts_of_different_kinds_do_not_wait_for_each_other(found):
    one, *spread = found["two kinds"]
    assert np.std(one) > 0.1
    for there in spread:
        np.testing.assert_allclose(there, one, rtol=1e-4, atol=1e-4)


def test_who_broke_is_known_whichever_group_holds_it(found):
    assert found["broken"] == len(found["two kinds"]) * [[0, 0, 2]]  # of three rows, two chose it


def test_only_latents_cross_from_group_to_group(found):
    sizes = found["crossing"]
    assert 0 < sizes["between groups"] <= sizes["latents"] < sizes["within a group"]
    assert found["collectives"]
    for shape, kind in found["collectives"]:
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shape)]
        assert kind == "all-reduce" and max(sizes) <= found["latent"], (shape, kind)
    assert found["pieces"] == [1]  # each group holds one of the three experts


def test_groups_share_the_work_of_samples_that_disagree(found):
    passes, disagree, agree = found["passes"], [], []
    middle = passes.index(-1)
    disagree, agree = passes[:middle], passes[middle + 1 : -1]
    assert sorted(disagree) == [0, 0, 1, 2]  # samples 0 and 3 chose the first expert
    assert sorted(agree) == [0, 0, 0, 0]


def test_two_processes_give_the_samples_of_one(tmp_path):
    """On the command line, of which the first process writes."""
    address = free_address()
    arguments = ["sample", "--ensemble=bundled:shapes", *(f"--prompt={prompt}" for prompt in PROMPTS)]
    arguments += ["--num_inference_steps=3", "--top_k=2", "--guidance_scale=2", "--seed=3,1,4,5", "--grid"]
    joined = [*arguments, "--mesh=expert:2", f"--coordinator={address}", "--num_processes=2", "--preview_every_steps=2"]
    code = "import sys; from paris_jax.cli import run; sys.exit(run({}))"
    processes = [
        in_another_process(code.format([*joined, f"--process_id={n}", f"--out={tmp_path / f'of{n}.png'}"]), 1)
        for n in range(2)
    ]
    assert run([*arguments, f"--out={tmp_path / 'alone.png'}"]) == 0
    (said, _), (silent, _) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "of0.png" in said and "wrote" not in silent and "sampling" not in silent
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.png", "of0.png"]
    together, alone = (footage.read_image(tmp_path / f"{name}.png").astype(float) for name in ("of0", "alone"))
    np.testing.assert_allclose(together, alone, atol=2)  # of 255


@pytest.mark.parametrize("pressed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_ctrl_c_in_one_of_two_processes_ends_both(pressed, tmp_path):
    address = free_address()
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from paris_jax.cli import run; sys.exit(run({}))"
    asked = [
        "sample",
        "--ensemble=bundled:shapes",
        f"--prompt={PROMPTS[0]}",
        "--num_inference_steps=5000",
        "--mesh=expert:2",
    ]
    asked += [f"--coordinator={address}", "--num_processes=2", "--preview_every_steps=2", f"--out={tmp_path}/film.png"]
    processes = [in_another_process(code.format([*asked, f"--process_id={n}"]), 1) for n in range(2)]
    until = time.time() + 120
    while not (tmp_path / "film-preview.png").exists():
        assert time.time() < until and all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[pressed].send_signal(signal.SIGINT)
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [130, 130], said
    assert all("the prediction at this step is kept" in each for each in said)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("film-step")


def test_several_processes_without_a_mesh_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="--mesh is missing: this job has 2 processes with 1 devices together"):
        sample("bundled:shapes", ["a ball"], None)


def test_every_expert_is_held_by_one_group():
    places = ((0, 0), (1, 0), (0, 1), (0, 2), (1, 1))  # five experts of two kinds
    for groups in (1, 2, 3, 7):
        held, local = experts_by_group(places, groups)
        assert held.shape == (groups, len(local))
        assert sorted(held[held >= 0]) == [0, 1, 2, 3, 4]
        for group, row in enumerate(held):
            for (kind, member), expert in zip(local, row, strict=True):
                each = sum(k == kind for k, _ in local)
                assert expert < 0 or places[expert] == (kind, group * each + member)


@pytest.mark.parametrize(
    "mesh, message",
    [
        ({"expert": 2}, "mesh expert=2 = 2 devices: there are 1"),
        ({"experts": 1}, r"mesh experts: must be one of expert, data, .* \(did you mean 'expert'"),
        ({"expert": 0}, "mesh expert=0: must be at least 1"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        Ensemble.load("bundled:shapes", mesh=mesh)


def test_a_mesh_that_does_not_divide_the_network_is_refused():
    class Mesh:
        shape = {"fsdp": 1, "tensor": 2, "sequence": 1}  # noqa: RUF012

    ensemble = Ensemble.load("bundled:shapes")
    with pytest.raises(UserError, match="mesh tensor=2 x mesh sequence=1: 2 does not divide the network's 7 heads"):
        device_placement.check_mesh(ensemble._placed.networks, Mesh(), 100)


def test_a_size_whose_tokens_cannot_be_shared_is_refused():
    class Mesh:
        shape = {"expert": 1, "data": 1, "fsdp": 1, "tensor": 1, "sequence": 2}  # noqa: RUF012

    ensemble = Ensemble.load("bundled:shapes")
    ensemble._placed.networks = (dataclasses.replace(NETWORK, hidden=32, heads=2),)
    ensemble._placed.mesh = Mesh()
    with pytest.raises(UserError, match="mesh sequence=2: 2 does not divide the network's 75 tokens of a clip"):
        ensemble.sample("a ball", num_inference_steps=1, guidance_scale=1.0, num_frames=6)


@pytest.mark.parametrize(
    ("device", "trained", "asked", "dtype"),
    [
        (("gpu", "7.5"), "bfloat16", "", "float32"),  # a T4
        (("gpu", "7.5"), "bfloat16", "float16", "float16"),
        (("gpu", "7.5"), "bfloat16", "bfloat16", "bfloat16"),
        (("gpu", "8.0"), "bfloat16", "", "bfloat16"),
        (("gpu", "7.5"), "float32", "", "float32"),
        (("cpu", ""), "bfloat16", "", "bfloat16"),
    ],
)
def test_a_gpu_without_bfloat16_computes_in_float32_and_says_so(monkeypatch, caplog, device, trained, asked, dtype):
    monkeypatch.setattr(precision, "current_device", lambda: device)
    network = dataclasses.replace(NETWORK, dtype=trained)
    with caplog.at_level("INFO", logger="paris_jax"):
        assert device_placement.PlacementOptions(compute_dtype=asked).config(network).dtype == dtype
    said = [record.message for record in caplog.records]
    assert ["compute capability 7.5" in text for text in said] == [True] * (dtype not in (asked, trained))
