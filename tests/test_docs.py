"""README, docs and examples are true: files exist, commands are accepted, Python runs as written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from paris_jax.cli import parse
from paris_jax.commands.table import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "launch" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Lines with a command, in the text or in a table, with what is continued on the next line.
COMMAND = re.compile(r"paris-jax ((?:[a-z]+) (?:--|RUN|configs/)[^`\n\\]*(?:\\\n[^`\n\\]*)*)")
LINES = [(page.name, line) for page in PAGES for line in COMMAND.findall(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_section_it_names_exists(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        file, _, section = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if section:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert section in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], target
    for script in re.findall(r"\./(launch/\w+\.sh)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"python -m ((?:tests|paris_jax)[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_the_readme_is_short_and_names_every_command():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 1500
    assert {line.split()[0] for name, line in LINES if name == "README.md"} == set(COMMANDS)


@pytest.mark.parametrize("page, line", LINES)
def test_every_command_is_accepted(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, call = parse(shlex.split(line.partition(" #")[0].replace("\\\n", " ").replace("...", "x")))
    if "--config=configs/" in line:
        # The config is there, and so is every field that is changed.
        call.experiment(call.run if "--workdir=" in line else None)


def test_the_readmes_python_runs_as_written(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert [path.name for path in tmp_path.iterdir()] == ["tile.mp4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, arguments, written",
    [
        ("sample", ["bundled:shapes", "OUT/sample.mp4"], "sample.mp4"),
        ("train_one_expert", ["OUT/run"], "run/experts/0/export/manifest.json"),
        ("add_a_data_source", ["OUT/run"], "run/data/manifest.json"),
    ],
)
def test_every_example_runs_as_written(name, arguments, written, tmp_path):
    command = [sys.executable, f"examples/{name}.py", *(a.replace("OUT", str(tmp_path)) for a in arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / written).exists()


def test_every_example_is_short_and_run():
    files = {path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")}
    assert files.keys() == {"sample", "train_one_expert", "add_a_data_source", "write_a_config"}
    assert all(20 <= len(text.splitlines()) <= 46 for text in files.values())
