"""Runs notebooks as a person runs them: every cell, in a fresh kernel, from an empty folder."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"


@dataclasses.dataclass(frozen=True)
class Executed:
    """A notebook with its outputs, and the folder that it ran in."""

    notebook: Any
    folder: Path

    def outputs(self, kind: str) -> list[list[str]]:
        """Every output of a MIME type, by cell that has any."""
        code = [cell for cell in self.notebook.cells if cell.cell_type == "code"]
        found = [[o["data"][kind] for o in cell.outputs if kind in o.get("data", {})] for cell in code]
        return [texts for texts in found if texts]

    @property
    def printed(self) -> str:
        """What the cells print on stdout."""
        streams = [o for cell in self.notebook.cells for o in cell.get("outputs", ()) if o.output_type == "stream"]
        return "".join(o.text for o in streams if o.name == "stdout")

    def check_no_errors_or_warnings(self) -> None:
        outputs = [output for cell in self.notebook.cells for output in cell.get("outputs", ())]
        assert not [o for o in outputs if o.output_type == "error"]
        assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """Executes a notebook with other settings: they follow its own, in a cell after the one with the form fields."""
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    pytest.importorskip("matplotlib")
    from nbformat.v4 import new_code_cell

    def run(name: str, **settings: Any) -> Executed:
        folder = tmp_path_factory.mktemp(name)
        notebook = jupytext.read(FOLDER / f"{name}.ipynb")
        (place,) = (n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
        for field in settings:
            assert f"\n{field} = " in notebook.cells[place].source
        source = "\n".join(f"{field} = {value!r}" for field, value in settings.items())
        notebook.cells.insert(place + 1, new_code_cell(source))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MPLBACKEND", raising=False)
            patch.setenv("PYTHONPATH", str(FOLDER.parent), prepend=os.pathsep)  # this checkout, installed or not
            client = nbclient.NotebookClient(
                notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
            )
            return Executed(client.execute(), folder)

    return run
