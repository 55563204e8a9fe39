"""What the command line says: help, and one clear sentence for every mistake."""

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
    """Examples name configs/ relative to the checkout; no test may write into it or set jax up."""
    monkeypatch.chdir(cli.__file__.rpartition("/paris_jax/")[0])
    monkeypatch.setattr(cli, "start_jax", lambda name, call: None)
    monkeypatch.setattr(cli, "start_logging", lambda verbose: None)


@pytest.fixture
def refusal(capsys):
    """Runs a command that must be refused, and returns its one line."""

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
def test_the_help_of_a_command_shows_examples_and_every_flag(name, capsys):
    assert cli.run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"  paris-jax {name}" in out.split("Examples:")[1]
    flags = out.split("Flags:")[1].split("\n\n")[0]
    assert all(len(line.split(maxsplit=1)) == 2 for line in flags.strip().splitlines()), "every flag is explained"


@pytest.mark.parametrize("example", [e for command in table.COMMANDS.values() for e in command.examples])
def test_every_example_can_be_typed(example):
    program, *arguments = shlex.split(example)
    assert program == "paris-jax"
    name, call = cli.parse(arguments)
    if "config" in call.flags and call["config"]:
        values = files.load(call["config"])
        files.change(values, call.changes)
    assert name == arguments[0]


@pytest.mark.parametrize("text", ["10", "5:5", "9:2", "a:b", "-1:3"])
def test_steps_to_profile_are_two_growing_numbers(text):
    assert table._step_range("10:15") == (10, 15)
    with pytest.raises(UserError, match=f"--profile_steps={text}: must be the first step"):
        table._step_range(text)


def test_the_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_as_a_process_it_exits_with_the_code_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "paris_jax", "prepare", "--config=nofile.py", f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "there is no config file 'nofile.py' here" in done.stderr


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_file_where_a_folder_should_be_is_refused(below, tmp_path):
    (tmp_path / "file").write_text("")
    config = ["--config=configs/shapes.py:tiny", f"--workdir={tmp_path}/file{below}"]
    done = subprocess.run([sys.executable, "-m", "paris_jax", "prepare", *config], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")


def test_a_stage_asked_to_stop_keeps_what_is_finished_and_says_to_run_again(tmp_path):
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
        said = refusal("trian")
        assert said.startswith("'trian' is not a command; commands are quickstart, prepare")
        assert said.endswith("(did you mean 'train'?)")

    def test_an_unknown_flag(self, refusal):
        said = refusal("sample", "--promt=x")
        assert said == "paris-jax sample: --promt is unknown (did you mean '--prompt'?); see 'paris-jax sample --help'"

    def test_a_word_that_is_no_flag(self, refusal):
        assert "'runs/x' is not a flag; flags look like --name=value" in refusal("status", "runs/x")

    def test_a_value_that_a_flag_does_not_take(self, refusal):
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
        said = refusal("prepare", f"--workdir={tmp_path}")
        assert said.startswith("--config is missing, and ") and said.endswith("--config=configs/shapes.py:tiny")

    def test_experts_that_are_no_numbers(self, refusal):
        assert "--fixed_expert=a,b: must be whole numbers, such as 0,7" in refusal(
            "sample", "--ensemble=x", "--fixed_expert=a,b"
        )

    def test_devices_that_are_not_there(self, refusal, tmp_path):
        assert "--devices=gpu: must be auto, cpu" in refusal("quickstart", f"--workdir={tmp_path}", "--devices=gpu")


class TestConfig:
    @pytest.fixture
    def refused(self, refusal, tmp_path):
        return lambda *flags: refusal("prepare", f"--workdir={tmp_path}", *flags)

    def test_a_file_that_is_not_there(self, refused):
        assert refused("--config=nofile.py").startswith("--config=nofile.py: there is no config file 'nofile.py' here")
        assert "there is no config file 'configs' here" in refused("--config=configs")

    def test_a_variant_that_is_not_there(self, refused):
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
    def test_a_file_that_fails(self, text, sentence, refused, tmp_path):
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

    def test_the_nearest_field_is_named(self, refused):
        assert "(did you mean 'steps'?)" in refused(CONFIG, "--config.training.stepss=3")

    def test_all_mistakes_are_told_at_once(self, refused):
        said = refused(CONFIG, "--config.training.steps=0", "--config.data.widht=3")
        assert "steps=0" in said and "did you mean 'width'?" in said


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

    def test_the_config_of_the_run_folder_can_be_changed_too(self, micro, clustered):
        changed = self.experiment(f"--workdir={clustered}", "--config.evaluation.num_clips=6")
        assert changed.evaluation.num_clips == 6
        assert changed.hash == micro.hash

    def test_another_command_is_given_the_same_config(self, tmp_path):
        flags = (CONFIG, "--config.training.steps=70", "--config.training.warmup_steps=7")
        _, call = cli.parse(["train", *flags, f"--workdir={tmp_path}"])
        assert call.config_flags == flags


def test_the_next_command_can_be_pasted_into_a_shell(clustered, tmp_path, capsys):
    from paris_jax.artifacts.run_folder import RunFolder
    from paris_jax.commands.status import status

    run = RunFolder(shutil.copytree(clustered.path, tmp_path / "my runs; $HOME"))
    status(run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    _, *arguments = shlex.split(line.removeprefix("next: "))
    name, call = cli.parse(arguments)
    assert name == "train" and call["workdir"] == str(run)
