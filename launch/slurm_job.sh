#!/usr/bin/env bash
# One stage as a SLURM job; launch/slurm.sh submits it.
# Where it was preempted, or training lost one of its processes (launch/goes_on.sh), it goes back into the queue.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" || exit 1
source launch/install.sh && set +e
show_help launch/slurm_job.sh "$@"
: "${SLURM_SUBMIT_DIR:?this runs under sbatch}"

source launch/device_flags.sh gpu && source launch/goes_on.sh || exit 1
# Every process saves before it exits with 75; srun must not kill the slower ones, or 75 is lost (it reports the highest).
srun --gpu-bind=none --kill-on-bad-exit=0 --wait=60 .venv/bin/paris-jax "$@"
code=$?
if goes_on "$code" "$SECONDS" && { [ "$code" = 75 ] || [ "${1:-}" = train ]; }; then
  echo "Preempted or lost a process ($code); job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
