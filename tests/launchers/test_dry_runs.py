"""The dry runs that docs show are what the launchers print."""

import subprocess
from pathlib import Path

import pytest

from tests.launchers.dry_runs import COMMAND_LINES, FOLDER, page

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", COMMAND_LINES)
def test_the_documents_show_the_printed_dry_runs(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for secret in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(secret, "of-the-environment")  # is printed nowhere
    assert (FOLDER / f"{name}.txt").read_text() == page(name), "run: python -m tests.launchers.dry_runs"


def test_the_printed_script_of_slurm_is_sound(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    script = tmp_path / "submit.sh"
    script.write_text("#!/bin/bash\n" + page("slurm").partition("\n")[2])
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
