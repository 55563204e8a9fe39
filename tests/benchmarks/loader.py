"""The loader at real sizes: latents of 33 x 256 x 256 clips with 512 text tokens; records/s, MB/s, memory.

python -m tests.benchmarks.loader [--records=256] [--workers=0,1,2,4] [--text=512x4096] [--tokens=512]

The records are those of HunyuanVideo's VAE (9 x 32 x 32 x 16, float16) and of T5-XXL (bfloat16). They are written to a
temporary folder, so they are read from the page cache: what is measured is decoding, collating and moving, not the
disk. Workers are Grain's processes; 0 reads with the threads of the training process, as training does by default.
Beside it stands what one H100 needs for the preset `large`: its FLOPs per sample, at the utilization asked of it.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import ClusterManifest
from paris_jax.config.experiment import Experiment
from paris_jax.data import records
from paris_jax.data.loader import training_batches
from paris_jax.models import flops, functional

LATENT = (9, 32, 32, 16)
H100, MFU = 989e12, 0.45  # dense bfloat16, and the utilization that is aimed at


def write(folder: Path, count: int, tokens: int, width: int) -> None:
    """A cluster folder of so many records, all with texts of the full length."""
    rng = np.random.default_rng(0)
    latent = rng.normal(size=LATENT).astype(np.float16)
    text = rng.normal(size=(tokens, width)).astype(ml_dtypes.bfloat16)
    pooled = rng.normal(size=768).astype(ml_dtypes.bfloat16)
    names = [records.shard_name("clips", number, 4) for number in range(4)]
    for number, name in enumerate(names):
        made = (
            records.Record(f"clip-{i:06d}", latent, text, pooled, np.zeros(4, np.float32), "a clip", {}, 0)
            for i in range(number, count, 4)
        )
        records.write_shard(folder / name, made)
    content = {
        "codec": {"name": "hunyuan"},
        "text": {"name": "t5+clip", "max_tokens": tokens, "width": width, "pooled_width": 768, "weights": {}},
        "features": {},
        "latent": {"shape": LATENT, "mean": [0.0], "spread": [1.0]},
        "text_length": tokens,
        "fps": 24.0,
        "source": {},
    }
    manifest.write(folder, ClusterManifest, names, "benchmark", clips=count, cluster=0, **content)


def needed(tokens: int, width: int) -> float:
    """Samples per second that one H100 trains of the preset `large`."""
    made = Experiment.from_config({"network": {"preset": "large"}})
    sizes = {"channels": LATENT[-1], "pooled_width": 768, "dtype": "bfloat16", "cond_frames": False}
    config = functional.network_config(made.network, **sizes, text_width=width, prediction_type="velocity")
    print(f"preset large: {functional.count(config) / 1e9:.2f}B parameters")
    return MFU * H100 / flops.training_flops(config, LATENT, tokens)


def measure(folder: Path, batch: int, workers: int, batches: int) -> tuple[float, int, float]:
    """Records per second after a warm-up of two batches, bytes of a record, and CPU seconds of this process for one."""
    with_workers = {"workers": workers} if workers else {}
    iterator = training_batches(folder, batch, seed=0, **with_workers)
    for _ in range(2):
        first = next(iterator)
    size = sum(array.nbytes for array in first.values()) // batch
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(iterator)
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    if workers:
        iterator.close()
    return batch * batches / seconds, size, cpu / (batch * batches)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--workers", default="0,1,2,4")
    parser.add_argument("--text", default="512x4096")
    arguments = parser.parse_args()
    tokens, width = map(int, arguments.text.split("x"))
    asked = needed(tokens, width)
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), arguments.records, tokens, width)
        for workers in map(int, arguments.workers.split(",")):
            rate, size, cpu = measure(Path(place), arguments.batch, workers, arguments.batches)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            print(
                f"{workers} workers: {rate:.0f} records/s, {rate * size / 1e6:.0f} MB/s of {size / 1e6:.2f} MB; "
                f"{rate / asked:.2f} times the {asked:.1f} samples/s of one H100; {cpu * 1e3:.1f} ms of CPU a record "
                f"here; peak {peak:.1f} GiB here, "
                f"{children:.1f} GiB in a worker",
                flush=True,
            )
