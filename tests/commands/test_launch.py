"""`paris-jax launch` on the command line: which flags belong to which launcher, and flags from a file."""

import pytest

from paris_jax.cli import parse, run
from paris_jax.launchers.table import LAUNCHERS

FLAGS = ("--config=configs/shapes.py:tiny", "--workdir=/shared/shapes", "--dry_run")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (FLAGS, "--on is missing; it is slurm, tpu_vm, gke or skypilot"),
        (("--on=slurm",), "--workdir is missing"),
        (
            ("--on=slurm", *FLAGS, "--project=p"),
            "--project is not a flag of --on=slurm, which has gpus, nodes, prepare_workers, sbatch",
        ),
        (("--on=slurm", *FLAGS, "--gpus=0"), "--gpus=0: must be at least 1"),
        (("--on=gke", *FLAGS, "--via=helm"), "--via='helm': must be one of jobset, xpk"),
        (("--on=slurm", "sumbit", *FLAGS), "'sumbit' is not an action (did you mean 'submit'?); actions are: submit"),
        (("--on=tpu_vm", *FLAGS), "--on=tpu_vm: the action is missing; actions are: create requests"),
        (("--on=slurm", *FLAGS, "--role=expert 9"), "--role=expert 9: must be one of expert 0"),
        (("--on=slurm", *FLAGS, "--flagfile=nowhere"), "name a file with one flag a line"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(arguments, sentence, capsys):
    assert run(["launch", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


def test_flags_come_from_a_file_too_and_the_command_line_wins(tmp_path, capsys):
    file = tmp_path / "my.flags"
    file.write_text(
        "# of the team\n--config=configs/shapes.py:tiny\n--config.training.steps=700\n--gpus=4\n--workdir=/shared/x\n"
    )
    assert run(["launch", "--on=slurm", f"--flagfile={file}", "--gpus=8", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "train --config=configs/shapes.py:tiny --config.training.steps=700 --workdir=/shared/x" in shown
    assert "--gpus-per-node=8" in shown and "--gpus-per-node=4" not in shown


def test_every_command_reads_flags_from_a_file(tmp_path):
    (tmp_path / "f").write_text("--workdir=runs/x\n--config.training.seed=3\n")
    _, call = parse(["train", f"--flagfile={tmp_path / 'f'}", "--role=router"])
    assert call["workdir"] == "runs/x" and call.changes == ("training.seed=3",) and call["role"] == "router"


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_names_jobs_as_it_is_told(name, capsys):
    accelerator = {"gke": ("--accelerator=v6e:2x4", "--image=i"), "skypilot": ("--accelerator=v6e:2x4",)}
    slices = ("--project=p", "--type=v6e-8", "--zones=z", "--workdir=gs://b/r") if name == "tpu_vm" else ()
    action = "create" if name == "tpu_vm" else "submit" if name == "slurm" else "train"
    flags = (*FLAGS, *slices, *accelerator.get(name, ()), "--name=ours")
    assert run(["launch", f"--on={name}", action, *flags]) == 0
    assert "ours-" in capsys.readouterr().out
