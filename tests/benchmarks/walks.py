"""Counts the files of the package that one training step, one sampling step, and one prompt from the command line to
frames pass through, as a measure of how many files a reader must open.

    python -m tests.benchmarks.walks

A file counts when one of its functions is called while the step is traced, in order of first entry; "back" counts
returns to a file that was entered before.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2] / "paris_jax"


def trace_files(function: Callable[[], Any]) -> tuple[list[str], int]:
    """Returns the files of the package that a call enters, and the number of returns to an earlier file."""
    files: list[str] = []
    returns, current = 0, ""

    def enter(frame: Any, event: str, _: Any) -> None:
        nonlocal returns, current
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            name = str(Path(frame.f_code.co_filename).relative_to(PACKAGE))
            if name != current:
                returns += name in files
                if name not in files:
                    files.append(name)
                current = name

    sys.setprofile(enter)
    try:
        function()
    finally:
        sys.setprofile(None)
    return files, returns


def main() -> None:
    import jax

    from paris_jax import Ensemble, cli
    from paris_jax.artifacts.run_folder import Role, RunFolder
    from paris_jax.clustering.build import cluster
    from paris_jax.config.experiment import Experiment
    from paris_jax.data.preparation import prepare
    from paris_jax.ensemble import sparse_velocity
    from paris_jax.training import job as jobs
    from paris_jax.training import sharding
    from paris_jax.training.step import ShardedStep
    from tests.conftest import micro_config

    folder = tempfile.mkdtemp()
    experiment, run, role = Experiment.from_config(micro_config()), RunFolder(f"{folder}/run"), Role("expert", 0)
    prepare(experiment, run)
    cluster(experiment, run)
    data = jobs.read_cluster(run.cluster(0), experiment, run)
    job = jobs.make_job(experiment, run, role, data)
    program = ShardedStep(job)
    state, iterator = program.first_state(), jobs.batch_iterator(job, [run.cluster(0)])(0, 1)
    batch = next(iterator)

    def training_step() -> None:
        with jax.set_mesh(program.mesh):
            program.step(state, sharding.place_batch(batch, program.mesh))

    ensemble = Ensemble.load("bundled:shapes")
    x, t, text = ensemble.noise(1), jax.numpy.array([0.5]), ensemble.encode(["a ball"])
    sparse_velocity.ensemble_velocity.clear_cache()
    arguments = [
        "sample",
        "--ensemble=bundled:shapes",
        "--prompt=a ball",
        "--num_inference_steps=2",
        f"--out={folder}/x.mp4",
    ]
    for name, function in (
        ("one training step", training_step),
        ("one sampling step", lambda: ensemble.velocity(x, t, text)),
        ("a prompt from the command line to frames", lambda: cli.run(arguments)),
    ):
        jax.clear_caches()
        files, returns = trace_files(function)
        print(f"{name}: {len(files)} files, {returns} times back\n  {', '.join(files)}")


if __name__ == "__main__":
    main()
