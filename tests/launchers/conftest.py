"""Plans of the shapes, stand-ins for programs of schedulers, and the schedulers' own parsers."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from paris_jax.config.experiment import Experiment
from paris_jax.config.files import load
from paris_jax.launchers.stages import make_plan

ROOT = Path(__file__).parents[2]
PARSERS = ROOT / ".venv-schedulers" / "bin" / "python"


@pytest.fixture(scope="session")
def plan():
    """Three experts, on a bucket."""
    experiment = Experiment.from_config(load(str(ROOT / "configs/shapes.py") + ":small"))
    return make_plan(experiment, "gs://bucket/shapes", ("--config=configs/shapes.py:small",))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts programs on PATH that note their arguments, one line for each call, and then run a piece of shell."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    log.touch()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def add(name, body="true"):
        path = folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" | head -c 400 >>{log}\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return lambda: log.read_text().splitlines()

    return add


@pytest.fixture(scope="session")
def faults():
    """Validates with a scheduler's own code: faults(kind, manifests) lists the faults of each."""
    if not PARSERS.exists():
        pytest.skip("the parsers of launch/schedulers.txt are not installed; launch/test.sh does it")

    def validate(kind, manifests):
        script = Path(__file__).parent / "validate.py"
        done = subprocess.run(
            [PARSERS, script, kind],
            input=json.dumps(manifests),
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        return json.loads(done.stdout.splitlines()[-1])

    return validate
