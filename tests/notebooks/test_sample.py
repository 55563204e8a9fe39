"""The notebook, run as a person runs it: every cell, in a fresh kernel, from an empty folder."""

import base64
import io
import os
import re
from pathlib import Path

import av
import pytest

from paris_jax.artifacts import ensemble_manifest, manifest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("matplotlib")

FOLDER = Path(__file__).parents[2] / "notebooks"
PAIRS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("text", PAIRS, ids=lambda path: path.stem)
def test_the_text_and_the_notebook_say_the_same(text):
    cells = [
        [(cell.cell_type, cell.source) for cell in jupytext.read(text.with_suffix(s)).cells] for s in (".py", ".ipynb")
    ]
    assert cells[0] == cells[1], f"run: jupytext --sync {text.relative_to(FOLDER.parent)}"


@pytest.mark.parametrize("text", PAIRS, ids=lambda path: path.stem)
def test_the_notebook_is_paired_and_carries_no_outputs(text):
    notebook = jupytext.read(text.with_suffix(".ipynb"))
    assert notebook.metadata["jupytext"]["formats"] == "ipynb,py:percent"
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def test_every_notebook_has_its_text():
    assert [p.stem for p in sorted(FOLDER.glob("*.ipynb"))] == [p.stem for p in PAIRS]


def shipped() -> bool:
    return manifest.exists(Path(ensemble_manifest.__file__).parent / "bundled" / "shapes")


@pytest.fixture(scope="module")
def executed(request, tmp_path_factory):
    """The notebook with its outputs, run on the ensemble that ships (or on the tests' own), with few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARIS_JAX_STEPS", "4")
        patch.delenv("MPLBACKEND", raising=False)
        patch.setenv("PYTHONPATH", str(FOLDER.parent), prepend=os.pathsep)  # this checkout, installed or not
        if not shipped():
            patch.setenv("PARIS_JAX_ENSEMBLE", str(request.getfixturevalue("trained").ensemble))
        folder = tmp_path_factory.mktemp("notebook")
        notebook = jupytext.read(FOLDER / "sample.ipynb")
        client = nbclient.NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        return client.execute(), folder


def outputs(notebook, kind):
    """Every output of a MIME type, by cell."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [[o["data"][kind] for o in cell.outputs if kind in o.get("data", {})] for cell in code]
    return [texts for texts in found if texts]


def frames(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.slow
def test_every_cell_runs_without_error_or_warning(executed):
    notebook, _ = executed
    printed = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [o for o in printed if o.output_type == "error"]
    assert not [o.text for o in printed if o.output_type == "stream" and o.name == "stderr"]


@pytest.mark.slow
def test_videos_are_shown_and_play(executed):
    notebook, _ = executed
    cells = outputs(notebook, "text/html")
    videos = [re.findall(r"data:video/mp4;base64,([^\"]+)", "".join(texts)) for texts in cells]
    counts = [len(found) for found in videos if found]
    # Four prompts; top 1, top 2 and full; three experts alone; the schedule.
    assert counts == [4, 12, 12, 4]
    for found in videos:
        for data in found[:2]:
            assert frames(base64.b64decode(data)) >= 4


@pytest.mark.slow
def test_routing_and_disagreement_are_plotted_once_each(executed):
    notebook, _ = executed
    plots = outputs(notebook, "image/png")
    assert [len(images) for images in plots] == [1, 1]


@pytest.mark.slow
def test_files_are_written_where_the_notebook_runs(executed):
    _, folder = executed
    written = sorted(path.name for path in (folder / "samples").iterdir())
    assert written == ["notebook.gif", "notebook.mp4", "notebook.png"]
    assert frames((folder / "samples" / "notebook.mp4").read_bytes()) == frames(
        (folder / "samples" / "notebook.gif").read_bytes()
    )
