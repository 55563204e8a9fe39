"""The preflight: a job that would work wrongly is refused before it works."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from etils import epath

from paris_jax.errors import UserError
from paris_jax.launchers import preflight as module
from paris_jax.launchers.preflight import clock_problems, disagreements, parse, preflight, storage_problems
from tests.conftest import free_address

COUNT = jax.device_count()


def test_a_job_on_the_expected_devices_passes_and_leaves_no_files(tmp_path):
    preflight("cpu", tmp_path / "run", ["train"])
    preflight(f"cpu:{COUNT}", tmp_path / "run", ["train"])
    assert list((tmp_path / "run").iterdir()) == []


def test_the_cpu_instead_of_an_accelerator_is_refused(tmp_path):
    for expected in ("gpu:8", "tpu:16"):
        with pytest.raises(UserError, match=rf"--preflight={expected}: JAX found {COUNT} cpu device\(s\) instead"):
            preflight(expected, tmp_path, [])


def test_another_number_of_devices_is_refused(tmp_path):
    with pytest.raises(UserError, match=rf"JAX found {COUNT} cpu device\(s\); start as many processes"):
        preflight(f"cpu:{COUNT + 1}", tmp_path, [])


@pytest.mark.parametrize("text", ["gpus", "gpu:", "gpu:0", "gpu:-1", "gpu:1.5", ""])
def test_malformed_expectations_are_refused(text):
    with pytest.raises(UserError, match=r"must be cpu, gpu:8 or tpu:16"):
        parse(text)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (problem,) = storage_problems(tmp_path / "file" / "run")
    assert str(tmp_path / "file" / "run") in problem and "cannot be written" in problem


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    usage = module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=2**29))
    assert any(f"{tmp_path} has 0.50 GiB left" in problem for problem in storage_problems(tmp_path))


def test_a_clock_unlike_the_storages_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: time.monotonic())
    (problem,) = (p for p in storage_problems(epath.Path(tmp_path)) if "clock" in p)
    assert "synchronise it" in problem


def test_clocks_of_processes_must_agree():
    assert list(clock_problems([100.0, 160.0])) == []
    assert list(clock_problems([400.0, 0.0])) == [
        "the clocks of processes 1 and 0 are 400 s apart; synchronise them (NTP)"
    ]


def test_versions_code_and_commands_of_processes_must_agree():
    first = {"versions": {"jax": "0.10.2", "numpy": "2.4"}, "code": "a", "command": "c"}
    other = {"versions": {"jax": "0.12.0", "numpy": "2.4"}, "code": "b", "command": "d"}
    assert list(disagreements([first, first])) == []
    assert [problem.partition(";")[0] for problem in disagreements([first, other])] == [
        "process 1 has jax 0.12.0, process 0 has 0.10.2",
        "process 1 runs another source of paris_jax than process 0",
        "process 1 was started with another command than process 0",
    ]


@pytest.mark.slow
def test_processes_of_different_commands_refuse_to_work_together(clustered):
    """Two roles that met at one address would train one network from two programs."""
    address = free_address()

    def start(k, *role):
        flags = [f"--coordinator={address}", "--num_processes=2", f"--process_id={k}", "--preflight=cpu"]
        command = [sys.executable, "-m", "paris_jax", "train", f"--workdir={clustered}", *role, *flags]
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, cwd=root, env=os.environ, stderr=subprocess.PIPE, text=True)

    both = [start(0, "--role=router"), start(1, "--role=monolith")]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert all("error: The preflight failed: process 1 was started with another command" in text for text in said)
