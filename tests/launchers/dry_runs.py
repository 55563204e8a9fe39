"""The dry runs of docs/dry_runs, one file for each launcher.

python -m tests.launchers.dry_runs     writes them anew
"""

import contextlib
import io
import shlex
from pathlib import Path

from paris_jax.cli import parse
from paris_jax.commands.table import COMMANDS

FOLDER = Path(__file__).parents[2] / "docs" / "dry_runs"
SMALL = "--config=configs/shapes.py:small --workdir=gs://bucket/shapes"
TPU_VM = (
    f"{SMALL} --project=my-project --slices=2 --type=v5litepod-16,v6e-8 --zones=us-central1-a,europe-west4-b --spot"
)
IMAGE = "--image=us-docker.pkg.dev/my-project/paris/paris-jax:1"
COMMAND_LINES = {
    "slurm": [
        "./launch/slurm.sh --config=configs/shapes.py:h200 --workdir=/shared/runs/shapes --gpus=8 "
        "--sbatch='--partition=gpu --time=24:00:00'"
    ],
    "tpu_vm": [
        f"./launch/tpu_vm.sh {action} {TPU_VM}"
        for action in ("create", "install", "data", "train", "logs", "stop", "finish", "delete")
    ],
    "gke": [f"./launch/gke.sh {SMALL} {IMAGE} --accelerator=v5e:4x4 --queue=team-queue --spot"],
    "xpk": [
        f"./launch/gke.sh train {SMALL} {IMAGE} --accelerator=h100:8 --nodes=2 --via=xpk --cluster_name=my-cluster "
        "--zone=us-central1-a"
    ],
    "skypilot": [f"./launch/skypilot.sh {a} {SMALL} --accelerator=h100:8 --spot" for a in ("data", "train", "finish")],
}


def dry_run(line: str) -> str:
    """What a launcher prints for a command line with --dry_run."""
    script, *arguments = shlex.split(line)
    name, call = parse(["launch", f"--on={Path(script).stem}", *arguments, "--dry_run"])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        COMMANDS[name].run(call)
    return printed.getvalue()


def page(name: str) -> str:
    """The dry runs of a launcher, each below its command line."""
    return "\n".join(f"$ {line} --dry_run\n{dry_run(line)}" for line in COMMAND_LINES[name])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in COMMAND_LINES:
        (FOLDER / f"{each}.txt").write_text(page(each))
