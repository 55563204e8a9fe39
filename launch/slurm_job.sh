#!/usr/bin/env bash
# One stage as a SLURM job; launch/slurm.sh submits it.
# Exit code 75 (preempted, state saved) puts the job back into the queue.
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?this runs under sbatch}" || exit 1

source launch/device_flags.sh gpu || exit 1
# Every process saves before it exits with 75; srun must not kill the slower ones, or 75 is lost (it reports the highest).
srun --gpu-bind=none --kill-on-bad-exit=0 --wait=60 .venv/bin/paris-jax "$@"
code=$?
if [ "$code" = 75 ]; then
  echo "Preempted; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
