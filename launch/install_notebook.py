"""Installs this checkout into the Python of a hosted notebook (Colab, Kaggle), without breaking its JAX.

    python launch/install_notebook.py [MODULE ...]

MODULEs are those that the notebook has imported already. JAX and its plugins stay where pyproject.toml allows their
version, so that they fit the driver. Otherwise they are replaced together, plugin included, by the pinned versions.
Exit codes: 0 installed, 3 installed and the notebook's session must be restarted, 1 an error in one sentence.
"""

import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
JAX = re.compile(r"jax|jaxlib|jax-cuda\d+-(plugin|pjrt)|libtpu")  # distributions whose versions belong together
RESTART = 3
EXTRA = "evaluation"  # has matplotlib


def installed() -> dict[str, str]:
    """The version of every installed distribution, by its canonical name."""
    found = importlib.metadata.distributions(path=sys.path)
    return {canonicalize_name(each.metadata["Name"]): each.version for each in found if each.metadata["Name"]}


def jax_of(versions: Mapping[str, str]) -> dict[str, str]:
    return {name: version for name, version in versions.items() if JAX.fullmatch(name)}


def allowed(project: Mapping[str, object]) -> Requirement:
    """The versions of JAX that pyproject.toml allows."""
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == "jax")  # type: ignore[arg-type]


def plugin_extra(accelerator: str, versions: Mapping[str, str]) -> str:
    """The extra with the plugin for an accelerator, "" where none is attached or its plugin is installed."""
    plugins = {"cuda12": r"jax-cuda\d+-plugin", "tpu": "libtpu"}
    present = accelerator and any(re.fullmatch(plugins[accelerator], name) for name in versions)
    return "" if present else accelerator


def plan(
    versions: Mapping[str, str], wanted: Requirement, pins: Mapping[str, str], accelerator: str
) -> tuple[list[str], list[str], str]:
    """Extras and constraints of the installation, and a sentence about JAX.

    Args:
      versions: what is installed.
      wanted: the versions of JAX that are allowed.
      pins: versions that were tested together.
      accelerator: extra of the accelerator of this machine: "cuda12", "tpu" or "".
    """
    own = jax_of(versions)
    if "jax" in own and wanted.specifier.contains(own["jax"], prereleases=True):
        extras = [EXTRA, plugin_extra(accelerator, own)]
        kept = [f"{name}=={version}" for name, version in sorted(own.items())]
        return list(filter(None, extras)), kept, f"JAX {own['jax']} of this runtime is kept"
    pinned = [f"{name}=={version}" for name, version in pins.items() if JAX.fullmatch(name) or name == "flax"]
    had = (
        f"JAX {own['jax']} of this runtime is not in the range {wanted.specifier}"
        if "jax" in own
        else "There is no JAX"
    )
    return list(filter(None, [EXTRA, accelerator])), pinned, f"{had}; installing {pins['jax']}{_for(accelerator)}"


def _for(accelerator: str) -> str:
    return f" with its plugin for {accelerator}" if accelerator else ""


def read_pins(minor: int) -> dict[str, str]:
    """The pinned versions for Python 3.MINOR; those of the newest tested Python for later ones."""
    file = ROOT / "launch" / f"constraints-py3{minor}.txt"
    text = (file if file.exists() else file.with_name("constraints-py312.txt")).read_text()
    return dict(line.split("==") for line in text.splitlines() if "==" in line and not line.startswith("#"))


@functools.cache
def _owners() -> Mapping[str, list[str]]:
    """The distributions that each module may come from."""
    return importlib.metadata.packages_distributions()


def stale(before: Mapping[str, str], after: Mapping[str, str], modules: Iterable[str]) -> list[str]:
    """Distributions that need a restart: JAX if it was replaced, and those whose old version is imported."""
    changed = {name for name in before if after.get(name) != before[name]}
    owners = _owners()
    imported = {canonicalize_name(owner) for module in modules for owner in owners.get(module, [])}
    return sorted(name for name in changed if name in imported or JAX.fullmatch(name))


def find_accelerator() -> str:
    """The extra for this machine's accelerator, as the other scripts find it."""
    command = ["bash", "-c", "source launch/install.sh && find_accelerator"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def check_backend(accelerator: str) -> None:
    """Ends this program where a fresh Python does not see the accelerator of this machine."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    backend = done.stdout.strip()
    expected = {"cuda12": "gpu", "tpu": "tpu"}.get(accelerator, backend)
    if done.returncode or backend != expected:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"error: JAX does not use the {expected.upper()} of this runtime but {backend or 'nothing'} ({said})")
    print(f"JAX uses the {backend.upper()}")


def main(modules: list[str]) -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    before, accelerator = installed(), find_accelerator()
    extras, constraints, sentence = plan(before, allowed(project), read_pins(sys.version_info.minor), accelerator)
    print(sentence, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(constraints) + "\n")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--constraint", os.fspath(file), f"{ROOT}[{','.join(extras)}]"])
    if done.returncode:
        sys.exit("error: pip could not install paris_jax; see its lines above. On Kaggle, switch the internet on")
    check_backend(accelerator)
    if names := stale(before, installed(), modules):
        print(f"Replaced: {', '.join(names)}")
        return RESTART
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
