"""Training: exact resume, isolation, independence of devices, and what stops it. Invariants 1 to 4 and 8."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from xprof.convert import raw_to_tool_data

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import ClusterManifest, NetworkManifest
from paris_jax.commands import train as stage
from paris_jax.config.training import TrainingSettings
from paris_jax.data.loader import training_batches
from paris_jax.data.records import read_records
from paris_jax.errors import Preempted, UserError
from paris_jax.models import flops
from paris_jax.training import checkpoints, metrics, optimizer, train
from paris_jax.training import state as states
from paris_jax.training.job import batch_iterator, make_job
from paris_jax.training.step import ShardedStep
from tests.conftest import QUICK
from tests.training.torture import torture

EXPERT = Role("expert", 0)


def export_bytes(run, role=EXPERT):
    return (run.export(role) / "model.safetensors").read_bytes()


def final_checkpoint(run, experiment, role=EXPERT):
    """Everything in the newest checkpoint: parameters, EMA, moments, step, data position."""
    job = make_job(experiment, run, role, manifest.read(run.cluster(0), ClusterManifest))
    shapes = jax.eval_shape(lambda key: states.create(job.config, job.settings, job.steps, key), jax.random.key(0))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)
    saved = checkpoints.Checkpoints(run.checkpoints(role), keep=2)
    found = saved.restore(target)
    saved.close()
    return found


def assert_same_training(one, other, experiment, role=EXPERT):
    assert export_bytes(one, role) == export_bytes(other, role)
    a, b = (final_checkpoint(r, experiment, role) for r in (one, other))
    assert a[0] == b[0] and a[2] == b[2]
    jax.tree.map(np.testing.assert_array_equal, a[1], b[1])


def command(run, experiment, *arguments):
    """A training command in a process of its own, with the experiment's config as a file."""
    config = Path(run.path) / "given.py"
    body = f"def get_config():\n    return ConfigDict({experiment.to_dict()!r})\n"
    config.write_text(f"from ml_collections import ConfigDict\n\n\n{body}")
    return [sys.executable, "-m", "paris_jax", "train", f"--config={config}", f"--workdir={run}", *arguments]


def with_training(experiment, **changes):
    return dataclasses.replace(experiment, training=dataclasses.replace(experiment.training, **changes))


def reclaimed(run, experiment):
    """Makes a clustered run folder belong to a changed training config, as if it had been made with it."""
    run.config.unlink()
    path = run.data / manifest.FILE_NAME
    manifest.write_json(path, manifest.read_json(path) | {"config_hash": experiment.prepared_hash})
    for folder in [run.partition, run.validation, run.test, *(run.cluster(k) for k in range(3))]:
        path = folder / manifest.FILE_NAME
        manifest.write_json(path, manifest.read_json(path) | {"config_hash": experiment.data_hash})


@pytest.mark.parametrize("role", [EXPERT, Role("router")], ids=["expert", "router"])
def test_a_stopped_job_ends_where_an_uninterrupted_one_ends(role, micro, run, trained, monkeypatch, caplog):
    """Stopped in the middle of an epoch, after a checkpoint and steps beyond it."""
    real, seen = train.sharding.place_batch, []

    def dies_at_the_seventh_step(batch, mesh):
        seen.append(batch["index"])
        if len(seen) == 7:
            raise KeyboardInterrupt
        return real(batch, mesh)

    monkeypatch.setattr(train.sharding, "place_batch", dies_at_the_seventh_step)
    with pytest.raises(KeyboardInterrupt):
        stage.train(micro, run, role)
    monkeypatch.undo()
    assert not manifest.exists(run.export(role))
    with caplog.at_level("INFO"):
        stage.train(micro, run, role)
    assert f"{role.name} resumes from step {6 if role.kind == 'router' else 4}" in caplog.text
    assert_same_training(run, trained, micro, role)
    lines = [line["step"] for line in metrics.read(run.role(role) / "metrics.jsonl")]
    assert lines == sorted(set(lines)) and lines[-1] == 12


