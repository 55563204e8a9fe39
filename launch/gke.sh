#!/usr/bin/env bash
# Runs one experiment on GKE: a JobSet with one replicated job for each stage, or xpk workloads for the roles.
#
#   ./launch/gke.sh [submit] --config=configs/shapes.py:small --workdir=gs://bucket/run --image=IMAGE
#       --accelerator=v5e:4x4      a slice for each role; or h100:8 with --nodes=1: GPUs per node, and nodes
#       [--namespace=default] [--queue=...] [--service_account=...] [--volume=CLAIM:/path] [--spot]
#       [--prepare_workers=16]     a job array that prepares the clips
#       [--role="expert 0"] [--config.a.b=value ...] [--dry_run]
#   ./launch/gke.sh data|train|finish ...     the same in three steps, and with xpk for the roles:
#       [--via=xpk --cluster_name=... --project=... --zone=...]
#   ./launch/gke.sh status|logs|stop ...
#
# Needs kubectl with the cluster's credentials, and JobSet there. IMAGE is built from launch/Dockerfile.tpu or
# launch/Dockerfile.gpu. --flagfile=FILE reads flags from a file, one a line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/launcher.sh
start_launcher gke "$@"
