#!/usr/bin/env bash
# Queues one experiment on SLURM: prepare, cluster, one job for each role, then assemble and evaluate.
#
#   ./launch/slurm.sh [submit] --config=configs/shapes.py:h200 --workdir=/shared/runs/shapes
#       [--nodes=1] [--gpus=1]     for each role: nodes, and GPUs (= processes) per node
#       [--sbatch="--partition=gpu --time=24:00:00 --cpus-per-task=8"]     for every job
#       [--prepare_workers=16]     a job array that prepares the clips
#       [--role="expert 0"] [--config.a.b=value ...] [--dry_run]
#   ./launch/slurm.sh status|logs|stop --config=... --workdir=...
#
# Run it on a login node, from a checkout and with a --workdir that every node sees, after ./launch/install.sh cuda12
# evaluation has created .venv there. Jobs that are queued already are not queued twice; launch/slurm_job.sh requeues
# preempted ones. --flagfile=FILE reads flags from a file, one a line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/launcher.sh
start_launcher slurm "$@"
