"""The launcher with a stand-in for paris-jax: order, restarts, one failure that stops all, being stopped."""

import json
import signal
import sys
import threading
import time

import pytest

from paris_jax.local_jobs.devices import Devices
from paris_jax.local_jobs.launcher import Launcher, LocalJob, last_words

NAMES = ["monolith", "expert 0", "expert 1", "router"]

# Notes the start and end of each call. PLAN says what a job does: {"router": [75, 0]} are its exit codes in turn.
STAND_IN = """
import json, os, pathlib, signal, sys, time
name = sys.argv[1]
notes = pathlib.Path(os.environ["NOTES"])
def note(event):
    seen = {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES", "PARIS_JAX_JOIN_HOSTS") if k in os.environ}
    with notes.open("a") as file:
        file.write(json.dumps([name, event, seen]) + "\\n")
def preempted(*_):
    note("saved")
    os._exit(75)
signal.signal(signal.SIGTERM, preempted)
earlier = sum(json.loads(line)[:2] == [name, "start"] for line in notes.read_text().splitlines())
note("start")
print("working on", name, flush=True)
plan = json.loads(os.environ["PLAN"]).get(name, [0])
code = plan[min(earlier, len(plan) - 1)]
time.sleep(60 if code == "long" else float(os.environ["SECONDS_EACH"]))
if code == 1:
    print("error: training.global_batch_size=7 does not divide", file=sys.stderr, flush=True)
    print("some library says goodbye", file=sys.stderr, flush=True)
if code == -9:
    os.kill(os.getpid(), signal.SIGKILL)
note("end")
sys.exit(code)
"""


class Trial:
    """Runs stand-ins on three made-up GPUs, unless other devices are given."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch, self.said = folder, monkeypatch, []
        (folder / "stand_in.py").write_text(STAND_IN)
        (folder / "notes").touch()
        monkeypatch.setenv("NOTES", str(folder / "notes"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        self.launcher = Launcher((sys.executable, str(folder / "stand_in.py")), self.said.append)

    def run(self, devices=("0", "1", "2", "3"), plan=None, seconds=0.0, watch=lambda: None):
        self.monkeypatch.setenv("PLAN", json.dumps(plan or {}))
        self.monkeypatch.setenv("SECONDS_EACH", str(seconds))
        jobs = [LocalJob(name, (name,), self.folder / f"{name}.log") for name in NAMES]
        groups = Devices("gpu", devices).groups([1.0] * len(jobs))
        self.launcher.run_side_by_side(jobs, groups, watch, every=0.05)
        return self.notes()

    def notes(self):
        return [json.loads(line) for line in (self.folder / "notes").read_text().splitlines()]


@pytest.fixture
def trial(tmp_path, monkeypatch):
    return Trial(tmp_path, monkeypatch)


def long(*names):
    """The part of a plan in which these jobs run until they are stopped."""
    return {name: ["long"] for name in names}


def named(notes, event):
    return [name for name, happened, _ in notes if happened == event]


def test_all_run_at_once_where_there_are_devices_for_all(trial):
    notes = trial.run(seconds=0.7)
    assert named(notes[:4], "start") and {event for _, event, _ in notes[:4]} == {"start"}
    assert sorted(seen["CUDA_VISIBLE_DEVICES"] for _, event, seen in notes if event == "start") == ["0", "1", "2", "3"]
    assert not trial.launcher.stopping
    assert trial.launcher.seconds.keys() == set(NAMES)


def test_more_jobs_than_devices_wait_for_a_free_one_in_their_order(trial):
    notes = trial.run(devices=("4", "6"), seconds=0.3)
    busy = {}
    for name, event, seen in notes:
        device = seen["CUDA_VISIBLE_DEVICES"]
        if event == "start":
            assert device not in busy
            busy[device] = name
        else:
            assert busy.pop(device) == name
    assert set(named(notes, "start")[:2]) == {"monolith", "expert 0"}
    assert sorted(named(notes, "end")) == sorted(NAMES)


def test_on_one_device_they_run_in_turn(trial):
    notes = trial.run(devices=("0",))
    assert [(name, event) for name, event, _ in notes] == [(n, e) for n in NAMES for e in ("start", "end")]


def test_a_job_joins_no_other_hosts_and_writes_to_its_log(trial):
    notes = trial.run(devices=("0",))
    assert {seen["PARIS_JAX_JOIN_HOSTS"] for _, _, seen in notes} == {"0"}
    header, line = (trial.folder / "router.log").read_text().splitlines()
    assert header.endswith("CUDA_VISIBLE_DEVICES=0 paris-jax router")
    assert line == "working on router"


def test_a_preempted_job_starts_again(trial):
    notes = trial.run(plan={"router": [75, 75, 0]})
    assert named(notes, "start").count("router") == 3
    assert trial.said == ["router was preempted; starting it again"] * 2
    assert not trial.launcher.stopping


def test_a_refused_job_stops_the_others_which_save(trial):
    began = time.monotonic()
    notes = trial.run(plan={"expert 1": [1]} | long("monolith", "expert 0", "router"), seconds=1)
    assert time.monotonic() - began < 30
    assert sorted(named(notes, "saved")) == ["expert 0", "monolith", "router"]
    assert str(trial.launcher.failure) == "expert 1: training.global_batch_size=7 does not divide"


def test_a_killed_job_stops_the_others_too(trial):
    trial.run(plan={"expert 1": [-9]} | long("monolith", "expert 0", "router"), seconds=1)
    assert str(trial.launcher.failure) == "expert 1 was killed by signal 9; often there is not enough memory"


def test_no_job_starts_after_a_failure(trial):
    notes = trial.run(devices=("0",), plan={"expert 0": [1]})
    assert named(notes, "start") == ["monolith", "expert 0"]


@pytest.mark.usefixtures("usual_interrupt")
def test_a_signal_stops_all_of_them_and_is_remembered(trial):
    def watch():
        if len(named(trial.notes(), "start")) == 4 and not trial.launcher.stopping:
            signal.raise_signal(signal.SIGINT)

    with trial.launcher.listening():
        notes = trial.run(plan=long(*NAMES), watch=watch)
    assert sorted(named(notes, "saved")) == sorted(NAMES)
    assert trial.launcher.stopped_by == signal.SIGINT
    assert trial.launcher.failure is None
    assert trial.said[0].startswith("stopping; saving first: ")
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the usual handler is back


def test_a_failure_of_the_watcher_leaves_no_process_behind(trial):
    def watch():
        if len(named(trial.notes(), "start")) == 4:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        trial.run(plan=long(*NAMES), watch=watch)
    assert sorted(named(trial.notes(), "saved")) == sorted(NAMES)


def test_a_program_that_cannot_be_started_is_an_error_not_a_hang(trial, tmp_path):
    trial.launcher.program, threads = (str(tmp_path / "nothing here"),), threading.active_count()
    with pytest.raises(FileNotFoundError):
        trial.run()
    assert threading.active_count() <= threads


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ""),
        ("== now paris-jax train\n", ""),
        ("== then\nrefused: old\n== now\n", ""),
        ("== now\nTraceback\nValueError: odd\n\n", "ValueError: odd"),
        ("== now\nerror: the field\ngoodbye\n", "error: the field"),
    ],
)
def test_the_last_words_are_those_of_the_last_start(tmp_path, text, words):
    if text is not None:
        (tmp_path / "log").write_text(text)
    assert last_words(tmp_path / "log") == words