def test_a_killed_process_resumes_exactly(micro, run, exhaustive):
    """kill -9 at arbitrary moments, epoch borders passed in between, against a run that was left alone."""
    kills = 3 if exhaustive else 1
    assert torture(micro, run, kills=kills, seed=3) == kills


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 75), (signal.SIGINT, 130), pytest.param(signal.SIGHUP, 75, marks=pytest.mark.exhaustive)],
)
def test_a_stopped_job_saves_and_prints_how_to_resume(number, code, micro, run):
    experiment = with_training(micro, steps=5000, checkpoint_every_steps=5000)
    reclaimed(run, experiment)
    arguments = command(run, experiment, "--role=expert", "--cluster=0")
    python, _, _, *arguments = arguments
    hear = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    hear += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    process = subprocess.Popen(
        [python, "-c", f"{hear}from paris_jax.__main__ import main; main()", *arguments],
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not metrics.read(run.role(EXPERT) / "metrics.jsonl"):
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "run the same command again" in errors
    step, *_ = final_checkpoint(run, experiment)
    assert 0 < step < 5000


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.exhaustive)]
)
def test_a_job_stopped_while_compiling_ends_at_once(number, code, micro, run):
    """The compiler is made to take minutes, in which Python handles no signal on the main thread."""
    # Where tests run behind a shell, Ctrl-C may be ignored, and would be by the command.
    slow = """
import hashlib, signal, sys, jax
from paris_jax.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)
real = jax.stages.Lowered.compile
jax.stages.Lowered.compile = lambda self: hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1) and real(self)
main()
"""
    python, _, _, *arguments = command(run, micro, "--role=expert", "--cluster=0")
    process = subprocess.Popen([python, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    said = ""
    while "compiling its step" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(number)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == code, said + rest
    assert "run the same command again" in rest and "Traceback" not in rest
    assert not metrics.read(run.role(EXPERT) / "metrics.jsonl")
    stage.train(micro, run, EXPERT)


def test_a_second_interrupt_ends_a_job_at_once(micro, run):
    slow = """
import hashlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from paris_jax.training import sharding
def place_batch(batch, mesh):
    print("fetching", file=sys.stderr, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
sharding.place_batch = place_batch
from paris_jax.__main__ import main
main()
"""
    python, _, _, *arguments = command(run, micro, "--role=expert", "--cluster=0")
    process = subprocess.Popen([python, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while "fetching" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    assert process.returncode == 130, rest
    assert rest.endswith("interrupted again; ended at once\n")


def test_a_job_stopped_while_restoring_loses_no_checkpoint(micro, run, trained, monkeypatch):
    """A request to stop is no reason to take a checkpoint for damaged, and to resume from an older one."""
    shutil.copytree(trained.checkpoints(EXPERT), run.checkpoints(EXPERT))
    steps = checkpoints.Checkpoints(run.checkpoints(EXPERT), keep=2).steps()

    def restore(*_, **__):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(checkpoints.ocp.CompositeCheckpointHandler, "restore", restore)
    with pytest.raises(Preempted, match="was restoring, with nothing new to save"):
        stage.train(micro, run, EXPERT)
    monkeypatch.undo()
    assert checkpoints.Checkpoints(run.checkpoints(EXPERT), keep=2).steps() == steps

    def interrupted(*_, **__):
        raise Preempted("now")

    monkeypatch.setattr(checkpoints.ocp.CompositeCheckpointHandler, "restore", interrupted)
    with pytest.raises(Preempted):
        checkpoints.Checkpoints(run.checkpoints(EXPERT), keep=2).restore(None)
    assert checkpoints.Checkpoints(run.checkpoints(EXPERT), keep=2).steps() == steps


def test_a_checkpoint_that_is_not_finite_is_not_resumed_from(micro, run, trained, caplog):
    shutil.copytree(trained.checkpoints(EXPERT), run.checkpoints(EXPERT))
    step, state, position, clocks = final_checkpoint(run, micro)
    poisoned = dataclasses.replace(state, ema=jax.tree.map(lambda a: a * np.nan, state.ema))
    saved = checkpoints.Checkpoints(run.checkpoints(EXPERT), keep=2)
    older = saved.steps()[-2]
    saved._manager.delete(step)
    saved.save(step, poisoned, position, clocks)
    saved.close()
    with caplog.at_level("INFO"):
        stage.train(micro, run, EXPERT)
    assert f"checkpoint of step {step} in" in caplog.text and "it holds values that are not finite" in caplog.text
    assert f"resumes from step {older}" in caplog.text
    assert_same_training(run, trained, micro)


def test_a_role_is_trained_by_one_process_at_a_time(micro, run):
    """A second one, as after the loss of a launcher that left its roles running, would write over the first."""
    experiment = with_training(micro, steps=5000, checkpoint_every_steps=5000)
    reclaimed(run, experiment)
    process = subprocess.Popen(command(run, experiment, "--role=expert", "--cluster=0"), stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not metrics.read(run.role(EXPERT) / "metrics.jsonl"):
            time.sleep(0.05)
        with pytest.raises(UserError, match=f"experts/0 is being written by process {process.pid} \\(paris-jax"):
            stage.train(experiment, run, EXPERT)
    finally:
        process.kill()
        process.wait()
    with run.only_writer(EXPERT):
        pass


@pytest.mark.parametrize("others", ["deleted", "unreadable"])
def test_an_expert_needs_its_own_cluster_folder_only(others, micro, run, trained):
    """Every other folder is deleted, or holds rubbish; the result is the same, bit for bit."""
    for folder in (run.data, run.validation, run.test, run.cluster(1), run.cluster(2)):
        if others == "deleted":
            shutil.rmtree(folder)
        else:
            overwrite(folder)
    for name in ("manifest.json", "assignment.json", "centroids.safetensors", "report.json"):
        (run.partition / name).unlink(missing_ok=True)
    run.config.unlink()
    stage.train(micro, run, EXPERT)
    assert export_bytes(run) == export_bytes(trained)


@pytest.mark.exhaustive
def test_results_do_not_depend_on_the_number_of_devices(micro, run, caplog):
    """Eight devices, as 2 x 4 (data x fsdp): the same losses in float32; test_sharding.py has more ways to split.

    A checkpoint made on one device goes on upon eight, and one made on eight goes on upon one.
    """
    config = dataclasses.replace(micro.network, hidden=128, heads=8)
    experiment = with_training(dataclasses.replace(micro, network=config), global_batch_size=8, log_every_steps=1)

    def train_here(name):
        job = make_job(experiment, RunFolder(run.path / name), EXPERT, manifest.read(run.cluster(0), ClusterManifest))
        train.train(job, lambda part, parts: training_batches(run.cluster(0), 8, 0, part, parts))

    def losses(name):
        return [line["loss"] for line in metrics.read(RunFolder(run.path / name).metrics(EXPERT))]

    def stopped_at_the_eighth_step(name, was):
        shutil.copytree(run.path / was, run.path / name)
        shutil.rmtree(RunFolder(run.path / name).checkpoints(EXPERT) / "12")

    train_here("one")
    stopped_at_the_eighth_step("one, then eight", "one")
    script = """
import logging, sys, jax
from paris_jax.config.experiment import Experiment
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import ClusterManifest
from paris_jax.training import job as jobs
from paris_jax.training.train import train
from paris_jax.data.loader import training_batches
from tests.conftest import micro_config

logging.basicConfig(level="INFO", force=True)
assert jax.device_count() == 8
for name in ("2 x 4", "one, then eight"):
    config = micro_config()
    config.training.update(global_batch_size=8, log_every_steps=1, fsdp=4)
    config.network.hidden = 128
    config.network.heads = 8
    experiment = Experiment.from_config(config)
    run = RunFolder(sys.argv[1])
    data = manifest.read(run.cluster(0), ClusterManifest)
    job = jobs.make_job(experiment, RunFolder(f"{sys.argv[1]}/{name}"), Role("expert", 0), data)
    train(job, lambda part, parts: training_batches(run.cluster(0), 8, 0, part, parts))
"""
    repository = Path(__file__).parents[2]
    flags = f"--xla_force_host_platform_device_count=8 {QUICK}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{repository}"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)], env=environment, capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 0, done.stderr[-2000:]
    stopped_at_the_eighth_step("eight, then one", "2 x 4")
    with caplog.at_level("INFO"):
        train_here("eight, then one")
    assert caplog.text.count("resumes from step 8") == done.stderr.count("resumes from step 8") == 1
    for name in ("2 x 4", "one, then eight", "eight, then one"):
        np.testing.assert_allclose(losses(name), losses("one"), rtol=1e-5)


def test_a_finished_role_is_not_trained_again(micro, trained, caplog):
    before = {p: p.stat().st_mtime_ns for p in Path(trained.role(EXPERT)).rglob("*")}
    with caplog.at_level("INFO"):
        stage.train(micro, trained, EXPERT)
    assert "trained already" in caplog.text
    assert before == {p: p.stat().st_mtime_ns for p in Path(trained.role(EXPERT)).rglob("*")}


def overwrite(folder):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")


def test_an_unreadable_checkpoint_falls_back_aloud_and_none_readable_is_refused(micro, run, trained, caplog):
    shutil.copytree(trained.role(EXPERT), run.role(EXPERT))
    shutil.rmtree(run.export(EXPERT))
    steps = sorted(int(p.name) for p in Path(run.checkpoints(EXPERT)).iterdir())
    assert steps == [8, 12]
    overwrite(run.checkpoints(EXPERT) / "12")
    with caplog.at_level("INFO"):
        stage.train(micro, run, EXPERT)
    assert "step 12" in caplog.text and "older" in caplog.text
    assert "resumes from step 8" in caplog.text
    assert export_bytes(run) == export_bytes(trained)

    shutil.rmtree(run.export(EXPERT))
    for step in (8, 12):
        overwrite(run.checkpoints(EXPERT) / str(step))
    with pytest.raises(UserError, match="none can be read"):
        stage.train(micro, run, EXPERT)


def test_a_checkpoint_that_cannot_be_read_for_a_moment_is_waited_for(micro, run, trained, caplog, monkeypatch):
    """A disk on a network that does not answer is no reason to give up the newest state."""
    shutil.copytree(trained.role(EXPERT), run.role(EXPERT))
    shutil.rmtree(run.export(EXPERT))
    read, tried = ocp.CompositeCheckpointHandler.restore, []

    def failing_twice(handler, directory, args):
        tried.append(directory.name)
        if len(tried) <= 2:
            raise OSError(errno.EIO, "Input/output error")
        return read(handler, directory, args)

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "restore", failing_twice)
    monkeypatch.setattr(checkpoints, "PAUSES", (0.01, 0.01))
    stage.train(micro, run, EXPERT)
    assert tried == 3 * ["12"] and "again in 0.01 seconds" in caplog.text
    assert sorted(int(p.name) for p in Path(run.checkpoints(EXPERT)).iterdir()) == [8, 12]
    assert export_bytes(run) == export_bytes(trained)


def test_the_newest_checkpoints_and_every_so_many_are_kept(micro, run):
    experiment = with_training(micro, steps=14, checkpoint_every_steps=2, max_to_keep=2, keep_period=6)
    reclaimed(run, experiment)
    stage.train(experiment, run, EXPERT)
    assert sorted(int(p.name) for p in Path(run.checkpoints(EXPERT)).iterdir()) == [6, 12, 14]


def test_a_loss_that_is_not_finite_stops_names_its_clips_and_keeps_the_last_good_state(micro, run, monkeypatch):
    real = train.sharding.place_batch
    latents = []

    def poisoned(batch, mesh):
        latents.append(batch["latent"])
        return real(batch | ({"latent": batch["latent"] * np.nan} if len(latents) == 7 else {}), mesh)

    monkeypatch.setattr(train.sharding, "place_batch", poisoned)
    with pytest.raises(
        UserError, match=r"not finite at step 7 \(clips .*\); the checkpoint of step 4 is kept"
    ) as refusal:
        stage.train(micro, run, EXPERT)
    assert final_checkpoint(run, micro)[0] == 4
    named = re.search(r"\(clips (.*?)\)", str(refusal.value)).group(1).split(", ")
    clips = {record.id: record.latent for record in read_records(run.cluster(0))}
    np.testing.assert_array_equal(np.stack([clips[name] for name in named]), latents[6])


@pytest.mark.parametrize("role", [EXPERT, Role("router"), Role("monolith")], ids=lambda role: role.name)
def test_a_step_is_compiled_for_the_batches_that_the_loader_makes(role, micro, run):
    """In the dtypes of the records: nothing is widened, or moved that the role does not read, before the device."""
    folders = [run.cluster(k) for k in ([0] if role.cluster == 0 else range(3))]
    job = make_job(micro, run, role, manifest.read(folders[0], ClusterManifest))
    batch = next(batch_iterator(job, folders)(0, 1))
    expected = {name: (leaf.shape, leaf.dtype) for name, leaf in ShardedStep(job).batch().items()}
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == expected
    assert ("tokens" in batch) == (role.kind != "router") and batch["latent"].dtype == np.float16


def test_experts_of_one_architecture_are_one_program(micro, run):
    """So the compilation cache, which all jobs of a machine share, holds it after the first of them."""
    jobs = [make_job(micro, run, Role("expert", k), manifest.read(run.cluster(k), ClusterManifest)) for k in (0, 2)]
    first, other = (ShardedStep(job).lower().as_text() for job in jobs)
    assert first == other


def test_steps_that_will_not_come_cannot_be_profiled(micro, run):
    with pytest.raises(UserError, match=r"--profile_steps=10:13: expert 0 has 12 steps"):
        stage.train(micro, run, EXPERT, profile=(10, 13))


def test_chosen_steps_are_profiled(micro, run):
    stage.train(micro, run, EXPERT, profile=(2, 4))
    (trace,) = Path(run.role(EXPERT) / "profile").rglob("*.xplane.pb")
    events = [event.name for plane in jax.profiler.ProfileData.from_file(str(trace)).planes for line in plane.lines
              for event in line.events]  # fmt: skip
    assert events.count("train") == 2
    overview, _ = raw_to_tool_data.xspace_to_tool_data([str(trace)], "overview_page", {})
    timed = next(table for table in json.loads(overview) if "device_compute_time_ms_avg" in table.get("p", {}))
    assert len(timed["rows"]) == 2  # xprof's own reading: a row a step


def test_a_cluster_smaller_than_a_batch_is_refused(micro, run):
    experiment = with_training(micro, global_batch_size=64)
    reclaimed(run, experiment)
    with pytest.raises(UserError, match=r"Cluster 0 .* fewer than one batch of 64"):
        stage.train(experiment, run, EXPERT)


def test_a_missing_or_foreign_cluster_is_refused_with_the_way_out(micro, run):
    shutil.rmtree(run.cluster(1))
    with pytest.raises(UserError, match="paris-jax cluster"):
        stage.train(micro, run, Role("expert", 1))
    other = with_training(micro, learning_rate=0.5)
    with pytest.raises(UserError, match=r"another config \(different: training.learning_rate\)"):
        stage.train(other, run, EXPERT)


@pytest.mark.parametrize(
    "role, named",
    [(Role("expert", 3), "--cluster=3"), (Role("expert"), "--cluster"), (Role("router", 1), "leave it out")],
)
def test_an_impossible_role_is_refused(role, named, micro, run):
    with pytest.raises(UserError, match=named):
        stage.train(micro, run, role)


def test_both_arms_cost_the_same_compute(micro, trained):
    """Invariant 8: sum over experts of steps x batch x FLOPs per sample is the monolith's."""

    def work(role):
        training = manifest.read(trained.export(role), NetworkManifest).training
        return training.steps * training.global_batch_size * training.flops_per_sample

    assert sum(work(Role("expert", k)) for k in range(3)) == work(Role("monolith"))


def test_the_flop_formula_is_the_compilers_count():
    """Against XLA's own count of an unrolled network, to the share that is not matrix products."""
    from paris_jax.config.network import NetworkSettings
    from paris_jax.models import functional

    network = NetworkSettings(preset="small", hidden=128, heads=2, double_blocks=1, single_blocks=1)
    config = functional.network_config(network, channels=16, text_width=64, pooled_width=64)
    shape, length = (4, 16, 16, 16), 32
    arguments = [
        jax.ShapeDtypeStruct((1, *shape), "float32"),
        jax.ShapeDtypeStruct((1,), "float32"),
        jax.ShapeDtypeStruct((1, length, 64), "float32"),
        jax.ShapeDtypeStruct((1,), "int32"),
        jax.ShapeDtypeStruct((1, 64), "float32"),
    ]
    compiled = (
        jax.jit(lambda p, *a: functional.apply(config, p, *a)).lower(functional.abstract(config), *arguments).compile()
    )
    counted = compiled.cost_analysis()["flops"]
    assert 0.9 < flops.forward_flops(config, shape, length) / counted <= 1.0


def test_metrics_tell_loss_by_time_norms_and_speed(trained):
    lines = metrics.read(trained.role(EXPERT) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 12]
    wanted = {"loss", "grad_norm", "update_norm", "param_norm", "learning_rate", "seconds_per_step", "data_wait"}
    assert wanted <= lines[0].keys() and any(name.startswith("loss_t/") for name in lines[0])
    assert list(Path(trained.role(EXPERT) / "tensorboard").glob("events*"))
    assert max(line["seconds_per_step"] for line in lines) < 1.0  # the compiler's time is not in it
    assert max(line["data_wait"] for line in lines) <= 1.0
    assert json.dumps(lines)


def test_the_exported_weights_are_the_average_of_the_final_state(micro, trained):
    exported = safetensors.numpy.load(export_bytes(trained))
    _, state, _, _ = final_checkpoint(trained, micro)
    np.testing.assert_array_equal(exported["video_in.kernel"], state.ema["video_in"]["kernel"])
    assert not np.array_equal(exported["video_in.kernel"], state.params["video_in"]["kernel"])


def test_the_average_starts_at_the_parameters():
    settings = TrainingSettings(ema_decay=0.99)
    assert float(optimizer.ema_decay(settings, 0)) == pytest.approx(0.1)
    assert float(optimizer.ema_decay(settings, 10_000)) == pytest.approx(0.99)


@pytest.mark.parametrize("width, power", [(0.05, 16.97), (0.1, 6.94)])  # as published
def test_a_horizon_may_be_a_share_of_training(width, power):
    """The weights that updates end up with have this standard deviation, as a share of all updates."""
    assert optimizer.ema_power(width) == pytest.approx(power, abs=0.01)
    settings, steps = TrainingSettings(ema_sigma_rel=width), 4000
    decays = np.asarray([optimizer.ema_decay(settings, step) for step in range(steps)])
    assert decays[0] == 0  # the first update replaces what training began with
    weights = (1 - decays) * np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)
    places = np.arange(steps) / steps
    mean = (weights * places).sum()
    assert weights.sum() == pytest.approx(1.0, abs=1e-6)
    assert np.sqrt((weights * (places - mean) ** 2).sum()) == pytest.approx(width, rel=0.01)


def test_a_full_disk_is_refused_and_training_resumes_once_there_is_room(micro, run, trained):
    """No file may grow beyond 40 kB, as on a disk that fills while a checkpoint is written."""
    arguments = command(run, micro, "--role=expert", "--cluster=0")
    limited = ["bash", "-c", "trap '' XFSZ; ulimit -f 40; exec \"$@\"", "bash", *arguments]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # its files would hit the limit too
    done = subprocess.run(limited, capture_output=True, text=True, env=environment)
    assert done.returncode == 1, done.stderr[-3000:]
    assert done.stderr.strip().splitlines()[-1].startswith("error: Cannot save"), done.stderr[-3000:]
    assert "Event loop is closed" not in done.stderr
    assert not manifest.exists(run.export(EXPERT))
    subprocess.run(arguments, check=True, capture_output=True)
    assert export_bytes(run) == export_bytes(trained)


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_writing(micro, run, monkeypatch):
    full = shutil.disk_usage(run.path)._replace(free=1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: full)
    with pytest.raises(
        UserError, match=r"Cannot save the checkpoint of step 4 .* takes \d+ bytes and the disk has 1000 left"
    ):
        stage.train(micro, run, EXPERT)
    assert not list(Path(run.checkpoints(EXPERT)).iterdir())
