"""The local launcher with a stand-in for paris-jax: order, devices, restarts, and one refusal that stops all."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCHER = Path(__file__).parents[2] / "launch/local.py"
FLAGS = ("--config=configs/shapes.py:small", "--workdir=runs/x", "--experts=2")
ROLES = ["expert 0", "expert 1", "router", "monolith"]

# Logs start and end of each call. PLAN says what a role does: {"router": [75, 0]} are its exit codes in turn.
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
flags = dict(f[2:].split("=", 1) for f in sys.argv[2:])
name = sys.argv[1] if sys.argv[1] != "train" else (flags["role"] + " " + flags.get("cluster", "")).strip()
log = pathlib.Path(os.environ["LOG"])
def say(event):
    watched = ("CUDA_VISIBLE_DEVICES", "TPU_VISIBLE_CHIPS", "TPU_CHIPS_PER_PROCESS_BOUNDS")
    seen = {{name: os.environ[name] for name in watched if name in os.environ}}
    with log.open("a") as file:
        file.write(json.dumps([name, event, seen, sys.argv[1:]]) + "\\n")
def preempted(*_):
    say("saved")
    os._exit(75)
signal.signal(signal.SIGTERM, preempted)
earlier = sum(json.loads(line)[:2] == [name, "start"] for line in log.read_text().splitlines()) if log.exists() else 0
say("start")
print("working on", name, flush=True)
plan = json.loads(os.environ.get("PLAN", "{{}}")).get(name, [0])
code = plan[min(earlier, len(plan) - 1)]
time.sleep(30 if code == "long" else float(os.environ.get("SECONDS_EACH", "0")))
say("end")
sys.exit(code)
"""


