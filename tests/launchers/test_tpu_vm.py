"""Cloud TPU VMs: slices, queues of roles over them, and jobs that outlive the terminal that started them."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paris_jax.errors import UserError
from paris_jax.launchers import tpu_vm
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.tpu_vm import Settings, make_slices

ROOT = Path(__file__).parents[2]
TWO = Settings(project="p", slices=2, type="v5litepod-16,v6e-8", zones="us-central1-a,europe-west4-b")


def test_by_default_each_role_has_a_slice(plan):
    slices = make_slices(plan, Settings(project="p", type="v5litepod-4", zones="a,b"))
    assert [[stage.name for stage in each.queue] for each in slices] == [
        ["monolith"], ["expert 0"], ["expert 1"], ["expert 2"], ["router"]
    ]  # fmt: skip
    assert [each.zone for each in slices] == ["a", "b", "a", "b", "a"]


def test_roles_queue_over_fewer_slices_of_mixed_hardware(plan):
    slow, fast = make_slices(plan, TWO)
    assert (slow.type, slow.zone, slow.runtime) == ("v5litepod-16", "us-central1-a", "v2-alpha-tpuv5-lite")
    assert (fast.type, fast.zone, fast.runtime) == ("v6e-8", "europe-west4-b", "v2-alpha-tpuv6e")
    assert fast.speed == 8 * 918 and slow.speed == 16 * 197
    assert fast.queue[0].name == "monolith"  # the longest on the fastest
    assert sum(stage.work for stage in fast.queue) > sum(stage.work for stage in slow.queue) > 0


@pytest.mark.parametrize("type, devices", [("v5litepod-16", 16), ("v6e-8", 8), ("v5p-16", 8), ("v4-32", 16)])
def test_devices_of_a_slice(plan, type, devices):
    assert make_slices(plan, Settings(project="p", type=type, zones="z"))[0].devices == devices


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (Settings(type="v5litepod-4", zones="z"), "--project is missing"),
        (Settings(project="p", type="v7-4", zones="z"), "--type=v7-4: must be an accelerator type of v4, v5litepod"),
        (Settings(project="p", type="v5p", zones="z"), "--type=v5p: must be"),
        (Settings(project="p", type="v6e-8", zones="z", slices=2, slice=2), "--slice=2: the slices are 0 to 1"),
    ],
)
def test_missing_or_wrong_flags_are_refused(plan, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        tpu_vm.launch("train", plan, settings, Commands(dry_run=True))


def test_a_run_folder_that_slices_cannot_reach_is_refused(plan):
    with pytest.raises(UserError, match="--workdir=runs/x: must be a gs:// folder"):
        make_slices(dataclasses.replace(plan, workdir="runs/x"), TWO)


STATES = """
case "$*" in
  *describe*) cat $STATE/$5 2>/dev/null || exit 1 ;;
  *queued-resources\\ create*) echo ACTIVE >$STATE/$5 ;;
esac
"""


@pytest.fixture
def cloud(stand_in, tmp_path, monkeypatch):
    """gcloud with slices whose states are files."""
    (tmp_path / "states").mkdir()
    monkeypatch.setenv("STATE", str(tmp_path / "states"))
    return stand_in("gcloud", STATES)


def test_slices_are_created_once(plan, cloud, capfd):
    tpu_vm.launch("create", plan, TWO, Commands())
    tpu_vm.launch("create", plan, TWO, Commands())
    created = [call for call in cloud() if " create " in call]
    assert sorted(call.split()[5] for call in created) == ["shapes-0", "shapes-1"]
    assert "[shapes-1] is requested already" in capfd.readouterr().out


def test_a_failed_slice_is_an_error_and_the_others_continue(plan, cloud, tmp_path):
    (tmp_path / "states/shapes-0").write_text("FAILED")
    with pytest.raises(UserError, match="create failed for shapes-0; see"):
        tpu_vm.launch("create", plan, TWO, Commands())
    assert (tmp_path / "states/shapes-1").read_text() == "ACTIVE\n"


def test_one_role_or_one_slice_alone(plan, cloud):
    tpu_vm.launch("train", plan, TWO, Commands(), role="router")
    (call,) = cloud()
    assert "--role=router" in call and "--role=expert" not in call
    tpu_vm.launch("delete", plan, dataclasses.replace(TWO, slice=1), Commands())
    assert cloud()[-1].startswith("gcloud compute tpus queued-resources delete shapes-1 ")
    assert len(cloud()) == 2


@pytest.fixture
def worker(tmp_path):
    """A worker with this checkout's scripts and a stand-in for the package, whose stages wait for files."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path}/stage.py "$@"\n')
    python.chmod(0o755)
    (tmp_path / "stage.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "role = sys.argv[-2].partition('=')[2]\n"
        "print('begin', role, os.environ['PARIS_JAX_JOIN_HOSTS'], *sys.argv[2:4], sys.argv[-1], flush=True)\n"
        "while role == 'long':\n    time.sleep(0.05)\n"
        "sys.exit(role == 'refused')\n"
    )

    def run(*arguments):
        command = [str(tmp_path / "launch/detached.sh"), *arguments]
        done = subprocess.run(command, cwd="/", env=os.environ, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    yield run
    run("stop")


def until(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_queue_outlives_its_terminal_and_a_refused_stage_does_not_stop_the_next(worker):
    assert worker("status") == "nothing was started\n"
    said = worker("start", "tpu:8", "train '--workdir=my run' --role=refused", "train --role=router")
    assert said.startswith("started: 2 stage(s) in the background")
    until(lambda: worker("status").startswith("ended"))
    assert worker("status") == "ended; exit code 1 of: train '--workdir=my run' --role=refused\n"
    lines = [line for line in worker("logs").splitlines() if line.startswith("begin")]
    assert lines == [
        "begin refused 1 paris_jax.launchers.supervisor loop --preflight=tpu:8",
        "begin router 1 paris_jax.launchers.supervisor loop --preflight=tpu:8",
    ]


def test_a_running_queue_is_not_started_twice_and_stops_after_saving(worker):
    worker("start", "tpu:8", "train --role=long", "train --role=router")
    until(lambda: worker("status") == "running: train --role=long\n")
    until(lambda: "begin long" in worker("logs"))
    assert worker("start", "tpu:8", "train --role=router").startswith("a queue is running already (running: train")
    assert worker("stop") == "stopping; the running stage saves first\n"
    until(lambda: worker("status") == "stopped\n")
    assert "begin router" not in worker("logs")
    worker("start", "tpu:8", "train --role=router")  # a new start forgets the stop
    until(lambda: worker("status") == "ended: all done\n")


def test_slices_prepare_the_clips_together(plan, stand_in):
    calls = stand_in("gcloud")
    tpu_vm.launch("data", plan, dataclasses.replace(TWO, prepare_workers=2), Commands())
    ran = [call for call in calls() if "ssh" in call]
    assert sorted(call.split("ssh ")[1].split()[0] for call in ran[:2]) == ["shapes-0", "shapes-1"]
    assert all(f"--shard={call.split('ssh shapes-')[1][0]}/2" in call for call in ran[:2])
    assert len(ran) == 3 and "shapes-0" in ran[2] and "--shard" not in ran[2]
    with pytest.raises(UserError, match="--prepare_workers=3: must be at most 2, the number of slices"):
        tpu_vm.launch("data", plan, dataclasses.replace(TWO, prepare_workers=3), Commands())
