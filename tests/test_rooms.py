"""Each room imports only from rooms after it, and importing the package loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "paris_jax"
ORDER = (
    *("cli", "stages", "config_file", "experiment", "run_folder", "evaluation", "ensemble", "training", "partition"),
    *("data", "encoders", "weights", "models", "diffusion", "checks", "manifest", "errors"),
)


def imported(path: Path) -> set[str]:
    """Rooms that a file imports from, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "paris_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("paris_jax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("paris_jax.")}
    return found & set(ORDER)


def test_each_room_imports_only_from_rooms_after_it():
    upward, seen = [], set()
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room in ORDER:
            seen.add(room)
            upward += [f"{path.name} imports {r}" for r in imported(path) if ORDER.index(r) < ORDER.index(room)]
    assert seen == set(ORDER)
    assert not upward


def test_importing_the_package_loads_nothing_heavy():
    script = "import sys, paris_jax; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PACKAGE.parent)
    loaded = set(done.stdout.split())
    assert "paris_jax" in loaded
    assert not loaded & {"jax", "torch", "tensorflow", "matplotlib", "sklearn"}
