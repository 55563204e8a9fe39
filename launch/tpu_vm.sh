#!/usr/bin/env bash
# Runs one experiment on Cloud TPU, one slice for each role: queued resources and gcloud ssh.
#
#   ./launch/tpu_vm.sh ACTION --config=configs/shapes.py:small --workdir=gs://bucket/run --experts=3 --project=P
#       --zones=us-central1-a[,europe-west4-b,...]     slices go round these zones: roles never talk to each other
#       --type=v5litepod-4 --runtime=v2-alpha-tpuv5-lite
#       [--name=paris] [--spot] [--role="expert 0"] [--config.a.b=value ...] [--dry_run]
#
# ACTION, in this order; --role="expert 0" (or router, monolith) narrows it to one slice:
#   create    asks for the slices and waits until each is there
#   install   copies this checkout to every worker and installs it
#   data      prepare and cluster, on the first worker of the first slice
#   train     every role on its slice, side by side; run it again after a preemption (create and install first if
#             the slice is gone): each role goes on from its checkpoint in --workdir
#   finish    assemble and evaluate, on the first worker of the first slice
#   status    what is there, and what is done
#   delete    gives the slices back
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source launch/install.sh
show_help launch/tpu_vm.sh "$@"

action=${1:-}
case $action in
  create | install | data | train | finish | status | delete) shift ;;
  *) refuse "The first word must be create, install, data, train, finish, status or delete; see the top of launch/tpu_vm.sh" ;;
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
    *) refuse "$flag is unknown; see the top of launch/tpu_vm.sh" ;;
  esac
done
for needed in config workdir experts project zones type runtime; do
  [ -n "${!needed}" ] || refuse "--$needed is needed; see the top of launch/tpu_vm.sh"
done
[[ $experts =~ ^[1-9][0-9]*$ ]] || refuse "--experts=$experts: must be a whole number of at least 1"
[[ $workdir == gs://* ]] || refuse "--workdir=$workdir: must be a gs:// folder, which every slice can reach"
[ -n "$dry_run" ] || command -v gcloud >/dev/null || refuse "There is no gcloud here; install the Google Cloud CLI and log in"

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

# The slice of role number I has this name and lies in this zone.
slice() { echo "$name-${roles[$1]// /-}"; }
place() { echo "--project=$project --zone=${zone_list[$(($1 % ${#zone_list[@]}))]}"; }

# remote I WORKERS COMMAND: runs a line of shell in the checkout on the workers of a slice.
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
    echo "# and until it says ACTIVE:" && state "$1"
    return
  fi
  local now
  while now=$(state "$1") && [ "$now" != ACTIVE ]; do
    case $now in
      FAILED | SUSPENDED | SUSPENDING) refuse "$(slice "$1") is $now; delete it and create it again" ;;
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

# Every worker of a slice runs the same command: JAX joins them. What was preempted or lost a worker goes on at once.
train() {
  local flags="--role=${roles[$1]}"
  [[ ${roles[$1]} != expert* ]] || flags="--role=expert --cluster=${roles[$1]#expert }"
  local command="PARIS_JAX_JOIN_HOSTS=1 .venv/bin/paris-jax train$reads_config $flags"
  local again="SECONDS=0; $command; code=\$?; goes_on \$code \$SECONDS"
  remote "$1" all "source launch/device_flags.sh tpu && source launch/goes_on.sh && while $again; do sleep 5; done; exit \$code"
}

# Data stages need one process; on a slice of several workers the TPU would wait for the others.
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
[ ${#chosen[@]} -gt 0 ] || refuse "--role=$only: must be one of $(printf '"%s" ' "${roles[@]}")"

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
    # Side by side, because slices wait and work for hours; one that fails does not stop another's training.
    if [ -n "$dry_run" ]; then
      for i in "${chosen[@]}"; do "$action" "$i"; done
    else
      processes=() failed=()
      for i in "${chosen[@]}"; do
        "$action" "$i" 2>&1 | sed "s/^/[${roles[$i]}] /" &
        processes+=($!)
      done
      for n in "${!processes[@]}"; do wait "${processes[$n]}" || failed+=("${roles[${chosen[$n]}]}"); done
      [ ${#failed[@]} -eq 0 ] || refuse "$action did not end well for: ${failed[*]}; see the lines above"
    fi
    ;;
esac
