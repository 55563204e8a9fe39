#!/usr/bin/env bash
# The whole job on this machine: installs into .venv, then runs every stage on the embedded data and prints the report.
#
#   ./launch/quickstart.sh [--python=python3.12] [flags of `paris-jax quickstart`]
#
# Needs Python 3.11 or later and nothing else. An NVIDIA GPU or a TPU is used where there is one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh

asked=""
flags=()
for flag in "$@"; do
  case $flag in
    --python=*) asked=${flag#--python=} ;;
    *) flags+=("$flag") ;;
  esac
done

python=$(find_python "$asked")
folder=$(environment_of "$python" "$asked")
accelerator=$(find_accelerator)
case $accelerator in
  cuda12) say "Found an NVIDIA GPU: installing jax for CUDA 12" ;;
  tpu) say "Found a TPU: installing jax for TPU" ;;
  *) say "Found no accelerator: running on the CPU" ;;
esac
install_into "$folder" "$python" evaluation ${accelerator:+"$accelerator"}
exec "$folder/bin/paris-jax" quickstart ${flags[@]+"${flags[@]}"}
