"""What follows the end of a command: run again, put back into the queue, or never again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from paris_jax.errors import UserError
from paris_jax.launchers import supervisor
from paris_jax.launchers.supervisor import Outcome, count_memory_kills, is_again, role_folder, supervise

TRAIN = ("train", "--workdir=RUN", "--role=router")


@pytest.fixture
def role(tmp_path):
    return epath.Path(tmp_path / "router")


@pytest.mark.parametrize(
    "code, seconds, again",
    [(0, 1e4, False), (1, 1e4, False), (75, 0, True), (134, 299, False), *((c, 301, True) for c in (134, 137, 143))],
)
def test_preempted_and_lost_commands_run_again(code, seconds, again, role):
    assert is_again(Outcome(code, seconds), role) is again


def test_only_training_is_repeated_after_a_loss():
    assert not is_again(Outcome(137, 1e4), None)
    assert is_again(Outcome(75, 0.0), None)


def test_a_command_that_was_killed_for_memory_is_not_repeated(role):
    with pytest.raises(UserError, match="host ran out of memory"):
        is_again(Outcome(137, 1e4, out_of_memory=True), role)
    assert is_again(Outcome(75, 1e4, out_of_memory=True), role)  # somebody else's


def test_losses_without_a_checkpoint_in_between_end(role):
    lost = Outcome(137, 1e4)
    assert is_again(lost, role) and is_again(lost, role)
    (role / "checkpoints" / "40").mkdir(parents=True)
    assert is_again(lost, role) and is_again(lost, role)  # it counts from one again
    with pytest.raises(UserError, match=r"router was lost 3 times without a new checkpoint"):
        is_again(lost, role)
    assert is_again(lost, role)  # somebody looked at it and started it again


def test_memory_kills_are_counted_by_the_first_file_that_does(tmp_path):
    cgroup, host = tmp_path / "memory.events", tmp_path / "vmstat"
    host.write_text("nr_free_pages 5\noom_kill 7\n")
    assert count_memory_kills([str(cgroup), str(host)]) == 7
    cgroup.write_text("low 0\nmax 3\noom 2\noom_kill 1\n")
    assert count_memory_kills([str(cgroup), str(host)]) == 1
    assert count_memory_kills([]) == 0


def test_the_role_folder_of_a_command():
    assert str(role_folder(TRAIN)) == "RUN/router"
    assert str(role_folder(("train", "--workdir=gs://b/r", "--role=expert", "--cluster=2"))) == "gs://b/r/experts/2"
    assert role_folder(("evaluate", "--workdir=RUN")) is None


class Ends:
    """Stands in for paris-jax: ends with each code in turn, and notes its arguments."""

    def __init__(self, folder, monkeypatch, codes):
        self.log = folder / "log"
        self.log.touch()
        body = f"import sys; log = open({str(self.log)!r}, 'a+'); log.seek(0); n = len(log.readlines())\n"
        body += f"print(*sys.argv[1:], file=log, flush=True)\nsys.exit({list(codes)}[n])"
        (folder / "ends.py").write_text(body)
        monkeypatch.setattr(supervisor, "PROGRAM", (sys.executable, str(folder / "ends.py")))
        monkeypatch.setenv(supervisor.LOST_AFTER, "0")

    @property
    def calls(self):
        return self.log.read_text().splitlines()


@pytest.fixture(autouse=True)
def usual_handlers():
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def command(tmp_path):
    return ("train", f"--workdir={tmp_path / 'run'}", "--role=router")


def test_the_supervisor_restarts_the_command_until_it_is_done(tmp_path, monkeypatch):
    ends = Ends(tmp_path, monkeypatch, [75, 137, 75, 0])
    assert supervise("loop", command(tmp_path), pause=lambda _: None) == 0
    assert ends.calls == [" ".join(command(tmp_path))] * 4


def test_a_loop_passes_errors_on(tmp_path, monkeypatch, capsys):
    ends = Ends(tmp_path, monkeypatch, [75, 1])
    assert supervise("loop", command(tmp_path), pause=lambda _: None) == 1
    assert len(ends.calls) == 2
    ends = Ends(tmp_path, monkeypatch, [137] * 9)
    assert supervise("loop", command(tmp_path), pause=lambda _: None) == 1
    assert "error: " in capsys.readouterr().err


def test_a_scheduler_that_restarts_jobs_sees_75_for_all_that_has_to_run_again(tmp_path, monkeypatch):
    Ends(tmp_path, monkeypatch, [143])
    assert supervise("exit", command(tmp_path)) == 75


def test_slurm_gets_the_job_back(tmp_path, monkeypatch, stand_in):
    calls = stand_in("scontrol")
    Ends(tmp_path, monkeypatch, [75, 1])
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    assert supervise("slurm", command(tmp_path), prefix=("env",)) == 75
    assert calls() == ["scontrol requeue 42"]
    assert supervise("slurm", command(tmp_path)) == 1
    assert calls() == ["scontrol requeue 42"]


def test_sigterm_reaches_the_command_and_ends_a_loop(tmp_path):
    saves = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('up', flush=True)"
    (tmp_path / "saves.py").write_text(saves + "; time.sleep(60)")
    start = f"from paris_jax.launchers import supervisor; supervisor.PROGRAM = ({sys.executable!r}, 'saves.py'); "
    process = subprocess.Popen(
        [sys.executable, "-c", start + "supervisor.main()", "loop", "evaluate"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert time.monotonic() - began < 20


def test_counts_are_kept_as_json_and_a_damaged_one_starts_again(role):
    is_again(Outcome(137, 1e4), role)
    count = role / "lost_processes.json"
    assert json.loads(count.read_text()) == {"step": -1, "times": 1}
    count.write_text("{")
    assert is_again(Outcome(137, 1e4), role)
    assert json.loads(count.read_text())["times"] == 1
