"""The whole job as a person starts it: every role a process of its own, stopped in the middle and started again."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import Role, RunFolder, roles
from paris_jax.local_jobs.launcher import Launcher
from paris_jax.local_jobs.progress import RoleBars
from paris_jax.local_jobs.quickstart import make_plan

ROLES = [
    role.name for role in (Role("monolith"), Role("expert", 0), Role("expert", 1), Role("expert", 2), Role("router"))
]
EXPERTS = 2  # of the quickstart that is run to its end


class Quickstart:
    """`paris-jax quickstart` of an experiment in a run folder, as a process."""

    def __init__(self, folder, experiment, *flags):
        self.run_folder = RunFolder(folder / "run")
        config = folder / "given.py"
        body = f"def get_config():\n    return ConfigDict({experiment.to_dict()!r})\n"
        config.write_text(f"from ml_collections import ConfigDict\n\n\n{body}")
        flags = (f"--config={config}", f"--workdir={self.run_folder}", *flags)
        self.command = [sys.executable, "-m", "paris_jax", "quickstart", *flags]

    def has_first_videos(self):
        """As if it had sampled the bundled ensemble already."""
        Path(self.run_folder.samples).mkdir(parents=True)
        Path(self.run_folder.samples / "bundled.mp4").touch()

    def start(self, *more):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*self.command, *more], text=True, **pipes)

    def end(self, process=None):
        """Exit code, stdout and stderr."""
        process = process or self.start()
        try:
            out, err = process.communicate(timeout=300)
        finally:
            process.terminate()  # its roles stop with it
        return process.returncode, out, err


def wait_until(happened, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def quick(micro, tmp_path_factory):
    """A quickstart from nothing that was stopped while roles trained, and then run to its end: (it, stopped, ended)."""
    flags = ("--config.training.steps=30", f"--config.clustering.num_clusters={EXPERTS}")
    quick = Quickstart(tmp_path_factory.mktemp("quick"), micro, *flags)
    process = quick.start()
    monolith = quick.run_folder.metrics(Role("monolith"))
    wait_until(lambda: monolith.exists() and monolith.read_text().count("\n") > 2, process)
    process.send_signal(signal.SIGTERM)
    stopped = quick.end(process)
    left = [role.name for role in roles(EXPERTS) if not manifest.exists(quick.run_folder.export(role))]
    return quick, (*stopped, left), quick.end()


def test_a_stopped_quickstart_saves_every_role_and_prints_how_to_resume(quick):
    _, (code, _, err, left), _ = quick
    assert code == 75
    assert err.splitlines()[-1].startswith("preempted: ")
    assert err.splitlines()[-1].endswith("run the same command again")
    assert "router" in left and "monolith" in left


def test_the_same_command_resumes_and_completes(quick):
    it, _, (code, out, err) = quick
    assert code == 0, err
    assert "prepare: done already" in out and "cluster: done already" in out
    run = it.run_folder
    assert "monolith resumes from step " in " ".join(run.log(Role("monolith")).read_text().split())
    assert all(manifest.exists(run.export(role)) and run.log(role).exists() for role in roles(EXPERTS))
    assert (run.samples / "quickstart.mp4").exists() and (run.samples / "bundled.mp4").exists()
    assert (run.evaluation / "report.html").exists()
    for stage in ("train", "assemble", "sample", "evaluate", "all"):
        assert f"│ {stage}" in out


def test_roles_that_train_at_the_same_time_have_cores_of_their_own(quick):
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core, or cores that cannot be given out")
    log = quick[0].run_folder.log
    monolith, expert = (log(role).read_text().splitlines()[0] for role in (Role("monolith"), Role("expert", 0)))
    first, second = sorted(os.sched_getaffinity(0))[:2]
    assert f" taskset -c {first} paris-jax train " in monolith
    assert f" taskset -c {second} paris-jax train " in expert


def test_a_finished_quickstart_trains_no_role_again(quick):
    it = quick[0]
    logs = [it.run_folder.log(role).read_text() for role in roles(EXPERTS)]
    code, out, err = it.end()
    assert code == 0
    assert out.count("done already") == 5 + EXPERTS
    assert "the evaluation is done already" in " ".join(err.split())
    assert [it.run_folder.log(role).read_text() for role in roles(EXPERTS)] == logs


def test_another_config_is_refused_before_any_job_starts(quick):
    it = quick[0]
    code, out, err = it.end(it.start("--config.training.seed=9"))
    assert code == 1
    assert err.startswith(f"error: {it.run_folder} was made with another config (different: training.seed)")
    assert out == ""


def test_the_error_of_a_failed_role_is_reported(micro, clustered, tmp_path):
    quick = Quickstart(tmp_path, micro)
    shutil.copytree(clustered.path, quick.run_folder.path)
    quick.has_first_videos()
    (missing,) = quick.run_folder.cluster(1).glob("*.array_record")
    missing.unlink()
    code, _, err = quick.end()
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert f"{missing} is missing though its manifest promises it" in last
    assert "train.log" in last and "run the same command again" in last
    assert not manifest.exists(quick.run_folder.ensemble)


def test_the_error_of_a_failed_stage_ends_the_quickstart(micro, tmp_path):
    quick = Quickstart(tmp_path, micro, "--config.clustering.num_clusters=40")
    quick.has_first_videos()
    code, out, err = quick.end()
    assert code == 1
    assert "error: config.clustering.num_clusters=40" in err.splitlines()[-1]
    assert "train" not in out


def test_control_c_ends_with_130(micro, tmp_path):
    quick = Quickstart(tmp_path, micro)
    process = quick.start()
    wait_until(quick.run_folder.config.exists, process)
    time.sleep(0.5)  # the first stage is on its way
    process.send_signal(signal.SIGINT)
    code, _, err = quick.end(process)
    assert code == 130
    assert err.splitlines()[-1] == "interrupted; run the same command again to resume"


def test_dry_run_prints_the_commands_and_their_devices(micro, tmp_path):
    quick = Quickstart(tmp_path, micro)
    code, out, _ = quick.end(quick.start("--devices=gpu:0,1,2", "--dry_run"))
    assert code == 0
    assert not quick.run_folder.path.exists()
    given = f"--config={tmp_path / 'given.py'} --workdir={quick.run_folder}"
    assert out.splitlines()[0].startswith("CUDA_VISIBLE_DEVICES=0 paris-jax sample --ensemble=bundled:shapes ")
    assert out.splitlines()[1:11] == [
        f"CUDA_VISIBLE_DEVICES=0 paris-jax prepare {given} --preflight=gpu:1",
        f"CUDA_VISIBLE_DEVICES=0 paris-jax cluster {given} --preflight=gpu:1",
        "",
        "# 3 side by side:",
        f"CUDA_VISIBLE_DEVICES=0 paris-jax train {given} --role=monolith --preflight=gpu:1",
        f"CUDA_VISIBLE_DEVICES=1 paris-jax train {given} --role=expert --cluster=0 --preflight=gpu:1",
        f"CUDA_VISIBLE_DEVICES=2 paris-jax train {given} --role=expert --cluster=1 --preflight=gpu:1",
        "# then, each on the next free group of devices:",
        f"paris-jax train {given} --role=expert --cluster=2",
        f"paris-jax train {given} --role=router",
    ]
    assert [line.split()[2] for line in out.splitlines()[12:]] == ["assemble", "sample", "evaluate"]


def test_all_of_eight_gpus_are_used(micro, tmp_path):
    quick = Quickstart(tmp_path, micro)
    _, out, _ = quick.end(
        quick.start("--devices=gpu:0,1,2,3,4,5,6,7", "--dry_run", "--config.training.global_batch_size=8")
    )
    roles = [line for line in out.splitlines() if " train " in line]
    assert [line.split()[0].partition("=")[2] for line in roles] == ["0,1,2,3", "4", "5", "6", "7"]
    assert roles[0].endswith("--role=monolith --preflight=gpu:4")


def test_a_plan_holds_the_remaining_jobs(micro, trained, tmp_path):
    nothing = make_plan(micro, RunFolder(tmp_path), ())
    assert [job.name for job in nothing.before] == ["first videos", "prepare", "cluster"]
    assert [job.name for job in nothing.roles.values()] == ROLES
    left = make_plan(micro, trained, ("--config.sampling.num_inference_steps=2",))
    assert not left.before and not left.roles
    assert [job.name for job in left.after] == ["sample", "evaluate"]
    assert left.after[-1].arguments == ("evaluate", "--config.sampling.num_inference_steps=2", f"--workdir={trained}")


class TestRoleBars:
    def show(self, micro, run, terminal=False):
        """The bars of all roles, their launcher, and what they have printed so far."""
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        launcher = Launcher((), print)
        return RoleBars(console, launcher, micro, run, roles(3)), launcher, console.file

    def line(self, run, role, step):
        run.metrics(role).parent.mkdir(parents=True, exist_ok=True)
        with run.metrics(role).open("a") as file:
            file.write(json.dumps({"step": step, "loss": 0.25, "seconds_per_step": 0.02}) + "\n")

    def printed(self, bars, shown):
        bars._lined = 0.0
        bars.update()
        return shown.getvalue().splitlines()[-1].split(" | ")

    def test_every_state_of_a_role(self, micro, tmp_path):
        run, role = RunFolder(tmp_path), Role("expert", 1)
        self.line(run, role, 4)  # of an earlier run that was stopped
        bars, launcher, shown = self.show(micro, run)
        with bars:
            assert self.printed(bars, shown)[:2] == ["expert 0 0/12 (waiting)", "expert 1 4/12 (waiting)"]
            launcher.began = {"expert 1": 0.0}
            assert "expert 1 4/12 (starting)" in self.printed(bars, shown)
            self.line(run, role, 8)
            assert "expert 1 8/12 (loss 0.2500, 20 ms a step)" in self.printed(bars, shown)
            self.line(run, role, 12)
            launcher.seconds = {"expert 1": 1.0}
            assert "expert 1 12/12 (done, loss 0.2500, 20 ms a step)" in self.printed(bars, shown)

    def test_an_incomplete_line_of_metrics_is_read_later(self, micro, tmp_path):
        run, role = RunFolder(tmp_path), Role("router")
        bars, launcher, shown = self.show(micro, run)
        launcher.began = {"router": 0.0}
        self.line(run, role, 4)
        with run.metrics(role).open("a") as file:
            file.write('{"step": 8, "lo')
        assert "router 4/12 (loss 0.2500, 20 ms a step)" in self.printed(bars, shown)

    def test_on_a_terminal_of_80_columns_each_role_is_one_line(self, micro, tmp_path):
        run = RunFolder(tmp_path)
        for role in roles(3):
            self.line(run, role, 4)
        bars, launcher, shown = self.show(micro, run, terminal=True)
        launcher.began = {role.name: 0.0 for role in roles(3)}
        for role in roles(3):
            self.line(run, role, 8)
        with bars:
            bars.update()
        last = shown.getvalue().split("expert 0")[-1]
        assert all(f"{name} " in last for name in ("expert 1", "expert 2", "router", "monolith"))
        assert last.count("loss 0.2500, 20 ms a step") == 5
