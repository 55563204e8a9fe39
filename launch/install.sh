#!/usr/bin/env bash
# Finds Python, creates a virtual environment and installs the pinned versions. The other scripts source it; alone:
#
#   ./launch/install.sh [--python=python3.12] [EXTRA ...]     for example: ./launch/install.sh cuda12 evaluation
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "$*"
  exit 1
}

# show_help SCRIPT ARGUMENT...: if --help is among the arguments, prints the comment at the top of SCRIPT and exits.
show_help() {
  local script=$1 argument
  shift
  for argument in "$@"; do
    case $argument in
      --help | -h)
        awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$script"
        exit 0
        ;;
    esac
  done
}

# quoted WORD...: prints the words quoted for a shell, each after a space.
quoted() {
  local word
  for word in "$@"; do
    case $word in
      "" | *[!A-Za-z0-9_./:=,@%+-]*) printf " '%s'" "${word//\'/\'\\\'\'}" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
}

# find_python [NAME]: prints a Python >= 3.11 that can create virtual environments; NAME is a command, path or "3.12".
find_python() {
  local wanted=${1:-} candidate incomplete="" old=""
  local -a candidates=(python3 python3.12 python3.13 python3.11 python3.14 python)
  [ -z "$wanted" ] || candidates=("$wanted" "python$wanted")
  # pyenv has only its default version on PATH.
  local pyenv=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
  for candidate in "${candidates[@]}"; do
    case $candidate in */*) ;; *) candidates+=("$pyenv"/*/bin/"$candidate") ;; esac
  done
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      old="$old $candidate"
    elif ! "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
      incomplete=$candidate
    else
      command -v "$candidate"
      return
    fi
  done
  if [ -n "$incomplete" ]; then
    fail "$incomplete cannot create virtual environments; install its venv module (on Debian and Ubuntu:" \
      "apt-get install python3-venv), or name another with --python=..."
  fi
  fail "No Python 3.11 or later${wanted:+ called $wanted}${old:+ (too old or broken:$old)}; install one (on Debian 12" \
    "and Ubuntu 24.04: apt-get install python3 python3-venv), or name one with --python=/path/to/python3"
}

# find_accelerator [PCI]: prints the extra for this machine's accelerator, cuda12 or tpu, if it has one.
find_accelerator() {
  local pci=${1:-/sys/bus/pci/devices} device
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    echo cuda12
    return
  fi
  for device in "$pci"/*; do
    # Google's vendor id and the device ids of TPUs, as in jax/_src/hardware_utils.py.
    [ "$(cat "$device/vendor" 2>/dev/null)" = 0x1ae0 ] || continue
    case $(cat "$device/device" 2>/dev/null) in
      0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076)
        echo tpu
        return
        ;;
    esac
  done
}

# environment_of PYTHON [NAME]: prints the folder of the virtual environment: .venv, or .venv-pyXY if a NAME is given.
environment_of() {
  local python=$1 name=${2:-}
  if [ -z "$name" ]; then
    echo .venv
  else
    "$python" -c 'import sys; print(".venv-py{}{}".format(*sys.version_info))'
  fi
}

# install_into FOLDER PYTHON EXTRA...: installs this project with EXTRAs into FOLDER; does nothing if it is up to date.
install_into() {
  local folder=$1 python=$2 version constraints stamp extras mark
  shift 2
  if ! "$folder/bin/python" -c 'import pip' >/dev/null 2>&1; then
    say "Creating $folder with $("$python" --version) ($python)"
    "$python" -m venv --clear "$folder"
  fi
  version=$("$folder/bin/python" -c 'import sys; print("{}{}".format(*sys.version_info))')
  constraints=launch/constraints-py$version.txt
  # Python releases newer than those that are tested use the versions of the newest tested one.
  [ -f "$constraints" ] || constraints=launch/constraints-py312.txt

  mark="$folder/.installed"
  stamp=$(cat pyproject.toml "$constraints" | cksum)
  extras="$*"
  if [ -f "$mark" ] && [ "$(head -n 1 "$mark")" = "$stamp" ]; then
    local missing=""
    for extra in "$@"; do grep -qx "$extra" <(tail -n +2 "$mark") || missing=yes; done
    [ -n "$missing" ] || return 0
    extras="$extras $(tail -n +2 "$mark" | tr '\n' ' ')"
  fi
  # shellcheck disable=SC2086  # one word for each extra
  extras=$(printf '%s\n' $extras | sort -u)

  say "Installing the versions of $constraints into $folder (extras: $(echo "${extras:-none}" | paste -sd ' ' -))"
  rm -f "$mark"
  _install "$folder" "$constraints" "$(echo "$extras" | paste -sd , -)"
  printf '%s\n%s\n' "$stamp" "$extras" >"$mark"
}

# uv takes seconds where pip takes a minute, but only pip reads an index that was configured for pip.
_install() {
  local folder=$1 constraints=$2 project=".${3:+[$3]}"
  if "$folder/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.5,<1'; then
    "$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --constraints "$constraints" --editable "$project" &&
      return
    say "uv could not install; trying pip"
  fi
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" --editable "$project" ||
    fail "The installation failed; see the lines above. It needs a Python package index and 2 GB of disk"
}

# Executed, not sourced.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  show_help "$0" "$@"
  cd "$(dirname "$0")/.."
  wanted=""
  extras=()
  for argument in "$@"; do
    case $argument in
      --python=*) wanted=${argument#--python=} ;;
      -*) fail "$argument is unknown; see ./launch/install.sh --help" ;;
      *) extras+=("$argument") ;;
    esac
  done
  python=$(find_python "$wanted")
  install_into "$(environment_of "$python" "$wanted")" "$python" ${extras[@]+"${extras[@]}"}
fi
