#!/usr/bin/env bash
# Runs one experiment on Cloud TPU, one slice for each role: queued resources and gcloud ssh.
#
#   ./launch/tpu_vm.sh ACTION --config=configs/shapes.py:small --workdir=gs://bucket/run --experts=3 --project=P
#       --zones=us-central1-a[,europe-west4-b,...]     slices are spread over these zones: roles do not communicate
#       --type=v5litepod-4 --runtime=v2-alpha-tpuv5-lite
#       [--name=paris] [--spot] [--role="expert 0"] [--config.a.b=value ...] [--dry_run]
#
# ACTION, in this order; --role="expert 0" (or router, monolith) selects one slice:
#   create    requests the slices and waits until all are active
#   install   copies this checkout to every worker and installs it
#   data      runs prepare and cluster on the first worker of the first slice
#   train     trains all roles in parallel, each on its slice; run it again after a preemption (create and install
#             first if the slice is gone): each role resumes from its checkpoint in --workdir
#   finish    runs assemble and evaluate on the first worker of the first slice
#   status    prints the state of the slices and of the run
#   delete    releases the slices
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/install.sh
show_help launch/tpu_vm.sh "$@"

action=${1:-}
case $action in
  create | install | data | train | finish | status | delete) shift ;;
  *) fail "The first argument must be create, install, data, train, finish, status or delete; see ./launch/tpu_vm.sh --help" ;;
esac
config="" workdir="" experts="" project="" zones="" type="" runtime="" name=paris spot="" only="" dry_run=""
overrides=()
for flag in "$@"; do
  case $flag in
    --config.*=*) overrides+=("$flag") ;;
    --config=*) config=${flag#*=} ;;
    --workdir=*) workdir=${flag#*=} ;;
    --experts=*) experts=${flag#*=} ;;
    --project=*) project=${flag#*=} ;;
    --zones=*) zones=${flag#*=} ;;
    --type=*) type=${flag#*=} ;;
    --runtime=*) runtime=${flag#*=} ;;
    --name=*) name=${flag#*=} ;;
    --role=*) only=${flag#*=} ;;
    --spot) spot=--spot ;;
    --dry_run) dry_run=yes ;;
    *) fail "$flag is unknown; see ./launch/tpu_vm.sh --help" ;;
  esac
done
for required in config workdir experts project zones type runtime; do
  [ -n "${!required}" ] || fail "--$required is required; see ./launch/tpu_vm.sh --help"
