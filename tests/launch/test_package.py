"""A wheel holds everything that the package reads at run time."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_all_files_of_the_package(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "paris_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "paris_jax/data/sources/digits.npy" in wanted
    assert not wanted - packed
    assert {"paris_jax/configs/shapes.py", "paris_jax/configs/paris2.py"} <= packed
    assert any(name.endswith("/licenses/LICENSE") for name in packed)
