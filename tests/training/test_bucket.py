"""A run folder on gs://, with a file system in memory standing in for the bucket."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUCKET = """
import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")

    @classmethod
    def _strip_protocol(cls, path):
        for scheme in ("gs://", "gcs://"):
            if path.startswith(scheme):
                path = "memory://" + path[len(scheme):]
        return MemoryFileSystem._strip_protocol(path)

    def _open(self, path, mode="rb", **how):
        assert "a" not in mode, "nothing grows on a bucket"
        return super()._open(path, mode, **how)


for name in ("gs", "gcs"):
    fsspec.register_implementation(name, Bucket, clobber=True)
"""
# Training itself needs Orbax's own access to buckets, so parts that were trained elsewhere are copied there.
JOURNEY = """
import sys
from etils import epath
from paris_jax.config.experiment import Experiment
from paris_jax.artifacts.run_folder import Role, RunFolder, roles
from paris_jax.commands.assemble import assemble
from paris_jax.clustering.build import cluster
from paris_jax.evaluation.protocol import evaluate
from paris_jax.data.preparation import prepare
from paris_jax.commands.sample import sample
from paris_jax.commands.status import status
from paris_jax.training.metrics import Metrics
from tests.conftest import micro_config

experiment, run, trained = Experiment.from_config(micro_config()), RunFolder("gs://bucket/run"), RunFolder(sys.argv[1])
prepare(experiment, run)
cluster(experiment, run)
for role in roles(3):
    run.export(role).mkdir(parents=True, exist_ok=True)
    for path in trained.export(role).iterdir():
        (run.export(role) / path.name).write_bytes(path.read_bytes())
assemble(experiment, run)
sample(str(run.ensemble), ["a small red circle moving left slowly on a white ground"], num_inference_steps=2)
evaluate(experiment, run)
states = [state for _, state, _ in status(run)]
assert states == ["done"] * len(states), states
assert (run.evaluation / "results.json").read_bytes() == epath.Path(sys.argv[2]).read_bytes()

Metrics._board = None
import paris_jax.training.metrics as metrics
class NoBoard:
    def write_scalars(self, step, scalars): pass
    def flush(self): pass
    def close(self): pass
metrics.tensorboard = lambda folder, start: NoBoard()
for start, steps in ((0, (4, 8)), (4, (8, 12))):
    job = Metrics(run.role(Role("router")), start)
    for step in steps:
        job.write(step, {"loss": step + start})
        job.flush()
        assert metrics.read(job.path)[-1]["step"] == step
    job.close()
lines = metrics.read(run.metrics(Role("router")))
assert [(line["step"], line["loss"]) for line in lines] == [(4, 4), (8, 12), (12, 16)], lines
print("all done")
"""


def test_every_stage_but_training_works_on_a_bucket(micro, trained, finished, tmp_path):
    pytest.importorskip("fsspec", reason="comes with the extra tpu, and with Orbax")
    from paris_jax.evaluation.protocol import evaluate

    evaluate(micro, finished)
    arguments = [str(trained), str(finished.evaluation / "results.json")]
    done = subprocess.run(
        [sys.executable, "-c", BUCKET + JOURNEY, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("all done\n")
    assert not list(tmp_path.glob("gs:*"))


def test_a_missing_bucket_library_is_named_with_its_extra(tmp_path):
    script = """
import sys
sys.modules["gcsfs"] = None
from paris_jax import cli
sys.exit(cli.run(["sample", "--ensemble=gs://bucket/run/ensemble", "--prompt=x"]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: gs:// needs the extra 'tpu'")