done
[[ $experts =~ ^[1-9][0-9]*$ ]] || fail "--experts=$experts: must be a whole number of at least 1"
[[ $workdir == gs://* ]] || fail "--workdir=$workdir: must be a gs:// folder, which every slice can reach"
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud was not found; install the Google Cloud CLI and log in"

roles=()
for ((k = 0; k < experts; k++)); do roles+=("expert $k"); done
roles+=(router monolith)
IFS=, read -ra zone_list <<<"$zones"

run() {
  if [ -n "$dry_run" ]; then
    quoted "$@" | sed 's/^ //'
    echo
  else
    "$@"
  fi
}

# slice I, place I: the name of the slice of role number I, and the flags of its project and zone.
slice() { echo "$name-${roles[$1]// /-}"; }
place() { echo "--project=$project --zone=${zone_list[$(($1 % ${#zone_list[@]}))]}"; }

# remote I WORKERS COMMAND: runs a shell command in the checkout on the workers of a slice.
remote() {
  # shellcheck disable=SC2046  # two flags
  run gcloud compute tpus tpu-vm ssh "$(slice "$1")" $(place "$1") --worker="$2" --command="cd paris_jax && $3"
}

create() {
  # shellcheck disable=SC2046
  run gcloud compute tpus queued-resources create "$(slice "$1")" $(place "$1") --node-id="$(slice "$1")" \
    --accelerator-type="$type" --runtime-version="$runtime" ${spot:+"$spot"}
  if [ -n "$dry_run" ]; then
    # shellcheck disable=SC2046
    echo "# repeat until it prints ACTIVE:" && state "$1"
    return
  fi
  local now
  while now=$(state "$1") && [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING) fail "$(slice "$1") is $now; delete it and create it again" ;;
    esac
    echo "$(slice "$1"): $now"
    sleep 30
  done
}

state() {
  # shellcheck disable=SC2046
  run gcloud compute tpus queued-resources describe "$(slice "$1")" $(place "$1") --format='value(state.state)'
}

archive="$name-checkout.tar.gz"
install() {
  # shellcheck disable=SC2046
  run gcloud compute tpus tpu-vm scp "$archive" "$(slice "$1"):" $(place "$1") --worker=all
  # shellcheck disable=SC2046
  run gcloud compute tpus tpu-vm ssh "$(slice "$1")" $(place "$1") --worker=all \
    --command="tar xzf $archive && cd paris_jax && ./launch/install.sh tpu evaluation"
}

reads_config=$(quoted "--config=$config" ${overrides[@]+"${overrides[@]}"} "--workdir=$workdir")

# Every worker of a slice runs the same command, and JAX joins them. After a preemption or the loss of a worker, they
# resume at once.
train() {
  local flags="--role=${roles[$1]}"
  [[ ${roles[$1]} != expert* ]] || flags="--role=expert --cluster=${roles[$1]#expert }"
  local command="PARIS_JAX_JOIN_HOSTS=1 .venv/bin/paris-jax train$reads_config $flags"
  local again="SECONDS=0; $command; code=\$?; goes_on \$code \$SECONDS"
  remote "$1" all "source launch/device_flags.sh tpu && source launch/goes_on.sh && while $again; do sleep 5; done; exit \$code"
}

# Data stages run in one process, on the CPU: on a slice of several workers, the TPU would wait for the others.
on_cpu="JAX_PLATFORMS=cpu .venv/bin/paris-jax"
data() { remote "$1" 0 "$on_cpu prepare$reads_config && $on_cpu cluster$reads_config"; }
finish() { remote "$1" 0 "$on_cpu assemble$(quoted "--workdir=$workdir") && $on_cpu evaluate$reads_config"; }
delete() {
  # shellcheck disable=SC2046
  run gcloud compute tpus queued-resources delete "$(slice "$1")" $(place "$1") --force --quiet
}

chosen=()
for ((i = 0; i < ${#roles[@]}; i++)); do
  [ -n "$only" ] && [ "$only" != "${roles[$i]}" ] || chosen+=("$i")
done
[ ${#chosen[@]} -gt 0 ] || fail "--role=$only: must be one of $(printf '"%s" ' "${roles[@]}")"

case $action in
  data | finish) "$action" "${chosen[0]}" ;;
  status)
    for i in "${chosen[@]}"; do
      [ -n "$dry_run" ] || printf '%s: ' "$(slice "$i")"
      state "$i"
    done
    run .venv/bin/paris-jax status "--workdir=$workdir"
    ;;
  *)
    [ "$action" != install ] || run git archive --format=tar.gz --prefix=paris_jax/ --output="$archive" HEAD
    # In parallel, because slices wait and train for hours; a failure on one does not stop the others.
    if [ -n "$dry_run" ]; then
      for i in "${chosen[@]}"; do "$action" "$i"; done
    else
      processes=() failed=()
      for i in "${chosen[@]}"; do
        "$action" "$i" 2>&1 | sed "s/^/[${roles[$i]}] /" &
        processes+=($!)
      done
      for n in "${!processes[@]}"; do wait "${processes[$n]}" || failed+=("${roles[${chosen[$n]}]}"); done
      [ ${#failed[@]} -eq 0 ] || fail "$action failed for: ${failed[*]}; see the lines above"
    fi
    ;;
esac
