"""Signals in every phase of a command, and terminals or disks that reject the output."""

import os
import signal
import subprocess
import sys
import time

import pytest

from paris_jax import cli

# Blocks in compiled code, during which the main thread runs no Python signal handler.
BLOCK = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)'
# A shell or nohup may start the tests with SIGINT or SIGHUP ignored, which child processes inherit.
RESET_SIGNALS = """
import hashlib, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""
SIGNALS = [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]


def start(code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """Starts a Python process that receives Ctrl-C, with stderr as a pipe."""
    return subprocess.Popen(
        [sys.executable, "-c", RESET_SIGNALS + code, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=os.environ | environment,
    )


def read_until(process: subprocess.Popen, text: str) -> str:
    assert process.stderr
    output = ""
    while text not in output:
        line = process.stderr.readline()
        assert line, output
        output += line
    time.sleep(0.3)  # the call after the line has to begin
    return output


def end(process: subprocess.Popen) -> str:
    """Returns the rest of stderr once the process ends; kills it after a timeout."""
    try:
        return process.communicate(timeout=60)[1]
    finally:
        process.kill()


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_during_imports_ends_without_a_traceback(number, code):
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
def test_plan_stops_during_compilation(number, code):
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


@pytest.mark.parametrize("delay", [0.0, 0.5], ids=["", "on a slow machine"])
@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_signal_during_garbage_collection_is_not_lost(number, code, delay, tmp_path):
    """Nor when it is sent again: it waits until the hook that noticed the loss has returned."""
    lost = f"""
import threading, time
start = threading.Thread.start
threading.Thread.start = lambda self: (start(self), time.sleep({delay}))[0]
"""
    lost += """
import gc
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
def test_a_command_in_compiled_code_ends_after_a_grace_period(number, tmp_path):
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


def test_sighup_under_nohup_is_ignored(tmp_path):
    ignore = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = start(ignore + BLOCKED, "status", f"--workdir={tmp_path}")
    read_until(process, "blocked")
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.kill()
    process.communicate()


def test_a_closed_pipe_is_not_an_error():
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-m", "paris_jax", "--help"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_an_ascii_terminal_gets_escaped_text(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "paris_jax", "status", f"--workdir={tmp_path}/運行"],
        **{"env": os.environ | {"PYTHONIOENCODING": "ascii"}, "capture_output": True, "text": True, "timeout": 60},
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "\\u904b\\u884c" in ended.stderr


def test_control_characters_are_escaped_in_messages(tmp_path, capsys):
    assert cli.run(["status", f"--workdir={tmp_path}/\x1b[31mred\x07\u202e"]) == 1
    output = capsys.readouterr().err
    assert not {"\x1b", "\x07", "\u202e"} & set(output)
    assert "\\x1b[31mred\\x07\\u202e" in output


def test_without_a_home_folder_the_compilation_cache_is_off(tmp_path):
    code = """
import os, sys
os.path.expanduser = lambda path: path  # as without HOME and without a passwd entry
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
    "error, remedy",
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
def test_the_suggested_remedy_depends_on_the_error_and_the_flag(error, remedy, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("paris_jax.commands.export.publish", fails)
    assert cli.run(["export", "--ensemble=runs/a/ensemble", "--out=out"]) == 1 or "workdir" in remedy
    message = capsys.readouterr().err
    if "workdir" not in remedy:
        assert remedy in message
        return
    monkeypatch.setattr("paris_jax.commands.status.status", fails)
    assert cli.run(["status", "--workdir=runs/a"]) == 1
    assert remedy in capsys.readouterr().err


def test_a_path_beside_the_flags_folder_is_not_in_it(monkeypatch, capsys):
    def fails(*_):
        raise OSError(28, "No space left on device", "runs/ab/x")

    monkeypatch.setattr("paris_jax.commands.status.status", fails)
    assert cli.run(["status", "--workdir", "runs/a"]) == 1
    assert "runs/ab/x; make room or choose another place," in capsys.readouterr().err
    assert cli.run(["status", "--workdir", "runs/ab"]) == 1
    assert "runs/ab/x; make room or choose another --workdir," in capsys.readouterr().err


def test_a_broken_connection_is_no_closed_output(tmp_path):
    broken = """
from paris_jax import cli
def status(call):
    raise BrokenPipeError(32, "Broken pipe")
cli.COMMANDS["status"] = cli.COMMANDS["status"].__class__("", (), cli.COMMANDS["status"].define, status)
from paris_jax.__main__ import main
main()
"""
    process = start(broken, "status", f"--workdir={tmp_path}")
    rest = end(process)
    assert process.returncode == 1 and "BrokenPipeError" in rest
