#!/usr/bin/env bash
# Runs one experiment as SkyPilot managed jobs, one for each role, on any cloud; SkyPilot recovers preempted ones.
#
#   ./launch/skypilot.sh data|train|finish --config=configs/shapes.py:small --workdir=gs://bucket/run
#       --accelerator=h100:8       GPUs of each node; or a slice: v5e:4x4
#       [--prepare_workers=16]     a job array that prepares the clips
#       [--nodes=1] [--infra=gcp] [--spot] [--image=IMAGE] [--role="expert 0"] [--config.a.b=value ...] [--dry_run]
#   ./launch/skypilot.sh status|logs|stop ...
#
# Needs SkyPilot (pip install skypilot, with the extra of your cloud) and a bucket that the jobs may write. Without
# --image, each job installs this folder. --flagfile=FILE reads flags from a file, one a line.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/launcher.sh
start_launcher skypilot "$@"