@pytest.fixture
def launch(tmp_path):
    program = tmp_path / "bin/paris-jax"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
    }
    environment.pop("CUDA_VISIBLE_DEVICES", None)

    def start(*flags: str, plan: dict | None = None, seconds: float = 0) -> subprocess.Popen:
        extra = {"PLAN": json.dumps(plan or {}), "SECONDS_EACH": str(seconds)}
        # Not this environment's Python, which has the real paris-jax beside it; the launcher needs no package.
        command = [sys._base_executable, str(LAUNCHER), *FLAGS, *flags]
        return subprocess.Popen(
            command, env=environment | extra, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def finish(*flags: str, **options) -> tuple[int, str, list[list]]:
        process = start(*flags, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out + err, events(tmp_path)

    finish.start = start
    return finish


def events(tmp_path: Path) -> list[list]:
    log = tmp_path / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_on_one_device_everything_runs_in_turn(launch):
    code, _, log = launch("--devices=cpu", "--config.training.steps=7")
    assert code == 0
    assert [(name, event) for name, event, *_ in log] == [
        (name, event) for name in ["prepare", "cluster", *ROLES, "assemble", "evaluate"] for event in ("start", "end")
    ]
    assert all(seen == {} for _, _, seen, _ in log)
    arguments = {name: arguments for name, _, _, arguments in log}
    assert arguments["expert 1"] == [
        *("train", "--config=configs/shapes.py:small", "--config.training.steps=7", "--workdir=runs/x"),
        *("--role=expert", "--cluster=1"),
    ]
    assert arguments["assemble"] == ["assemble", "--workdir=runs/x"]


def test_roles_run_side_by_side_on_disjoint_devices(launch):
    code, output, log = launch("--devices=gpu:0,1,2,3,4,5,6,7", seconds=0.5)
    assert code == 0
    roles = [entry for entry in log if entry[0] in ROLES]
    assert {event for _, event, *_ in roles[:4]} == {"start"}, "all four start before one ends"
    given = [set(seen["CUDA_VISIBLE_DEVICES"].split(",")) for _, event, seen, _ in roles if event == "start"]
    assert all(len(group) == 2 for group in given)
    assert set.union(*given) == set("01234567")
    assert "[monolith] working on monolith" in output
    assert [seen for name, _, seen, _ in log if name not in ROLES] == [{}] * 8


def test_more_roles_than_devices_wait_for_a_free_one(launch):
    code, _, log = launch("--devices=gpu:4,6", seconds=0.3)
    assert code == 0
    busy: dict[str, str] = {}
    for name, event, seen, _ in log:
        if name in ROLES and event == "start":
            assert seen["CUDA_VISIBLE_DEVICES"] not in busy
            busy[seen["CUDA_VISIBLE_DEVICES"]] = name
        elif name in ROLES:
            assert busy.pop(seen["CUDA_VISIBLE_DEVICES"]) == name
    assert sorted(name for name, event, *_ in log if name in ROLES and event == "end") == sorted(ROLES)


def test_tpu_chips_are_told_to_libtpu(launch):
    _, _, log = launch("--devices=tpu:0,1,2,3,4,5,6,7")
    groups = {
        seen["TPU_VISIBLE_CHIPS"]: seen["TPU_CHIPS_PER_PROCESS_BOUNDS"] for name, _, seen, _ in log if name in ROLES
    }
    assert groups == dict.fromkeys(["0,1", "2,3", "4,5", "6,7"], "1,2,1")


def test_a_preempted_role_starts_again(launch):
    code, output, log = launch("--devices=cpu", plan={"router": [75, 75, 0]})
    assert code == 0
    assert sum(name == "router" and event == "start" for name, event, *_ in log) == 3
    assert output.count("router was preempted; starting it again") == 2
    assert log[-1][:2] == ["evaluate", "end"]


def test_a_refused_role_stops_the_others_which_save(launch):
    started = time.monotonic()
    plan = {"expert 1": [1], "router": ["long"], "monolith": ["long"], "expert 0": ["long"]}
    code, output, log = launch("--devices=gpu:0,1,2,3", plan=plan, seconds=0.5)
    assert code == 1
    assert "expert 1 ended with exit code 1" in output
    assert time.monotonic() - started < 20
    assert {name for name, event, *_ in log if event == "saved"} == {"router", "monolith", "expert 0"}
    assert not {"assemble", "evaluate"} & {name for name, *_ in log}


def test_a_refused_stage_ends_it_there(launch):
    code, _, log = launch("--devices=cpu", plan={"cluster": [1]})
    assert code == 1
    assert [name for name, event, *_ in log if event == "start"] == ["prepare", "cluster"]


def test_stopping_the_launcher_stops_the_jobs_and_says_preempted(launch, tmp_path):
    process = launch.start("--devices=gpu:0,1,2,3", plan={role: ["long"] for role in ROLES})
    deadline = time.monotonic() + 30
    while sum(event == "start" for _, event, *_ in events(tmp_path)) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert sorted(name for name, event, *_ in events(tmp_path) if event == "saved") == sorted(ROLES)


def test_dry_run_prints_the_commands_and_runs_none(launch):
    code, output, log = launch("--devices=gpu:0,1,2", "--dry_run")
    assert code == 0
    assert log == []
    config = "--config=configs/shapes.py:small --workdir=runs/x"
    assert output.splitlines() == [
        f"paris-jax prepare {config}",
        f"paris-jax cluster {config}",
        "",
        "# 3 at a time:",
        f"CUDA_VISIBLE_DEVICES=0 paris-jax train {config} --role=monolith",
        f"CUDA_VISIBLE_DEVICES=1 paris-jax train {config} --role=expert --cluster=0",
        f"CUDA_VISIBLE_DEVICES=2 paris-jax train {config} --role=expert --cluster=1",
        "# then, on the devices of the first that is done:",
        f"paris-jax train {config} --role=router",
        "",
        "paris-jax assemble --workdir=runs/x",
        f"paris-jax evaluate {config}",
    ]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--devices=gpu:0,0",), "--devices=gpu:0,0: must name different devices"),
        (("--devices=gpu",), "--devices=gpu: must be auto, cpu"),
        (("--experts=0",), "--experts=0: must be at least 1"),
        (("--batch=3",), "--batch=3 is unknown"),
    ],
)
def test_refuses_wrong_flags(launch, flags, sentence):
    code, output, log = launch(*flags)
    assert code == 1
    assert sentence in output
    assert log == []
