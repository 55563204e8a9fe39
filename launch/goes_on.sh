#!/usr/bin/env bash
# Whether the same command is to be run again after it ended; sourced, then called with its exit code and its seconds.
#
#   source launch/goes_on.sh && goes_on CODE SECONDS
#
# 75 says that everything is saved. Where one process of a job is killed (137, 143), JAX aborts the others (134): the newest
# checkpoint is good, but what fails within its first minutes would only fail again.

goes_on() {
  case $1 in
    75) return 0 ;;
    134 | 137 | 143) [ "$2" -ge "${PARIS_JAX_LOST_AFTER:-300}" ] ;;
    *) return 1 ;;
  esac
}
