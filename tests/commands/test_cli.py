"""The command line: help, exit codes, and a one-sentence error for every mistake."""

import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from paris_jax import __version__, cli
from paris_jax.commands import table
from paris_jax.config import files
from paris_jax.errors import Preempted, UserError

CONFIG = "--config=configs/shapes.py:tiny"


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch, tmp_path):
    """Runs in the checkout, which the examples' configs/ paths are relative to, without configuring JAX or logging."""
    monkeypatch.chdir(cli.__file__.rpartition("/paris_jax/")[0])
    monkeypatch.setattr(cli, "start_jax", lambda name, call: None)
    monkeypatch.setattr(cli, "start_logging", lambda verbose: None)


@pytest.fixture
def refusal(capsys):
    """Runs a command that must fail, and returns its one-line error message."""

    def run(*arguments):
        assert cli.run(arguments) == 1
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert printed.out == ""
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return run


@pytest.mark.parametrize("arguments", [(), ("--help",), ("help",), ("-h",)])
def test_the_overview_names_every_command(arguments, capsys):
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"paris-jax {name}" in out for name in table.COMMANDS)


@pytest.mark.parametrize("name", table.COMMANDS)
def test_help_of_a_command_shows_examples_and_every_flag(name, capsys):
    assert cli.run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"  paris-jax {name}" in out.split("Examples:")[1]
    flags = out.split("Flags:")[1].split("\n\n")[0]
    assert all(len(line.split(maxsplit=1)) == 2 for line in flags.strip().splitlines()), "every flag is explained"


@pytest.mark.parametrize("example", [e for command in table.COMMANDS.values() for e in command.examples])
def test_every_example_parses(example):
    program, *arguments = shlex.split(example)
    assert program == "paris-jax"
    name, call = cli.parse(arguments)
    if "config" in call.flags and call["config"]:
        values = files.load(call["config"])
        files.change(values, call.changes)
    assert name == arguments[0]


@pytest.mark.parametrize("text", ["10", "5:5", "9:2", "a:b", "-1:3"])
def test_profile_steps_must_be_an_increasing_pair(text):
    assert table._step_range("10:15") == (10, 15)
    with pytest.raises(UserError, match=f"--profile_steps={text}: must be the first step"):
        table._step_range(text)


def test_the_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_an_error_exits_with_code_1_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "paris_jax", "prepare", "--config=nofile.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "there is no config file 'nofile.py' here" in done.stderr


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_file_as_workdir_is_refused(below, tmp_path):
    (tmp_path / "file").write_text("")
    config = ["--config=configs/shapes.py:tiny", f"--workdir={tmp_path}/file{below}"]
    done = subprocess.run([sys.executable, "-m", "paris_jax", "prepare", *config], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_sigterm_stops_prepare_with_code_75_and_a_hint_to_rerun(tmp_path):
    command = [sys.executable, "-m", "paris_jax", "prepare", "--config=configs/shapes.py:bundled"]
    process = subprocess.Popen([*command, f"--workdir={tmp_path}/run"], stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / "run" / "data").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "run the same command again" in errors


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("no"), 1, "error: no\n"),
        (Preempted("saved"), 75, "preempted: saved; run the same command again\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to resume\n"),
        (OSError(28, "No space left on device", "/x"), 1, "error: No space left on device: /x; make room"),
    ],
)
def test_exit_codes(error, code, sentence, monkeypatch, capsys, tmp_path):
    def fails(*_):
        raise error

    monkeypatch.setattr("paris_jax.commands.status.status", fails)
    assert cli.run(["status", f"--workdir={tmp_path}"]) == code
    assert capsys.readouterr().err.startswith(sentence)


class TestMistakes:
    def test_an_unknown_command(self, refusal):
        message = refusal("trian")
        assert message.startswith("'trian' is not a command; commands are quickstart, prepare")
        assert message.endswith("(did you mean 'train'?)")

    def test_an_unknown_flag(self, refusal):
        message = refusal("sample", "--promt=x")
        assert (
            message == "paris-jax sample: --promt is unknown (did you mean '--prompt'?); see 'paris-jax sample --help'"
        )

    def test_a_positional_argument(self, refusal):
        assert "'runs/x' is not a flag; flags look like --name=value" in refusal("status", "runs/x")

    def test_an_invalid_value_of_a_flag(self, refusal):
        assert "--role=experts" in refusal("train", "--workdir=x", "--role=experts")
        assert "--seed=two" in refusal("sample", "--ensemble=x", "--seed=two")

    @pytest.mark.parametrize("name", ["prepare", "cluster", "train", "assemble", "evaluate", "status"])
    def test_a_missing_workdir(self, name, refusal):
        assert refusal(name).startswith("--workdir is missing; name the run folder")

    def test_a_missing_role(self, refusal, tmp_path):
        assert refusal("train", CONFIG, f"--workdir={tmp_path}").startswith("--role is missing; it is expert")
        assert "--role=expert needs --cluster=K, from 0 to 2" in refusal(
            "train", CONFIG, f"--workdir={tmp_path}", "--role=expert"
        )

    def test_a_missing_ensemble_or_prompt(self, refusal, tmp_path):
        assert refusal("sample").startswith("--ensemble is missing")
        assert refusal("sample", f"--ensemble={tmp_path}").startswith("--prompt is missing")

    def test_a_missing_config(self, refusal, tmp_path):
        message = refusal("prepare", f"--workdir={tmp_path}")
        assert message.startswith("--config is missing, and ") and message.endswith("--config=configs/shapes.py:tiny")

    def test_experts_that_are_not_numbers(self, refusal):
        assert "--fixed_expert=a,b: must be whole numbers, such as 0,7" in refusal(
            "sample", "--ensemble=x", "--fixed_expert=a,b"
        )

    def test_unknown_devices(self, refusal, tmp_path):
        assert "--devices=gpu: must be auto, cpu" in refusal("quickstart", f"--workdir={tmp_path}", "--devices=gpu")


