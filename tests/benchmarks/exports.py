"""Host memory and time of writing and reading an exported network.

python -m tests.benchmarks.exports --parameters=0.2 --shard_mb=256
"""

import argparse
import dataclasses
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from paris_jax.artifacts import ensemble_manifest, exported
from paris_jax.models import functional

CARRIED = ("role", "cluster", "clusters", "timestep_shift", "latent", "codec", "text", "text_length", "fps")


def config_of(parameters: float):
    """The bundled expert, widened to about so many billion parameters."""
    part = exported.read(ensemble_manifest.BUNDLED_FOLDER / "shapes" / "experts" / "0")
    config = dataclasses.replace(part.config, hidden=1024, heads=64, single_blocks=1)
    each = functional.count(dataclasses.replace(config, single_blocks=2)) - functional.count(config)
    blocks = max(1, round((parameters * 1e9 - functional.count(config)) / each) + 1)
    return part, dataclasses.replace(config, single_blocks=blocks)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(folder: Path, parameters: float, shard_bytes: int) -> None:
    part, config = config_of(parameters)
    rng = np.random.default_rng(0)
    names = functional.to_names(functional.abstract(config))
    flat = {name: rng.standard_normal(leaf.shape, np.float32) for name, leaf in names.items()}
    content = {name: getattr(part.manifest, name) for name in CARRIED}
    before, began = peak(), time.perf_counter()
    exported.write(folder, config, functional.from_names(flat), "", "float32", shard_bytes, **content)
    report("write", config, before, began)


def read(folder: Path, parameters: float) -> None:
    _, config = config_of(parameters)
    functional.count(config)
    before, began = peak(), time.perf_counter()
    part = exported.read(folder)
    report("read", part.config, before, began)


def report(what, config, before: int, began: float) -> None:
    size = 4 * functional.count(config)
    seconds, grown = time.perf_counter() - began, peak() - before
    print(
        f"{what}: {functional.count(config):,} parameters, {size / 1e9:.3f} GB; peak {grown / 1e9:.3f} GB more, "
        f"{grown / size:.2f} of its size; {seconds:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=0.2, help="billions")
    parser.add_argument("--shard_mb", type=int, default=256)
    parser.add_argument("--step", choices=("write", "read"), help="one step, in this process")
    parser.add_argument("--folder")
    flags = parser.parse_args()
    if flags.step == "write":
        write(Path(flags.folder), flags.parameters, flags.shard_mb * 1_000_000)
    elif flags.step == "read":
        read(Path(flags.folder), flags.parameters)
    else:
        folder = tempfile.mkdtemp()
        try:
            for step in ("write", "read"):  # a process each: the peak is of its whole life
                command = [sys.executable, "-m", "tests.benchmarks.exports", *sys.argv[1:], f"--step={step}"]
                subprocess.run([*command, f"--folder={folder}"], check=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
