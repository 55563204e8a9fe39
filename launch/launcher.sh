#!/usr/bin/env bash
# Installs the package where it is missing and starts a launcher; source it, then call it with the launcher's name.
#
#   source launch/launcher.sh && start_launcher slurm "$@"

start_launcher() {
  local on=$1 argument
  shift
  source launch/install.sh
  for argument in "$@"; do
    case $argument in
      --help | -h)
        show_help "launch/$on.sh" --help
        ;;
    esac
  done
  [ -x .venv/bin/paris-jax ] || install_into .venv "$(find_python)"
  exec .venv/bin/paris-jax launch "--on=$on" "$@"
}
