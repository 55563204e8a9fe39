"""Signals in every phase of a command, and outputs that cannot take what is written."""

import os
import signal
import subprocess
import sys
import time

import pytest

from paris_jax import cli

# Blocks in compiled code, in which Python runs no signal handler of the main thread.
BLOCK = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)'
# Where tests run behind a shell or nohup, Ctrl-C or SIGHUP may be ignored, and would be by the command.
HEAR = """
import hashlib, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
SIGNALS = [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """A Python process that hears Ctrl-C, with its standard error to read."""
    return subprocess.Popen(
        [sys.executable, "-c", HEAR + code, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )


def read_until(process: subprocess.Popen, text: str) -> str:
    assert process.stderr
    said = ""
    while text not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    time.sleep(0.3)  # from the line to the call after it
    return said


def end(process: subprocess.Popen) -> str:
    """What else a process says until it ends, which it is made to if need be."""
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_command_stopped_while_it_imports_ends_without_a_traceback(number, code):
    slow = """
import importlib.abc, time
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "paris_jax.cli":
            print("importing", file=sys.stderr, flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Slow())
from paris_jax.__main__ import main
main()
"""
    process = start(slow, "status")
    read_until(process, "importing")
    process.send_signal(number)
    rest = end(process)
    assert process.returncode == code and "Traceback" not in rest
    assert "run the same command again" in rest


@pytest.mark.parametrize("number, code", SIGNALS)
def test_plan_stops_while_it_compiles(number, code):
    slow = f"""
import jax
def compile(self):
    print("compiling", file=sys.stderr, flush=True)
    {BLOCK}
jax.stages.Lowered.compile = compile
from paris_jax.__main__ import main
main()
"""
    process = start(slow, "plan", "--config=configs/shapes.py:tiny", "--target=cpu:2", "--role=expert")
    read_until(process, "compiling")
    process.send_signal(number)
    rest = end(process)
    assert process.returncode == code and "Traceback" not in rest


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_inside_a_callback_of_the_garbage_collector_is_not_lost(number, code, tmp_path):
    lost = """
import gc, time
from paris_jax import cli
def collected(phase, info):
    if phase == "start" and not once:
        once.append(True)
        os.kill(os.getpid(), int(sys.argv.pop()))
        time.sleep(0.1)
once = []
def status(call):
    gc.callbacks.append(collected)
    gc.collect()
    time.sleep(60)
cli.COMMANDS["status"] = cli.COMMANDS["status"].__class__("", (), cli.COMMANDS["status"].define, status)
sys.argv, number = sys.argv[:-1], sys.argv[-1]
from paris_jax import __main__, cli
run = cli.run
cli.run = lambda arguments: (sys.argv.append(number), run(arguments))[1]
__main__.main()
"""
    process = start(lost, "status", f"--workdir={tmp_path}", str(int(number)))
    rest = end(process)
    assert process.returncode == code and "Traceback" not in rest, rest
    assert "run the same command again" in rest


BLOCKED = f"""
from paris_jax import cli, interrupts
interrupts.GRACE = 0.5
def status(call):
    print("blocked", file=sys.stderr, flush=True)
    {BLOCK}
cli.COMMANDS["status"] = cli.COMMANDS["status"].__class__("", (), cli.COMMANDS["status"].define, status)
from paris_jax.__main__ import main
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_in_compiled_code_ends_after_a_grace(number, tmp_path):
    process = start(BLOCKED, "status", f"--workdir={tmp_path}")
    read_until(process, "blocked")
    process.send_signal(number)
    rest = end(process)
    assert process.returncode == 75
    assert rest == "preempted; run the same command again\n"


def test_a_second_interrupt_ends_a_command_in_compiled_code(tmp_path):
    process = start(BLOCKED, "status", f"--workdir={tmp_path}")
    read_until(process, "blocked")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    rest = end(process)
    assert process.returncode == 130
    assert rest == "interrupted again; ended at once\n"


def test_a_hang_up_under_nohup_is_ignored(tmp_path):
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = start(ignore + BLOCKED, "status", f"--workdir={tmp_path}")
    read_until(process, "blocked")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.kill()
    process.communicate()


def test_a_reader_that_leaves_is_no_error():
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "paris_jax", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_an_ascii_terminal_gets_escapes(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "paris_jax", "status", f"--workdir={tmp_path}/運行"],
        **{"env": os.environ | {"PYTHONIOENCODING": "ascii"}, "capture_output": True, "text": True, "timeout": 60},
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "\\u904b\\u884c" in ended.stderr


def test_control_characters_of_strangers_reach_no_terminal(tmp_path, capsys):
    assert cli.run(["status", f"--workdir={tmp_path}/\x1b[31mred\x07\u202e"]) == 1
    said = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert "\\x1b[31mred\\x07\\u202e" in said


def test_without_a_home_programs_are_not_cached(tmp_path):
    code = """
import os, sys
os.path.expanduser = lambda path: path  # as without HOME and without an entry of the user
import jax
from paris_jax import cli
assert cli.run(["status", sys.argv[1]]) == 1
assert jax.config.jax_compilation_cache_dir is None
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")}
    ended = subprocess.run(
        [sys.executable, "-c", code, f"--workdir={tmp_path}"],
        **{"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60},
    )
    assert ended.returncode == 0, ended.stderr
    assert "HOME is not set" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(28, "No space left on device", "out/x.mp4"), "out/x.mp4; make room or choose another --out,"),
        (OSError(28, "No space left on device", "runs/a/x"), "runs/a/x; make room or choose another --workdir,"),
        (OSError(28, "No space left on device", "elsewhere"), "elsewhere; make room or choose another place,"),
        (OSError(28, "No space left on device"), "No space left on device; make room or choose another place,"),
        (PermissionError(13, "Permission denied", "out"), "out; allow writing there or choose another --out,"),
        (OSError(24, "Too many open files"), "raise the number of open files"),
        (OSError(5, "Input/output error", "runs/a/f"), "runs/a/f; look at the disk"),
    ],
)
def test_remedies_follow_the_error_and_the_flag(error, told, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("paris_jax.artifacts.publish.publish", fails)
    assert cli.run(["export", "--ensemble=runs/a/ensemble", "--out=out"]) == 1 or "workdir" in told
    said = capsys.readouterr().err
    if "workdir" not in told:
        assert told in said
        return
    monkeypatch.setattr("paris_jax.commands.status.status", fails)
    assert cli.run(["status", "--workdir=runs/a"]) == 1
    assert told in capsys.readouterr().err
