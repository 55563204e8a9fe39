"""Times sampling from prompts to videos, relative to a single expert.

    python -m tests.benchmarks.sampling [--ensemble=bundled:shapes] [--clips=1,8] [--steps=20] [--rounds=5]
        [--ways=top_k=1,top_k=2,...]

A way is a list of keywords of `Ensemble.sample`, such as `a=1:b=two`; `previews=5` previews every fifth step. Calls of
all ways take turns. Prints, for each way: the median seconds of a call, the median ratio to the single expert in the
same turn, and the extra seconds of the first call, which compiles.
"""

import argparse
import contextlib
import io
import time

import numpy as np

from paris_jax import Ensemble
from paris_jax.data.sources import shapes
from paris_jax.local_jobs.devices import keep_freed_memory
from tests.benchmarks.solvers import setting

BASELINE = "fixed_expert=0"
WAYS = (
    "top_k=1,top_k=1:progress=1,top_k=1:progress=1:previews=5,top_k=2,routing=full,"
    "fixed_expert=0:guidance_scale=3,top_k=1:guidance_scale=3,top_k=1:guidance_scale=3:expert_batch_size=1,top_k=1:solver=heun"
)


def keywords(way: str) -> dict[str, object]:
    """Converts a way to keywords of `Ensemble.sample`, with integers where the value is whole."""
    params: dict[str, object] = {"guidance_scale": 1.0}
    for name, value in setting(way).items():
        params[name] = int(value) if isinstance(value, float) and value.is_integer() and name != "guidance" else value
    if preview_every_steps := params.pop("previews", 0):
        params |= {"preview_every_steps": preview_every_steps, "on_preview": lambda step, videos: None}
    return params


def compare(ensemble: Ensemble, ways: list[str], clips: int, steps: int, rounds: int) -> None:
    rng = np.random.default_rng(21)
    prompts = [shapes.caption(shapes.draw_attributes(rng)) for _ in range(clips)]
    first, seconds = {}, {way: np.empty(rounds) for way in ways}
    for turn in range(-1, rounds):
        for way in ways:
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # discards the progress bars
                ensemble.sample(prompts, seed=turn + 1, num_inference_steps=steps, **keywords(way))
            elapsed = time.perf_counter() - start
            if turn < 0:
                first[way] = elapsed
            else:
                seconds[way][turn] = elapsed
    print(f"{clips} clips, {steps} steps     seconds   of one expert   to compile", flush=True)
    for way, elapsed in seconds.items():
        ratio, compiling = np.median(elapsed / seconds[BASELINE]), max(0.0, first[way] - np.median(elapsed))
        print(f"  {way:40s} {np.median(elapsed):8.3f} {ratio:8.2f} {compiling:8.1f}", flush=True)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", default="bundled:shapes")
    parser.add_argument("--clips", default="1,8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=WAYS)
    flags = parser.parse_args()
    ensemble = Ensemble.load(flags.ensemble)
    for clips in map(int, flags.clips.split(",")):
        compare(ensemble, [BASELINE, *flags.ways.split(",")], clips, flags.steps, flags.rounds)


if __name__ == "__main__":
    main()
