"""Notebooks are paired with texts, carry no outputs, and share the cells that they have in common."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
PAIRS = sorted(FOLDER.glob("*.py"))
each_notebook = pytest.mark.parametrize("text", PAIRS, ids=lambda path: path.stem)


def script():
    spec = importlib.util.spec_from_file_location("sync_notebooks", ROOT / "launch" / "sync_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tagged(notebook, tag):
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def test_every_notebook_has_its_text():
    names = ["clusters_and_routing", "quickstart", "sample", "train_an_expert"]
    assert [p.stem for p in sorted(FOLDER.glob("*.ipynb"))] == [p.stem for p in PAIRS] == names


@each_notebook
def test_the_text_and_the_notebook_say_the_same(text):
    cells = [
        [(cell.cell_type, cell.source, cell.metadata.get("tags")) for cell in jupytext.read(text.with_suffix(s)).cells]
        for s in (".py", ".ipynb")
    ]
    assert cells[0] == cells[1], "run: python launch/sync_notebooks.py"


@each_notebook
def test_the_notebook_is_paired_and_carries_no_outputs(text):
    notebook = jupytext.read(text.with_suffix(".ipynb"))
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@each_notebook
def test_shared_cells_are_those_of_the_script(text):
    notebook, sync = jupytext.read(text.with_suffix(".ipynb")), script()
    for tag, source in sync.shared(sync.address(), text.stem).items():
        assert [cell.source for cell in tagged(notebook, tag)] == [source], "run: python launch/sync_notebooks.py"


@each_notebook
def test_settings_are_form_fields_of_colab(text):
    (cell,) = tagged(jupytext.read(text.with_suffix(".ipynb")), "parameters")
    first, *lines = cell.source.splitlines()
    assert first.startswith("# @title ")
    assert cell.metadata["cellView"] == "form"
    assert lines and all(re.fullmatch(r"[A-Z_]+ = .+  # @param [\[{].+[\]}]", line) for line in lines)


def test_with_an_address_every_notebook_has_badges_and_clones_from_it(tmp_path, monkeypatch):
    sync = script()
    monkeypatch.setattr(sync, "address", lambda: "https://github.com/example/repo")
    shutil.copytree(FOLDER, tmp_path / "notebooks")
    sync.main([str(tmp_path / "notebooks")])
    for text in PAIRS:
        notebook = jupytext.read(tmp_path / "notebooks" / f"{text.stem}.ipynb")
        badges, install = tagged(notebook, "open")[0].source, tagged(notebook, "install")[0].source
        file = f"blob/main/notebooks/{text.stem}.ipynb"
        assert f"(https://colab.research.google.com/github/example/repo/{file})" in badges
        assert f"(https://kaggle.com/kernels/welcome?src=https://github.com/example/repo/{file})" in badges
        assert 'REPOSITORY = "https://github.com/example/repo"' in install


def test_an_address_that_colab_cannot_open_is_refused():
    with pytest.raises(SystemExit, match="Colab and Kaggle open"):
        script().badges("https://example.org/repo", "sample")
