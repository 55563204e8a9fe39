"""What the README tells a newcomer is true: its files exist, its commands are accepted, its Python runs as written."""

import re
import shlex
from pathlib import Path

import pytest

from paris_jax.cli import parse
from paris_jax.commands.table import COMMANDS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
# Lines with a command, in the text or in a table, with what is continued on the next line.
LINES = re.findall(r"paris-jax ((?:[a-z]+) --[^`\n\\]*(?:\\\n[^\n]*)?)", TEXT)


def test_every_file_it_names_exists():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT) + re.findall(r'src="([^"]+)"', TEXT)
    scripts = re.findall(r"\./(launch/\w+\.sh)", TEXT)
    assert links and scripts
    for name in links + scripts:
        assert (ROOT / name).exists(), name


def test_it_names_every_command():
    assert len(LINES) > 8
    assert {line.split()[0] for line in LINES} == set(COMMANDS)


@pytest.mark.parametrize("line", LINES)
def test_every_command_is_accepted(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, call = parse(shlex.split(line.replace("\\\n", " ").replace("...", "x")))
    assert name in COMMANDS
    if "--config=configs/" in line:
        # The config is there, and so is every field that is changed.
        call.experiment(call.run if "--workdir=" in line else None)


@pytest.mark.slow
def test_its_python_runs_as_written(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert [path.name for path in tmp_path.iterdir()] == ["tile.mp4"]
