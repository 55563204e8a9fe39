#!/usr/bin/env bash
# Runs one stage as a SLURM job; launch/slurm.sh submits it. Requeues the job if it has to run again (launch/job.sh).
#
#   launch/slurm_job.sh DEVICES COMMAND ...
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
source launch/install.sh
show_help launch/slurm_job.sh "$@"
: "${SLURM_SUBMIT_DIR:?launch/slurm_job.sh must run under sbatch; submit jobs with launch/slurm.sh}"

devices=$1
shift
# Every process saves and exits with 75. srun reports the highest code, so it must not kill the slower processes.
exec launch/job.sh "$devices" slurm srun --gpu-bind=none --kill-on-bad-exit=0 --wait=60 -- "$@"
