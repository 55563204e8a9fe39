#!/usr/bin/env bash
# Installs into .venv, then runs every stage on this machine, with the roles in parallel on its devices.
#
#   ./launch/quickstart.sh [--python=python3.12]      the embedded shapes
#       [--config=configs/shapes.py:small] [--workdir=runs/shapes] [--config.a.b=value ...]
#       [--devices=gpu:0,1]      instead of all GPUs, TPU chips or, without those, CPU cores
#       [--dry_run]              prints the commands and their devices, runs nothing
#
# Needs only Python 3.11 or later.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
show_help launch/quickstart.sh "$@"

wanted=""
flags=()
for flag in "$@"; do
  case $flag in
    --python=*) wanted=${flag#--python=} ;;
    *) flags+=("$flag") ;;
  esac
done

python=$(find_python "$wanted")
folder=$(environment_of "$python" "$wanted")
accelerator=$(find_accelerator)
case $accelerator in
  cuda12)
    say "Found an NVIDIA GPU: installing jax for CUDA 12"
    source launch/device_flags.sh gpu
    ;;
  tpu)
    say "Found a TPU: installing jax for TPU"
    source launch/device_flags.sh tpu
    ;;
  *) say "Found no accelerator: running on the CPU" ;;
esac
install_into "$folder" "$python" evaluation ${accelerator:+"$accelerator"}
exec "$folder/bin/paris-jax" quickstart ${flags[@]+"${flags[@]}"}
