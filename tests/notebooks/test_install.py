"""Installation into the Python of a hosted notebook: what is kept of its JAX, what is replaced, when to restart."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PINS = {"jax": "0.12.0.1", "jaxlib": "0.12.0.1", "jax-cuda12-plugin": "0.12.0.1", "flax": "0.12.12", "numpy": "2.5.5"}
WANTED = Requirement("jax>=0.10.2,<0.13")
CUDA = dict.fromkeys(("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"), "0.11.1")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("install_notebook", ROOT / "launch" / "install_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_jax_that_is_allowed_stays_with_its_plugins(script):
    extras, constraints, said = script.plan(CUDA | {"numpy": "2.1.3"}, WANTED, PINS, "cuda12")
    assert extras == ["evaluation"]
    assert constraints == [f"{name}==0.11.1" for name in sorted(CUDA)]
    assert said == "JAX 0.11.1 of this runtime is kept"


def test_a_jax_that_is_allowed_gets_the_plugin_that_it_lacks(script):
    extras, constraints, _ = script.plan({"jax": "0.11.1", "jaxlib": "0.11.1"}, WANTED, PINS, "tpu")
    assert extras == ["evaluation", "tpu"]
    assert constraints == ["jax==0.11.1", "jaxlib==0.11.1"]


def test_colabs_jax_of_august_2026_is_replaced_together_with_its_plugin(script):
    old = dict.fromkeys(CUDA, "0.7.2") | {"flax": "0.11.2", "numpy": "2.1.3"}
    extras, constraints, said = script.plan(old, WANTED, PINS, "cuda12")
    assert extras == ["evaluation", "cuda12"]
    assert constraints == [f"{name}=={PINS[name]}" for name in PINS if name != "numpy"]
    assert "JAX 0.7.2" in said and "0.12.0.1" in said and "cuda12" in said


def test_the_range_is_that_of_the_project_and_the_pins_are_in_it(script):
    project = script.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = script.allowed(project)
    for minor in (11, 12, 13):  # of later Pythons, the newest pins
        assert wanted.specifier.contains(script.read_pins(minor)["jax"])
    assert script.read_pins(13) == script.read_pins(12)


@pytest.mark.parametrize(
    ("before", "after", "modules", "names"),
    [
        ({"jax": "0.7.2"}, {"jax": "0.12.0"}, [], ["jax"]),  # whether imported or not
        ({"numpy": "2.0.0"}, {"numpy": "2.5.5"}, ["numpy"], ["numpy"]),
        ({"numpy": "2.0.0"}, {"numpy": "2.5.5"}, ["json"], []),
        ({"numpy": "2.0.0", "jax": "0.11.0"}, {"numpy": "2.0.0", "jax": "0.11.0"}, ["numpy", "jax"], []),
        ({}, {"jax": "0.12.0"}, ["numpy"], []),
    ],
)
def test_a_restart_is_asked_for_where_something_loaded_was_replaced(script, before, after, modules, names):
    assert script.stale(before, after, modules) == names


def test_an_accelerator_that_jax_does_not_see_is_refused(script):
    with pytest.raises(SystemExit, match="error: JAX does not use the GPU of this runtime but cpu"):
        script.check_backend("cuda12")


INSTALLER = """
import sys
print("installer has", sorted(set(sys.argv[1:]) & {"json", "jax"}))
sys.exit(%d)
"""


def run_cell(folder, repository=""):
    """Runs the install cell in a Python without site-packages."""
    pytest.importorskip("jupytext")
    spec = importlib.util.spec_from_file_location("sync_notebooks", ROOT / "launch" / "sync_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (folder / "cell.py").write_text("import json\n" + module.INSTALL % repository)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "cell.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("code", "says"),
    [(0, "installer has ['json']"), (3, "Restart the session"), (1, "paris_jax could not be installed")],
)
def test_the_install_cell_installs_a_checkout_and_asks_for_a_restart(tmp_path, code, says):
    """Beside a folder of the package's name, which must not count as installed."""
    (tmp_path / "paris_jax").mkdir()
    launch = tmp_path / "paris_jax_checkout" / "launch"
    launch.mkdir(parents=True)
    (launch / "install_notebook.py").write_text(INSTALLER % code)
    done = run_cell(tmp_path)
    assert says in done.stdout + done.stderr
    assert done.returncode == (1 if code else 0)


def test_the_install_cell_clones_what_it_is_given_the_address_of(tmp_path):
    origin = tmp_path / "origin"
    (origin / "launch").mkdir(parents=True)
    (origin / "launch" / "install_notebook.py").write_text(INSTALLER % 0)
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", *arguments], cwd=origin, check=True)
    done = run_cell(tmp_path, origin.as_uri())
    assert "installer has ['json']" in done.stdout, done.stderr


def test_the_install_cell_asks_for_the_address_that_it_lacks(tmp_path):
    assert "Write the repository's address into REPOSITORY" in run_cell(tmp_path).stderr
