"""Writes the cells that all notebooks share, strips outputs, and pairs each .py with its .ipynb.

    python launch/sync_notebooks.py [FOLDER]     then commit both files of each pair

The shared cells carry the tags "open" (badges) and "install". The repository's address is that of pyproject.toml:
[project.urls] Repository = "https://github.com/OWNER/NAME". Without it, there are no badges to link to.
"""

import sys
import tomllib
from pathlib import Path

import jupytext
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
HOST = "https://github.com/"
FORMATS = "ipynb,py:percent"
UPLOAD = (
    "On Colab or Kaggle, upload this notebook and write the repository's address into the next cell.\n"
    "On Kaggle, switch the internet on."
)
INSTALL = """\
# @title Install { display-mode: "form" }
# Does nothing where paris_jax is installed, as on your own machine after: ./launch/install.sh notebooks
REPOSITORY = "%s"  # @param {type: "string"}

import importlib.util
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path("paris_jax_checkout").resolve()  # is cloned, unless it was uploaded
found = importlib.util.find_spec("paris_jax")
if found is None or found.origin is None:  # a folder of this name is not the package
    if not CHECKOUT.exists():
        if not REPOSITORY:
            raise SystemExit("Write the repository's address into REPOSITORY, or upload it as paris_jax_checkout")
        subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, CHECKOUT], check=True)
    print("Installing, which takes a minute or two")
    command = [sys.executable, CHECKOUT / "launch" / "install_notebook.py", *{m.split(".")[0] for m in sys.modules}]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode == 3:
        raise SystemExit("Restart the session (Colab: Runtime > Restart session; Kaggle: Run > Restart), run all again")
    if done.returncode:
        raise SystemExit("paris_jax could not be installed; see the lines above")
    importlib.invalidate_caches()"""


def address() -> str:
    """The repository's address in pyproject.toml, "" where there is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix(".git").rstrip("/")


def badges(repository: str, name: str) -> str:
    """The badges that open a notebook on Colab and Kaggle, or how to get it there without an address."""
    if not repository:
        return UPLOAD
    if not repository.startswith(HOST):
        raise SystemExit(f"Repository = {repository!r} in pyproject.toml: Colab and Kaggle open {HOST}OWNER/NAME")
    file = f"blob/main/notebooks/{name}.ipynb"
    colab = f"https://colab.research.google.com/github/{repository.removeprefix(HOST)}/{file}"
    kaggle = f"https://kaggle.com/kernels/welcome?src={repository}/{file}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab})\n"
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})"
    )


def shared(repository: str, name: str) -> dict[str, str]:
    """The source of each shared cell, by its tag."""
    return {"open": badges(repository, name), "install": INSTALL % repository}


def synchronised(text: Path, repository: str) -> NotebookNode:
    """The notebook of a .py file, with its shared cells and without outputs."""
    notebook, cells = jupytext.read(text), shared(repository, text.stem)
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            cell.source = cells.get(tag, cell.source)
            if tag in ("install", "parameters"):  # Colab shows the fields and hides the code
                cell.metadata["cellView"] = "form"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata.setdefault("jupytext", {})["formats"] = FORMATS
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return notebook


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0]) if arguments else ROOT / "notebooks"
    for text in sorted(folder.glob("*.py")):
        notebook = synchronised(text, address())
        jupytext.write(notebook, text, fmt="py:percent")
        jupytext.write(notebook, text.with_suffix(".ipynb"), fmt="ipynb")


if __name__ == "__main__":
    main(sys.argv[1:])
