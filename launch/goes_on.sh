#!/usr/bin/env bash
# Decides whether an ended command must be run again; source it, then call it with the exit code and run time.
#
#   source launch/goes_on.sh && goes_on CODE SECONDS
#
# 75 means that the state is saved. If one process of a job is killed (137, 143), JAX aborts the others (134): the newest
# checkpoint is valid, but a job that fails within its first minutes would only fail again.

goes_on() {
  case $1 in
    75) return 0 ;;
    134 | 137 | 143) [ "$2" -ge "${PARIS_JAX_LOST_AFTER:-300}" ] ;;
    *) return 1 ;;
  esac
}
