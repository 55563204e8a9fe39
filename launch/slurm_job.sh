#!/usr/bin/env bash
# Runs one stage as a SLURM job; launch/slurm.sh submits it.
# Requeues the job if it was preempted, or if training lost one of its processes (launch/goes_on.sh).
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 1
source launch/install.sh && set +e
show_help launch/slurm_job.sh "$@"
: "${SLURM_SUBMIT_DIR:?launch/slurm_job.sh must run under sbatch; submit jobs with launch/slurm.sh}"

source launch/device_flags.sh gpu && source launch/goes_on.sh || exit 1
# Every process saves and exits with 75. srun reports the highest code, so it must not kill the slower processes.
srun --gpu-bind=none --kill-on-bad-exit=0 --wait=60 .venv/bin/paris-jax "$@"
code=$?
if goes_on "$code" "$SECONDS" && { [ "$code" = 75 ] || [ "${1:-}" = train ]; }; then
  echo "Preempted or lost a process ($code); job $SLURM_JOB_ID is requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
