"""One job of several processes: it stops, resumes, loses one of them, is gone on with by another number of them, and
learns what one process learns."""

import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from paris_jax.artifacts import exported, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import NetworkManifest
from paris_jax.commands import train as stage
from paris_jax.training import metrics
from tests.conftest import QUICK, free_address
from tests.training.test_train import command, reclaimed, with_training

EXPERT = Role("expert", 0)


class Job:
    """The processes of one training job, `devices` simulated ones each, joined by flags or environment."""

    def __init__(self, run, experiment, folder, processes, devices=1, by="environment"):
        address = free_address()
        self.run, self.folder, self.processes = run, folder, []
        flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
        for number in range(processes):
            joining = {"coordinator": address, "num_processes": processes, "process_id": number}
            arguments = command(run, experiment, "--role=expert", "--cluster=0")
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
            if by == "flags":
                arguments += [f"--{name}={value}" for name, value in joining.items()]
            else:
                names = {"coordinator": "COORDINATOR_ADDRESS", "num_processes": "NUM_PROCESSES"}
                environment |= {f"JAX_{names.get(name, name).upper()}": str(value) for name, value in joining.items()}
            with open(folder / f"log{number}", "w") as log:
                process = subprocess.Popen(arguments, env=environment, stdout=log, stderr=subprocess.STDOUT)
            self.processes.append(process)

    def reaches(self, step):
        """Waits for a line of metrics at or after `step`."""
        deadline = time.time() + 240
        while time.time() < deadline and all(process.poll() is None for process in self.processes):
            line = metrics.newest(self.run.metrics(EXPERT))
            if line and line["step"] >= step:
                return
            time.sleep(0.05)
        raise AssertionError(self.end())

    def end(self):
        """The exit codes, and what each process said, in one line each."""
        try:
            codes = [process.wait(timeout=240) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
            logs = [(self.folder / f"log{n}").read_text() for n in range(len(self.processes))]
            print(*(log[-3000:] for log in logs), sep="\n---\n")
        return codes, [" ".join(log.split()) for log in logs]


def job_of(micro, **changes):
    """Learning rates that do not depend on the number of steps, so that one training is the measure of all."""
    return with_training(micro, **{"steps": 60, "lr_schedule": "constant", "log_every_steps": 1} | changes)


@pytest.fixture(scope="module")
def alone(micro, clustered, tmp_path_factory):
    """The run folder of sixty steps in this process, on one device."""
    run = RunFolder(tmp_path_factory.mktemp("alone") / "run")
    shutil.copytree(clustered.path, run.path)
    experiment = job_of(micro)
    reclaimed(run, experiment)
    stage.train(experiment, run, EXPERT)
    return run


def assert_learned_the_same(run, alone, steps):
    lines, expected = metrics.read(run.metrics(EXPERT)), metrics.read(alone.metrics(EXPERT))[:steps]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    losses = [[line["loss"] for line in each] for each in (lines, expected)]
    np.testing.assert_allclose(losses[0][:8], losses[1][:8], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)  # rounding grows from update to update
    manifest.read(run.export(EXPERT), NetworkManifest)


def test_two_processes_stop_and_resume_and_one_resumes_after_a_loss(micro, run, alone, tmp_path):
    experiment = job_of(micro, fsdp=2, checkpoint_every_steps=10)
    reclaimed(run, experiment)

    job = Job(run, experiment, tmp_path, processes=2)
    job.reaches(1)
    job.processes[1].send_signal(signal.SIGTERM)  # one of them hears of it; both stop, at the same step
    codes, (_, second) = job.end()
    stopped = metrics.read(run.metrics(EXPERT))[-1]["step"]
    assert codes == [75, 75] and 0 < stopped < 40
    assert f"saved at step {stopped} of 60" in second

    job = Job(run, experiment, tmp_path, processes=2, by="flags")
    job.reaches(stopped + 11)
    job.processes[1].kill()
    codes, (first, _) = job.end()
    assert codes[0] == 75 and f"resumes from step {stopped}" in first
    assert "expert 0 lost a device or another process of its job" in first
    assert "run the same command again" in first

    stage.train(with_training(experiment, fsdp=1), run, EXPERT)
    assert_learned_the_same(run, alone, steps=60)
    for here, there in zip(
        *(jax.tree.leaves(exported.read(r.export(EXPERT)).params) for r in (run, alone)), strict=True
    ):
        np.testing.assert_allclose(here, there, atol=0.02)


@pytest.mark.exhaustive
def test_four_processes_that_shard_the_network_are_resumed_by_two(micro, run, alone, tmp_path):
    """Two of the four share the samples and split the heads (tensor), two pairs share the parameters (fsdp)."""
    experiment = job_of(micro, steps=14, fsdp=2, tensor=2, checkpoint_every_steps=14)
    reclaimed(run, experiment)

    job = Job(run, experiment, tmp_path, processes=4, by="flags")
    job.reaches(2)
    job.processes[2].send_signal(signal.SIGTERM)
    codes, _ = job.end()
    stopped = metrics.read(run.metrics(EXPERT))[-1]["step"]
    assert codes == [75] * 4 and 2 <= stopped < 14
    written = {path.name for path in run.checkpoints(EXPERT).glob(f"{stopped}/state/ocdbt.process_*")}
    assert written == {f"ocdbt.process_{n}" for n in range(4)}  # each wrote its own part

    codes, logs = Job(run, experiment, tmp_path, processes=2, devices=2).end()
    assert codes == [0, 0] and f"resumes from step {stopped}" in logs[0]
    assert_learned_the_same(run, alone, steps=14)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI: apt-get install openmpi-bin")
def test_open_mpi_starts_a_job(micro, run, alone, tmp_path):
    experiment = job_of(micro, steps=4, fsdp=2)
    reclaimed(run, experiment)
    start = ["mpirun", "--oversubscribe", "-np", "2", *command(run, experiment, "--role=expert", "--cluster=0")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(start, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "because of OMPI_COMM_WORLD_SIZE=2" in " ".join(done.stderr.split())
    assert_learned_the_same(run, alone, steps=4)
