"""One job of two processes: it stops, resumes and exports as one, and learns what one process learns."""

import os
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np

from paris_jax import manifest
from paris_jax.ensemble import parts
from paris_jax.run_folder import Role, RunFolder
from paris_jax.stages import train as stage
from paris_jax.training import metrics
from tests.training.test_train import command, reclaimed, with_training

EXPERT = Role("expert", 0)


def start(run, experiment, folder):
    """Two processes of one job, each with a log file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    told = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    processes = []
    for number in range(2):
        with open(folder / f"log{number}", "w") as log:
            environment = os.environ | told | {"JAX_PROCESS_ID": str(number)}
            arguments = command(run, experiment, "--role=expert", "--cluster=0")
            processes.append(subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes


def end(processes, folder):
    try:
        return [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for number in range(2):
            print((folder / f"log{number}").read_text()[-3000:])


def test_two_processes_stop_resume_and_export_as_one(micro, run, tmp_path):
    experiment = with_training(micro, steps=60, fsdp=2, checkpoint_every=60, log_every=1)
    alone = RunFolder(tmp_path / "alone")
    shutil.copytree(run.path, alone.path)
    reclaimed(run, experiment)

    processes = start(run, experiment, tmp_path)
    while all(p.poll() is None for p in processes) and not metrics.read(run.metrics(EXPERT)):
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # one of them hears of it; both stop, at the same step
    assert end(processes, tmp_path) == [75, 75]
    stopped = metrics.read(run.metrics(EXPERT))[-1]["step"]
    assert 0 < stopped < 60
    assert f"saved at step {stopped} of 60" in " ".join((tmp_path / "log1").read_text().split())

    assert end(start(run, experiment, tmp_path), tmp_path) == [0, 0]
    assert f"goes on from step {stopped}" in " ".join((tmp_path / "log0").read_text().split())
    lines = metrics.read(run.metrics(EXPERT))
    assert [line["step"] for line in lines] == list(range(1, 61))

    one = with_training(experiment, fsdp=1)
    reclaimed(alone, one)
    stage.train(one, alone, EXPERT)
    losses = [[line["loss"] for line in metrics.read(r.metrics(EXPERT))] for r in (run, alone)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    manifest.read(run.export(EXPERT), "part")
    exported = [parts.read(r.export(EXPERT)).params for r in (run, alone)]
    for one_leaf, two_leaf in zip(*(jax.tree.leaves(p) for p in exported), strict=True):
        np.testing.assert_allclose(one_leaf, two_leaf, atol=0.02)
