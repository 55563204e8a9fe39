"""Killed or out of room while it assembles, samples or evaluates: nothing half-written is taken for done.

The same command then ends in what it would have made undisturbed. (prepare, cluster and train have such tests of their
own, beside the others of their stage.)
"""

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import EvaluationManifest
from paris_jax.commands.assemble import assemble
from paris_jax.commands.sample import Output, sample
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.errors import UserError
from paris_jax.evaluation.protocol import evaluate

ROOT = Path(__file__).parents[2]
# Writes half of the file whose turn it is, and dies as by kill -9. JAX's cache of compiled programs does not count.
DYING = """
import os, signal, sys
from etils import epath
from paris_jax import cli
left = int(sys.argv[1])
local = type(epath.Path("."))
whole = local.write_bytes

def write_bytes(self, data):
    global left
    left -= not self.is_relative_to(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if not left:
        whole(self, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, data)

local.write_bytes = write_bytes
sys.exit(cli.run(sys.argv[2:]))
"""


def killed_at(write: int, *arguments: str) -> None:
    command = [sys.executable, "-c", DYING, str(write), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@contextlib.contextmanager
def no_file_larger_than(size: int):
    """As on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder) -> dict[str, bytes]:
    """Every file of a folder but unfinished ones, by name."""
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file() and not p.name.startswith(".")}


def left_unfinished(folder) -> list[Path]:
    return [path for path in Path(folder).rglob("*.partial") if path.is_file()]


class TestAssemble:
    @pytest.fixture
    def parts(self, finished):
        """A run whose networks are trained and not yet admitted."""
        finished.ensemble.rmtree()
        return finished

    def ends_whole(self, micro, run, trained):
        assert not manifest.exists(run.ensemble)
        with pytest.raises(UserError, match="ensemble"):
            Ensemble.load(run.ensemble)
        assemble(micro, run)
        assert contents(run.ensemble) == contents(trained.ensemble)
        assert not left_unfinished(run.path)

    def test_killed(self, micro, parts, trained):
        killed_at(1, "assemble", f"--workdir={parts}")
        assert left_unfinished(parts.ensemble)
        self.ends_whole(micro, parts, trained)

    def test_out_of_room(self, micro, parts, trained):
        with (
            no_file_larger_than(500),
            pytest.raises(UserError, match=r"Cannot write .*manifest.json .*free some space"),
        ):
            assemble(micro, parts)
        assert not left_unfinished(parts.path)
        self.ends_whole(micro, parts, trained)


class TestSample:
    PROMPTS = ("a small red circle moving left slowly on a white ground", "a digit nine on a black ground")

    @pytest.fixture
    def undisturbed(self, trained, tmp_path):
        paths = sample(str(trained.ensemble), self.PROMPTS, Output(folder=str(tmp_path / "undisturbed")))
        return [Path(path).read_bytes() for path in paths]

    def ends_whole(self, run, undisturbed):
        """The command again writes both, beside what is there already."""
        paths = sample(str(run.ensemble), self.PROMPTS)
        assert [Path(path).read_bytes() for path in paths] == undisturbed
        assert not left_unfinished(run.samples)

    def test_killed(self, finished, undisturbed):
        prompts = [f"--prompt={prompt}" for prompt in self.PROMPTS]
        killed_at(2, "sample", f"--ensemble={finished.ensemble}", *prompts)
        (video,) = contents(finished.samples)  # the first of two files; of the second, nothing under its name
        assert video.endswith(".mp4") and contents(finished.samples)[video] == undisturbed[0]
        self.ends_whole(finished, undisturbed)
        assert contents(finished.samples)[video] == undisturbed[0] and len(contents(finished.samples)) == 3

    def test_out_of_room(self, finished, undisturbed):
        with no_file_larger_than(500), pytest.raises(UserError, match=r"Cannot write .*\.mp4 .*free some space"):
            sample(str(finished.ensemble), self.PROMPTS)
        assert not list(Path(finished.samples).rglob("*"))
        self.ends_whole(finished, undisturbed)


@pytest.fixture(scope="module")
def results(micro, trained, tmp_path_factory):
    """results.json of an evaluation that nothing disturbed."""
    run = RunFolder(tmp_path_factory.mktemp("undisturbed") / "run")
    shutil.copytree(trained.path, run.path)
    evaluate(micro, run)
    return json.loads(contents(run.evaluation)["results.json"])


class TestEvaluate:
    def ends_whole(self, micro, run, results):
        assert not manifest.exists(run.evaluation)
        evaluate(micro, run)
        manifest.read(run.evaluation, EvaluationManifest, verify=True)
        figures = ["headline.pdf", "headline.png"] if importlib.util.find_spec("matplotlib") else []
        assert sorted(contents(run.evaluation)) == [*figures, "manifest.json", "report.html", "results.json"]
        assert json.loads(contents(run.evaluation)["results.json"]) == results
        assert not left_unfinished(run.evaluation)

    def test_killed_twice(self, micro, finished, results):
        # Files in their order: two of samples, two of losses, the router's hits, four of frames that are given (two
        # kinds, two arms), results, report, manifest.
        killed_at(2, "evaluate", f"--workdir={finished}")
        kept = sorted(path.name.split("-")[1] for path in Path(finished.evaluation / ".partial").glob("*.safetensors"))
        assert kept == ["ensemble"]
        killed_at(10, "evaluate", f"--workdir={finished}")  # the ensemble's samples are not made again: the report
        assert sorted(contents(finished.evaluation)) == ["results.json"]
        self.ends_whole(micro, finished, results)

    def test_out_of_room(self, micro, finished, results):
        with no_file_larger_than(5_000), pytest.raises(UserError, match=r"Cannot write .*samples-ensemble"):
            evaluate(micro, finished)
        assert not left_unfinished(finished.evaluation)
        self.ends_whole(micro, finished, results)
