#!/usr/bin/env bash
# Submits one experiment to SLURM: prepare, cluster, one job for each role, then assemble and evaluate.
#
#   ./launch/slurm.sh --config=configs/shapes.py:h200 --workdir=/shared/runs/shapes --experts=3
#       [--nodes=1] [--gpus=1]     for each role: nodes, and GPUs (= processes) per node
#       [--sbatch="--partition=gpu --time=24:00:00 --cpus-per-task=8"]     for every job
#       [--config.a.b=value ...]   for every command that reads the config
#       [--dry_run]                prints the script of sbatch commands instead of running it
#
# Run it on a login node, from a checkout and with a --workdir that every node sees, after ./launch/install.sh cuda12
# evaluation has created .venv there. launch/slurm_job.sh requeues preempted jobs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/install.sh
show_help launch/slurm.sh "$@"

config="" workdir="" experts="" nodes=1 gpus=1 options="" dry_run=""
overrides=()
for flag in "$@"; do
  case $flag in
    --config.*=*) overrides+=("$flag") ;;
    --config=*) config=${flag#*=} ;;
    --workdir=*) workdir=${flag#*=} ;;
    --experts=*) experts=${flag#*=} ;;
    --nodes=*) nodes=${flag#*=} ;;
    --gpus=*) gpus=${flag#*=} ;;
    --sbatch=*) options=${flag#*=} ;;
    --dry_run) dry_run=yes ;;
    *) fail "$flag is unknown; see ./launch/slurm.sh --help" ;;
  esac
done
[ -n "$config" ] && [ -n "$workdir" ] && [ -n "$experts" ] ||
  fail "--config, --workdir and --experts are required; see ./launch/slurm.sh --help"
for number in "experts=$experts" "nodes=$nodes" "gpus=$gpus"; do
  [[ ${number#*=} =~ ^[1-9][0-9]*$ ]] || fail "--$number: must be a whole number of at least 1"
done

reads_config=("--config=$config" ${overrides[@]+"${overrides[@]}"} "--workdir=$workdir")

# job VARIABLE DEPENDENCIES NODES GPUS COMMAND...: prints the line that submits one job.
# JAX expects one process per GPU, each of which sees all GPUs of its node.
job() {
  local name=$1 after=$2 nodes=$3 gpus=$4
  shift 4
  # shellcheck disable=SC2016  # printed as it is
  printf '%s=$(sbatch --parsable --job-name=paris-%s --nodes=%s --ntasks-per-node=%s --gpus-per-node=%s' \
    "$name" "${name//_/-}" "$nodes" "$gpus" "$gpus"
  # --signal: a job that nears its time limit saves. --requeue: SLURM requeues preempted jobs.
  printf ' --requeue --open-mode=append --signal=TERM@120 --output=slurm-%%x-%%j.log'
  [ -z "$after" ] || printf ' --dependency="afterok:%s" --kill-on-invalid-dep=yes' "$after"
  printf '%s launch/slurm_job.sh%s)\n' "${options:+ $options}" "$(quoted "$@")"
}

script() {
  echo "set -euo pipefail"
  job prepare "" 1 1 prepare "${reads_config[@]}"
  # shellcheck disable=SC2016  # the job's number is known when the script runs
  job cluster '$prepare' 1 1 cluster "${reads_config[@]}"
  local roles="" k
  for ((k = 0; k < experts; k++)); do
    # shellcheck disable=SC2016
    job "expert_$k" '$cluster' "$nodes" "$gpus" train "${reads_config[@]}" --role=expert "--cluster=$k"
    roles="$roles:\$expert_$k"
  done
  for role in router monolith; do
    # shellcheck disable=SC2016
    job "$role" '$cluster' "$nodes" "$gpus" train "${reads_config[@]}" "--role=$role"
    roles="$roles:\$$role"
  done
  job assemble "${roles#:}" 1 1 assemble "--workdir=$workdir"
  # shellcheck disable=SC2016
  job evaluate '$assemble' 1 1 evaluate "${reads_config[@]}"
  # shellcheck disable=SC2016
  echo 'echo "Submitted; the last job is $evaluate"'
}

if [ -n "$dry_run" ]; then
  script
else
  command -v sbatch >/dev/null || fail "sbatch was not found; run this on a login node of the SLURM cluster"
  [ -x .venv/bin/paris-jax ] || fail ".venv is missing; run once: ./launch/install.sh cuda12 evaluation"
  script | bash
fi
