#!/usr/bin/env bash
# Runs one experiment on Cloud TPU: queued resources, and gcloud ssh to detached jobs. Roles queue over the slices.
#
#   ./launch/tpu_vm.sh ACTION --config=configs/shapes.py:small --workdir=gs://bucket/run --project=P
#       --type=v5litepod-4[,v6e-8,...] --zones=us-central1-a[,europe-west4-b,...]     of each slice, going round
#       [--slices=2]               fewer than roles: each slice trains its roles in turn (default: one slice for each role)
#       [--prepare_workers=2]      data: slices whose first workers prepare the clips
#       [--runtime=...] [--spot] [--slice=0] [--role="expert 0"] [--name=...] [--config.a.b=value ...] [--dry_run]
#
# ACTION, in this order; --slice=N or --role="expert 0" (or router, monolith) selects some slices:
#   create    requests the slices that are not there and waits until all are active
#   install   copies this checkout's commit to every worker and installs it
#   data      runs prepare and cluster on the first worker of the first slice
#   train     starts the roles, detached; again after a preemption (create and install first if the slice is gone):
#             each role resumes from its checkpoint in --workdir, and a slice that still trains is left alone
#   status    prints the state of the slices and of their queues
#   logs      prints the end of the logs; --follow with --slice=N goes on
#   stop      stops training; the running roles save first
#   finish    runs assemble and evaluate on the first worker of the first slice
#   delete    releases the slices
#
# --flagfile=FILE reads flags from a file, one a line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/launcher.sh
start_launcher tpu_vm "$@"
