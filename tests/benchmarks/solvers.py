"""Quality against steps: every solver of the sampler on an ensemble of the shapes, from the same noise.

    python -m tests.benchmarks.solvers [--ensemble=bundled:shapes] [--clips=96] [--steps=5,10,20,40]
        [--guidance_scale=3]
        [--ways=guidance_method=projected,...] [--cond=int8,offload] [--finest=320]

For each solver and number of evaluations of the velocity: the distance of its latents to those of a far finer solution
(root mean square, in units of the data's spread; a stochastic solver has none), and the share of videos in which the
judge reads back every attribute that was asked for. The yardstick is every expert on its own, with 40 steps of Euler's
method, which `--ways` takes with other settings; `--kept` are other ways to keep the experts, with 20 steps, whose
distance is to the same 20 steps. What a draw costs is measured by `tests.benchmarks.sampling`.
"""

import argparse

import numpy as np

from paris_jax import Ensemble
from paris_jax.data.sources import shapes
from paris_jax.diffusion.solvers import EVALUATIONS
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.local_jobs.devices import keep_freed_memory


def setting(text: str) -> dict[str, object]:
    """a=1:b=two to keywords."""
    found: dict[str, object] = {}
    for each in text.split(":"):
        name, _, value = each.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = value
    return found


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", default="bundled:shapes")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--steps", default="5,10,20,40")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--ways", default="")
    parser.add_argument("--cond", default="")
    parser.add_argument("--finest", type=int, default=320)
    given = parser.parse_args()
    ensemble, judge, rng = Ensemble.load(given.ensemble), AttributeClassifier.load(), np.random.default_rng(21)
    asked = [shapes.draw_attributes(rng) for _ in range(given.clips)]
    prompts = [shapes.caption(attributes) for attributes in asked]
    noise = ensemble.noise(given.clips, seed=4)

    def draw(drawn_by=ensemble, **how):
        return drawn_by.sample(prompts, noise=noise, **({"guidance_scale": given.guidance} | how)).videos

    def agreement(videos):
        _, seen = judge.look(videos)
        return np.mean([all(s[name] == a[name] for name in a) for s, a in zip(seen, asked, strict=True)])

    def show(name, evaluations, videos, nearest=None):
        far = np.sqrt(np.mean(np.square(videos - (finest if nearest is None else nearest)))) / np.mean(
            ensemble.scale.spread
        )
        share = agreement(videos)
        error = np.sqrt(share * (1 - share) / given.clips)
        apart = f"{far:8.4f}" if name != "ancestral" else "       -"
        print(f"{name:34s} {evaluations:5d} {apart}   {share:6.1%} ± {error:.1%}", flush=True)

    finest = draw(solver="ab2", num_inference_steps=given.finest)
    print("solver                       evaluations distance   agreement")
    show("ab2", given.finest, finest)
    for cluster in ensemble.clusters:
        show(f"expert {cluster} on its own", 40, draw(num_inference_steps=40, fixed_expert=cluster))
    for steps in map(int, filter(None, given.steps.split(","))):
        for solver, each in EVALUATIONS.items():
            if steps % each == 0:
                show(solver, steps, draw(solver=solver, num_inference_steps=steps // each))
    for way in filter(None, given.ways.split(",")):
        show(way, 40, draw(num_inference_steps=40, **setting(way)))
    plain = draw(num_inference_steps=20) if given.kept else None
    for kept in filter(None, given.kept.split(",")):
        other = Ensemble.load(given.ensemble, **{"weights": kept} if kept == "int8" else {"offload": True})
        show(kept, 20, draw(other, num_inference_steps=20), nearest=plain)


if __name__ == "__main__":
    main()
