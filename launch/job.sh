#!/usr/bin/env bash
# Runs one stage of a run as a job of any scheduler: XLA's flags, the preflight, the stage, and what follows its end.
#
#   ./launch/job.sh DEVICES HOW [PREFIX ... --] COMMAND --workdir=... ...
#
# DEVICES   those of the whole job, which the preflight expects: cpu, gpu:8 or tpu:16
# HOW       after a preemption or the loss of a process: "exit" with 75, run again here ("loop"), or requeue ("slurm");
#           a stage that ran out of host memory, or is lost again and again, is not repeated (exit code 1)
# PREFIX    a program that starts the command, such as srun with its flags
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
show_help launch/job.sh "$@"
[ $# -ge 3 ] || fail "./launch/job.sh needs DEVICES, HOW and a command; see ./launch/job.sh --help"

devices=$1 how=$2
shift 2
case $devices in
  cpu*) export JAX_PLATFORMS=cpu ;;
  gpu:*) source launch/device_flags.sh gpu ;;
  tpu:*) source launch/device_flags.sh tpu ;;
  *) fail "$devices: must be cpu, gpu:8 or tpu:16" ;;
esac
python=.venv/bin/python
[ -x "$python" ] || fail "$python is missing; run ./launch/install.sh first"
exec "$python" -m paris_jax.launchers.supervisor "$how" "$@" "--preflight=$devices"
