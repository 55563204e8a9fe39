"""Times whole draws, from prompts to videos, with one expert on its own as the yardstick.

    python -m tests.benchmarks.sampling [--ensemble=bundled:shapes] [--clips=1,8] [--steps=20] [--rounds=5]
        [--ways=top_k=1,top_k=2,...]

A way is any keywords of `Ensemble.sample`, `a=1:b=two`; `previews=5` shows every fifth step what is predicted so far.
Calls of all ways take turns; figures are the median seconds of a draw, the median over the turns of its share of the
single expert's, and what its first call took more, which is compiling.
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

YARDSTICK = "fixed_expert=0"
WAYS = (
    "top_k=1,top_k=1:progress=1,top_k=1:progress=1:previews=5,top_k=2,routing=full,"
    "fixed_expert=0:guidance_scale=3,top_k=1:guidance_scale=3,top_k=1:guidance_scale=3:expert_batch_size=1,top_k=1:solver=heun"
)


def keywords(way: str) -> dict[str, object]:
    """What a way asks of `Ensemble.sample`; whole numbers as such."""
    found: dict[str, object] = {"guidance_scale": 1.0}
    for name, value in setting(way).items():
        found[name] = int(value) if isinstance(value, float) and value.is_integer() and name != "guidance" else value
    if every := found.pop("previews", 0):
        found |= {"preview_every_steps": every, "on_preview": lambda step, videos: None}
    return found


def compare(ensemble: Ensemble, ways: list[str], clips: int, steps: int, rounds: int) -> None:
    rng = np.random.default_rng(21)
    prompts = [shapes.caption(shapes.draw_attributes(rng)) for _ in range(clips)]
    first, seconds = {}, {way: np.empty(rounds) for way in ways}
    for turn in range(-1, rounds):
        for way in ways:
            begun = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # bars are drawn, but not here
                ensemble.sample(prompts, seed=turn + 1, num_inference_steps=steps, **keywords(way))
            took = time.perf_counter() - begun
            if turn < 0:
                first[way] = took
            else:
                seconds[way][turn] = took
    print(f"{clips} clips, {steps} steps     seconds   of one expert   to compile", flush=True)
    for way, took in seconds.items():
        share, compiling = np.median(took / seconds[YARDSTICK]), max(0.0, first[way] - np.median(took))
        print(f"  {way:40s} {np.median(took):8.3f} {share:8.2f} {compiling:8.1f}", flush=True)


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", default="bundled:shapes")
    parser.add_argument("--clips", default="1,8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=WAYS)
    given = parser.parse_args()
    ensemble = Ensemble.load(given.ensemble)
    for clips in map(int, given.clips.split(",")):
        compare(ensemble, [YARDSTICK, *given.ways.split(",")], clips, given.steps, given.rounds)


if __name__ == "__main__":
    main()
