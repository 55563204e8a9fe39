"""SLURM: one job for each stage, in order, none queued twice."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from paris_jax.errors import UserError
from paris_jax.launchers import slurm
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.slurm import Settings

ROOT = Path(__file__).parents[2]
# A queue in a file: a job for each name, numbered by its line.
SQUEUE = """
for a in "$@"; do case $a in --name=*) n=${a#--name=};; esac; done
grep -n -x -F -f <(echo "$n" | tr , '\\n') $QUEUE | cut -d: -f1
"""
SBATCH = """
for a in "$@"; do case $a in --job-name=*) echo "${a#--job-name=}" >>$QUEUE;; esac; done
wc -l <$QUEUE
"""


@pytest.fixture
def cluster(stand_in, tmp_path, monkeypatch):
    """A SLURM cluster whose queue is a file; its calls."""
    queue = tmp_path / "queue"
    queue.touch()
    monkeypatch.setenv("QUEUE", str(queue))
    stand_in("squeue", SQUEUE), stand_in("scancel"), stand_in("scontrol")
    return stand_in("sbatch", SBATCH)


def submitted(calls):
    return {call.split("--job-name=")[1].split()[0]: call for call in calls() if call.startswith("sbatch")}


def test_each_stage_depends_on_the_stages_it_reads(plan, cluster):
    slurm.launch("submit", plan, Settings(nodes=2, gpus=8, sbatch="--partition=gpu"), Commands())
    jobs = submitted(cluster)
    assert list(jobs) == [f"shapes-{stage.slug}" for stage in plan.stages]
    assert "--dependency=afterok:1 " in jobs["shapes-cluster"]
    for role in plan.roles:
        job = jobs[f"shapes-{role.slug}"]
        assert "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 " in job and "--dependency=afterok:2 " in job
        assert " --partition=gpu launch/slurm_job.sh gpu:16 train --config=configs/shapes.py:small " in job
    assert "--dependency=afterok:3:4:5:6 " in jobs["shapes-assemble"]
    assert "--dependency=afterok:8:7 " in jobs["shapes-evaluate"]


def test_only_stages_that_use_a_gpu_request_one(plan, cluster):
    slurm.launch("submit", plan, Settings(gpus=8), Commands())
    asked = [name for name, call in submitted(cluster).items() if "--gpus-per-node" in call]
    assert asked == [f"shapes-{s}" for s in ("expert-0", "expert-1", "expert-2", "router", "monolith", "evaluate")]
    assert "launch/slurm_job.sh cpu assemble" in submitted(cluster)["shapes-assemble"]


def test_a_second_submission_queues_no_duplicates(plan, cluster, capfd):
    slurm.launch("submit", plan, Settings(), Commands())
    before = len(submitted(cluster))
    slurm.launch("submit", plan, Settings(), Commands())
    assert len([call for call in cluster() if call.startswith("sbatch")]) == before == 9
    assert "shapes-router is queued already (6)" in capfd.readouterr().out


def test_a_single_role_waits_for_its_data_where_that_is_queued(plan, cluster, tmp_path):
    for queue, waits in (("shapes-prepare\nshapes-cluster\n", True), ("other\n", False)):
        (tmp_path / "queue").write_text(queue)
        slurm.launch("submit", plan, Settings(), Commands(), role="router")
        assert cluster()[-1].startswith("sbatch --parsable --job-name=shapes-router")
        assert ("--dependency=afterok:2 " in cluster()[-1]) == waits


def test_paths_with_spaces_stay_one_argument(plan, cluster):
    spaced = dataclasses.replace(plan.stages[0], arguments=("prepare", "--workdir=/shared/my runs"))
    slurm.launch("submit", dataclasses.replace(plan, stages=(spaced,)), Settings(), Commands(dry_run=False))
    assert cluster()[-1].endswith("prepare --workdir=/shared/my runs")
    assert "'--workdir=/shared/my runs'" in slurm.script(dataclasses.replace(plan, stages=(spaced,)), Settings())


def test_stopping_keeps_jobs_that_save_out_of_the_queue(plan, cluster):
    slurm.launch("submit", plan, Settings(), Commands())
    slurm.launch("stop", plan, Settings(), Commands(), role="router")
    assert cluster()[-3:] == [
        "scontrol update jobid=6 requeue=0",
        "scancel --signal=TERM 6",
        "scancel --state=PENDING 6",
    ]


def test_a_missing_slurm_is_reported(plan, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="sbatch was not found; run this on a login node"):
        slurm.launch("submit", plan, Settings(), Commands())


@pytest.mark.parametrize("stage, code, requeued", [("train", 75, True), ("train", 0, False), ("train", 1, False)])
def test_a_job_runs_its_stage_by_srun_and_goes_back_after_a_preemption(stage, code, requeued, stand_in, tmp_path):
    """slurm_job.sh, with the checkout's own Python and a stand-in for srun."""
    calls = stand_in("srun", f'echo "with $XLA_FLAGS"; exit {code}')
    stand_in("scontrol")
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42"}
    environment.pop("XLA_FLAGS", None)
    command = ["launch/slurm_job.sh", "gpu:8", stage, f"--workdir={tmp_path}/run", "--role=router"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert "with --xla_gpu_" in done.stdout
    assert f"paris_jax {stage} --workdir={tmp_path}/run --role=router --preflight=gpu:8" in calls()[0]
    assert ("scontrol requeue 42" in calls()) == requeued


def test_prepare_is_an_array_whose_end_the_manifest_waits_for(plan, cluster):
    slurm.launch("submit", plan, Settings(prepare_workers=16), Commands())
    jobs = submitted(cluster)
    assert "--array=0-15 " in jobs["shapes-prepare"] and jobs["shapes-prepare"].endswith("--shard=auto/16")
    assert "--dependency=afterok:1 " in jobs["shapes-finish-data"] and jobs["shapes-finish-data"].endswith("--finish")
    assert "--dependency=afterok:2 " in jobs["shapes-cluster"]
    assert sum("--array" in call for call in jobs.values()) == 1
    slurm.launch("status", plan, Settings(), Commands())
    assert "shapes-finish-data" in cluster()[-1] or "shapes-finish-data" in "".join(cluster()[-2:])
