#!/usr/bin/env bash
# Runs a queue of stages on this host, detached from the terminal that started it; launch/tpu_vm.sh calls it on workers.
#
#   ./launch/detached.sh start DEVICES 'train --workdir=... --role=router' ...     one stage after the other
#   ./launch/detached.sh stop       lets the running stage save, and starts no other
#   ./launch/detached.sh status     prints what runs, or how the last queue ended
#   ./launch/detached.sh logs [--follow]
#
# A second start does nothing while a queue is running. A stage that is refused does not stop the next one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
show_help launch/detached.sh "$@"

state=${PARIS_JAX_QUEUE:-.queue} # lock, pid, status and log
mkdir -p "$state"

is_running() { ! flock --nonblock "$state/lock" true; }

# run_queue DEVICES STAGE...: in the background, holding the lock as descriptor 9.
run_queue() {
  local devices=$1 stage words code failed="" child=""
  shift
  trap 'touch "$state/stop"; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
  for stage in "$@"; do
    [ ! -e "$state/stop" ] || break
    echo "running: $stage" >"$state/status"
    echo "== $(date '+%Y-%m-%d %H:%M:%S') $stage"
    # Each stage is one line of words quoted for a shell.
    eval "words=($stage)"
    launch/job.sh "$devices" loop "${words[@]}" &
    child=$!
    code=0
    # A signal ends "wait" early; the stage saves meanwhile.
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do wait "$child" || code=$?; done
    child=""
    [ "$code" = 0 ] || failed="$failed; exit code $code of: $stage"
  done
  if [ -e "$state/stop" ]; then
    echo "stopped" >"$state/status"
  else
    echo "ended${failed:-: all done}" >"$state/status"
  fi
}

case ${1:-} in
  start)
    shift
    [ $# -ge 2 ] || fail "start needs DEVICES and at least one stage"
    if is_running; then
      echo "a queue is running already ($(cat "$state/status")); nothing was started"
      exit 0
    fi
    rm -f "$state/stop"
    export PARIS_JAX_JOIN_HOSTS=${PARIS_JAX_JOIN_HOSTS-1}
    # A session of its own: the end of this terminal, or of its ssh, does not reach it.
    setsid nohup flock --nonblock "$state/lock" "${BASH_SOURCE[0]}" queue "$@" >>"$state/log" 2>&1 </dev/null &
    echo "started: $# stages in the background; ./launch/detached.sh logs shows them" | sed "s/$# stages/$(($# - 1)) stage(s)/"
    ;;
  queue)
    shift
    echo $$ >"$state/pid"
    run_queue "$@"
    ;;
  stop)
    touch "$state/stop"
    if is_running; then
      kill -TERM "$(cat "$state/pid")"
      echo "stopping; the running stage saves first"
    else
      echo "nothing is running"
    fi
    ;;
  status)
    if is_running; then cat "$state/status"; else sed 's/^running:/interrupted:/' "$state/status" 2>/dev/null || echo "nothing was started"; fi
    ;;
  logs)
    [ -e "$state/log" ] || fail "there is no log yet"
    if [ "${2:-}" = --follow ]; then exec tail -n 40 -F "$state/log"; else tail -n 40 "$state/log"; fi
    ;;
  *) fail "The first argument must be start, stop, status or logs; see ./launch/detached.sh --help" ;;
esac