class TestConfig:
    @pytest.fixture
    def refused(self, refusal, tmp_path):
        return lambda *flags: refusal("prepare", f"--workdir={tmp_path}", *flags)

    def test_a_missing_file(self, refused):
        assert refused("--config=nofile.py").startswith("--config=nofile.py: there is no config file 'nofile.py' here")
        assert "there is no config file 'configs' here" in refused("--config=configs")

    def test_an_unknown_variant(self, refused):
        assert refused("--config=configs/shapes.py:tiyn").endswith("(did you mean 'tiny'?)")

    @pytest.mark.parametrize(
        ("text", "sentence"),
        [
            ("x = 1", "has no get_config"),
            ("def get_config():\n    return {}['a']", "fails with KeyError: 'a'"),
            ("def get_config(:", "fails with SyntaxError"),
            ("def get_config():\n    return 1 / 0", "fails with ZeroDivisionError"),
        ],
    )
    def test_a_config_file_that_raises(self, text, sentence, refused, tmp_path):
        (tmp_path / "mine.py").write_text(text)
        assert sentence in refused(f"--config={tmp_path / 'mine.py'}")

    @pytest.mark.parametrize(
        ("flag", "sentence"),
        [
            ("--config.training.stepss=3", "config.training.stepss is unknown; allowed are b1, b2, "),
            ("--config.trainig.steps=3", "config.trainig is unknown"),
            ("--config.training.steps=many", "config.training.steps='many': must be an int"),
            ("--config.training.steps=0", "steps=0: must be at least 1"),
            ("--config.training=3", "config.training='3': must be a group of fields"),
            ("--config.name.x=3", "config.name is one value, not a group of fields"),
            ("--config.training.steps", "--config.training.steps has no value; write --config.training.steps=value"),
        ],
    )
    def test_a_field_that_cannot_be_set(self, flag, sentence, refused):
        assert sentence in refused(CONFIG, flag)

    def test_the_nearest_field_name_is_suggested(self, refused):
        assert "(did you mean 'steps'?)" in refused(CONFIG, "--config.training.stepss=3")

    def test_all_mistakes_are_reported_at_once(self, refused):
        message = refused(CONFIG, "--config.training.steps=0", "--config.data.widht=3")
        assert "steps=0" in message and "did you mean 'width'?" in message


class TestChanges:
    def experiment(self, *flags):
        _, call = cli.parse(["evaluate", *flags])
        return call.experiment(call.run)

    def test_fields_keep_their_type(self, tmp_path):
        flags = (
            "--config.training.steps=70",
            "--config.training.warmup_steps=7",
            "--config.data.fps=12",
            "--config.name=a=b",
        )
        changed = self.experiment(CONFIG, f"--workdir={tmp_path}", *flags)
        assert (changed.training.steps, changed.training.warmup_steps, changed.data.fps) == (70, 7, 12.0)
        assert changed.name == "a=b"

    def test_flags_change_the_config_of_a_run_folder(self, micro, clustered):
        changed = self.experiment(f"--workdir={clustered}", "--config.evaluation.num_clips=6")
        assert changed.evaluation.num_clips == 6
        assert changed.hash == micro.hash

    def test_config_flags_are_kept_for_other_commands(self, tmp_path):
        flags = (CONFIG, "--config.training.steps=70", "--config.training.warmup_steps=7")
        _, call = cli.parse(["train", *flags, f"--workdir={tmp_path}"])
        assert call.config_flags == flags


def test_the_suggested_next_command_is_quoted_for_the_shell(clustered, tmp_path, capsys):
    from paris_jax.artifacts.run_folder import RunFolder
    from paris_jax.commands.status import status

    run = RunFolder(shutil.copytree(clustered.path, tmp_path / "my runs; $HOME"))
    status(run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    _, *arguments = shlex.split(line.removeprefix("next: "))
    name, call = cli.parse(arguments)
    assert name == "train" and call["workdir"] == str(run)
