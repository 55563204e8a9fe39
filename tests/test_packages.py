"""Each package imports only packages below it, without circles, and importing paris_jax loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = (
    *(
        "__main__",
        "cli",
        "notebooks",
        "commands",
        "sweeps",
        "launchers",
        "local_jobs",
        "serving",
        "evaluation",
        "ensemble",
        "planning",
        "training",
        "clustering",
        "data",
    ),
    *("encoders", "weights", "artifacts", "models", "diffusion", "config", "interrupts", "errors"),
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "paris_jax").rglob("*.py"))
}


def imported(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "paris_jax":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("paris_jax.")}
    return found & MODULES.keys()


def package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_each_package_imports_only_packages_below_it():
    upward = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imported(path)
        if package(module) and package(other) and ORDER.index(package(other)) < ORDER.index(package(module))
    ]
    assert {package(module) for module in MODULES} - {""} == set(ORDER)
    assert not upward


def test_no_modules_import_each_other():
    graph = {module: imported(path) for module, path in MODULES.items()}
    while leaves := [module for module, others in graph.items() if not others]:
        graph = {module: others - set(leaves) for module, others in graph.items() if module not in leaves}
    assert not graph


def loaded_by(code: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
                          capture_output=True, text=True, cwd=ROOT, check=True)  # fmt: skip
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_by("import paris_jax")
    assert "paris_jax" in loaded
    assert not loaded & {"jax", "torch", "tensorflow", "matplotlib", "sklearn"}


def test_configs_load_nothing_heavy():
    loaded = loaded_by("import paris_jax.config.experiment, paris_jax.config.files")
    assert not loaded & {"jax", "flax", "torch", "tensorflow", "matplotlib"}
