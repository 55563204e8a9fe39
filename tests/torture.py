"""Kills every writing command at every file operation, runs it again, and compares the outcome with an undisturbed one.

    python -m tests.torture [--commands=cluster,publish] [--every=1] [--seed=0]

A kill is simulated in this process: at the chosen operation (open for writing, rename, delete, make or remove a
folder) the file that is being renamed loses its second half, and this and every later operation fails, so that no
clean-up happens either. `tests/training/torture.py` kills a training job for real.
"""

import argparse
import builtins
import contextlib
import io
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.publish import publish
from paris_jax.artifacts.run_folder import Role, RunFolder, roles
from paris_jax.artifacts.schemas import EvaluationManifest
from paris_jax.clustering.build import cluster
from paris_jax.commands.assemble import assemble
from paris_jax.commands.export import export_weights
from paris_jax.commands.import_weights import import_weights
from paris_jax.commands.sample import Output, sample
from paris_jax.commands.seal import seal
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import prepare
from paris_jax.evaluation.protocol import evaluate

# Differ between runs: times, process numbers, and the videos in the report, whose encoder is not exact.
NEVER_EQUAL = ("metrics.jsonl", "lock", "tensorboard", "checkpoints", "report.html")


class Killed(BaseException):
    """The process is dead."""


class Operations:
    """Counts this process's operations on files below a folder, and ends it at one of them."""

    def __init__(self, folder: Path, kill_at: int = 0):
        self.count, self._folder, self._kill_at = 0, str(folder), kill_at

    def _tick(self, path: Any, half: Any = None) -> None:
        if not isinstance(path, str | os.PathLike) or not os.path.abspath(path).startswith(self._folder):
            return
        self.count += 1
        if self._kill_at and self.count >= self._kill_at:
            if half is not None and self.count == self._kill_at and os.path.isfile(half):
                os.truncate(half, os.path.getsize(half) // 2)
            raise Killed

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """While it is open, operations are counted."""
        originals = {name: getattr(os, name) for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir")}
        real_open = io.open

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if set(mode) & set("wax+"):
                self._tick(file)
            return real_open(file, mode, *args, **kwargs)

        def counted(name: str) -> Callable[..., Any]:
            def operation(path: Any, *args: Any, **kwargs: Any) -> Any:
                self._tick(path, path if name in ("replace", "rename") else None)
                return originals[name](path, *args, **kwargs)

            return operation

        for name in originals:
            setattr(os, name, counted(name))
        io.open = builtins.open = opened
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(os, name, original)
            io.open = builtins.open = real_open


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name, but those that are never equal."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if not set(NEVER_EQUAL) & set(path.relative_to(folder).parts) and path.suffix != locks.SUFFIX
    }
    if described := found.get("evaluation/manifest.json"):
        evaluation = manifest.read(folder / "evaluation", EvaluationManifest, verify=True)
        found["evaluation/manifest.json"] = described.replace(evaluation.files["report.html"].sha256.encode(), b"")
        size = str(evaluation.files["report.html"].bytes)
        found["evaluation/manifest.json"] = found["evaluation/manifest.json"].replace(size.encode(), b"")
    return found


def survive(start: Path, scratch: Path, command: Callable[[Path], None], every: int = 1, first: int = 1) -> int:
    """Kills a command at each `every`-th operation from `first` on; the number of kills, all survived.

    Args:
      start: the folder as it is before the command, which gets a copy of it.
    """
    alone = _copy(start, scratch / "alone")
    operations = Operations(alone)
    with operations.patched():
        command(alone)
    expected, kills = contents(alone), range(first, operations.count + 1, every)
    for kill_at in kills:
        folder = _copy(start, scratch / "killed")
        with Operations(folder, kill_at).patched(), contextlib.suppress(Killed):
            command(folder)
        command(folder)
        found = contents(folder)
        differ = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
        assert not differ, f"killed at operation {kill_at} of {operations.count}: {differ[:5]} differ"
    return len(kills)


def _copy(start: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start, folder)
    return folder


def commands(experiment: Experiment, whole: Path) -> dict[str, tuple[tuple[str, ...], Callable[[Path], None]]]:
    """Writing commands by name: the parts of a run folder that each starts from, and its call.

    `whole` is a run folder in which every command has run; its path does not appear in what they write.
    """
    everything = ("config.json", "partition", "experts", "router", "monolith")

    def published(folder: Path) -> None:
        publish(folder / "ensemble", folder / "published")

    def exported(folder: Path) -> None:
        out = folder / "exported.safetensors"
        if not out.exists():
            export_weights(str(folder / "experts/0/export"), "bfl", str(out))

    def sealed(folder: Path) -> None:
        seal(str(folder / "experts/0/export"), str(folder / "partition/validation"), str(folder / "key.pem"))

    def imported(folder: Path) -> None:
        if not (folder / "imported" / "manifest.json").exists():
            import_weights("auto", [folder / "expert.safetensors"], str(folder / "imported"), experiment)

    def sampled(folder: Path) -> None:
        out = Output(str(folder / "out.gif"), overwrite=True)
        sample(str(folder / "ensemble"), ["a red ball"], out, num_inference_steps=1)

    def republished(folder: Path) -> None:
        if not (folder / "published" / "manifest.json").exists():
            published(folder)

    def run(stage: Callable[[Experiment, RunFolder], None]) -> Callable[[Path], None]:
        return lambda folder: stage(experiment, RunFolder(folder))

    return {
        "prepare": ((), lambda folder: prepare(experiment, RunFolder(folder), shard_size=16)),
        "cluster": (("config.json", "data"), run(cluster)),
        "assemble": (everything, run(assemble)),
        "publish": ((*everything, "ensemble"), republished),
        "export": (everything, exported),
        "seal": ((*everything, "key.pem"), sealed),
        "import": (("expert.safetensors",), imported),
        "sample": ((*everything, "ensemble"), sampled),
        "evaluate": ((*everything, "ensemble"), run(evaluate)),
    }


def write_inputs(run: RunFolder) -> None:
    """Files beside a finished run that some commands read: foreign weights, and a key to sign with."""
    export_weights(str(run.export(Role("expert", 0))), "bfl", str(run.path / "expert.safetensors"))
    (run.path / "key.pem").write_bytes(
        Ed25519PrivateKey.from_private_bytes(bytes(range(32))).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
    )


def start_of(whole: Path, parts: tuple[str, ...], folder: Path) -> Path:
    """A run folder with some parts of another one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    skipped = shutil.ignore_patterns("checkpoints", "tensorboard", "metrics.jsonl")
    for part in parts:
        if (whole / part).is_dir():
            shutil.copytree(whole / part, folder / part, ignore=skipped)
        else:
            shutil.copy(whole / part, folder / part)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commands", default="", help="names, separated by commas; default: all")
    parser.add_argument("--every", type=int, default=1, help="kill at every so many operations")
    parser.add_argument("--seed", type=int, default=0, help="chooses the first operation, where --every is above 1")
    flags = parser.parse_args()
    from tests.conftest import micro_config

    logging.disable(logging.WARNING)
    experiment = Experiment.from_config(micro_config())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = RunFolder(folder / "whole")
        for stage in (prepare, cluster):
            stage(experiment, run)
        for role in roles(experiment.clustering.num_clusters):
            train(experiment, run, role)
        assemble(experiment, run)
        write_inputs(run)
        known = commands(experiment, Path(run.path))
        for name in filter(None, flags.commands.split(",")) if flags.commands else known:
            parts, command = known[name]
            first = random.Random(f"{flags.seed} {name}").randrange(flags.every) + 1
            began = time.monotonic()
            start = start_of(Path(run.path), parts, folder / "start")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                kills = survive(start, folder, command, flags.every, first)
            print(f"{name:<10} {kills:>5} kills survived in {time.monotonic() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
