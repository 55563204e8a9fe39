"""Quality against number of steps for every solver, on an ensemble of the shapes, from the same noise.

    python -m tests.benchmarks.solvers [--ensemble=bundled:shapes] [--clips=96] [--steps=5,10,20,40]
        [--guidance_scale=3]
        [--ways=guidance_method=projected,...] [--placement=int8,offload] [--finest=320]

Prints, for each solver and number of velocity evaluations, the distance of its latents to those of a much finer
solution (root mean square, in standard deviations of the data; none for a stochastic solver), and the share of videos
in which the attribute classifier reads every requested attribute. The baseline is each expert alone with 40 Euler
steps; `--ways` runs 40 steps with other settings. `--placement` stores the experts as int8 or offloads them, and
compares 20 steps with the same 20 steps. `tests.benchmarks.sampling` measures the time of sampling.
"""

import argparse

import numpy as np

from paris_jax import Ensemble
from paris_jax.data.sources import shapes
from paris_jax.diffusion.solvers import EVALUATIONS
from paris_jax.evaluation.metrics.attribute_classifier import AttributeClassifier
from paris_jax.local_jobs.devices import keep_freed_memory


def setting(text: str) -> dict[str, object]:
    """Parses keywords such as a=1:b=two."""
    params: dict[str, object] = {}
    for pair in text.split(":"):
        name, _, value = pair.partition("=")
        try:
            params[name] = float(value)
        except ValueError:
            params[name] = value
    return params


def main() -> None:
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ensemble", default="bundled:shapes")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--steps", default="5,10,20,40")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--ways", default="")
    parser.add_argument("--placement", default="")
    parser.add_argument("--finest", type=int, default=320)
    flags = parser.parse_args()
    ensemble, classifier, rng = Ensemble.load(flags.ensemble), AttributeClassifier.load(), np.random.default_rng(21)
    requested = [shapes.draw_attributes(rng) for _ in range(flags.clips)]
    prompts = [shapes.caption(attributes) for attributes in requested]
    noise = ensemble.noise(flags.clips, seed=4)

    def draw(model=ensemble, **params):
        return model.sample(prompts, noise=noise, **({"guidance_scale": flags.guidance_scale} | params)).videos

    def accuracy(videos):
        _, predicted = classifier.predict(videos)
        return np.mean([all(p[name] == r[name] for name in r) for p, r in zip(predicted, requested, strict=True)])

    def show(name, evaluations, videos, reference=None):
        distance = np.sqrt(np.mean(np.square(videos - (finest_latents if reference is None else reference)))) / np.mean(
            ensemble.scale.spread
        )
        share = accuracy(videos)
        error = np.sqrt(share * (1 - share) / flags.clips)
        distance_text = f"{distance:8.4f}" if name != "ancestral" else "       -"
        print(f"{name:34s} {evaluations:5d} {distance_text}   {share:6.1%} ± {error:.1%}", flush=True)

    finest_latents = draw(solver="ab2", num_inference_steps=flags.finest)
    print("solver                       evaluations distance    accuracy")
    show("ab2", flags.finest, finest_latents)
    for cluster in ensemble.clusters:
        show(f"expert {cluster} on its own", 40, draw(num_inference_steps=40, fixed_expert=cluster))
    for steps in map(int, filter(None, flags.steps.split(","))):
        for solver, evaluations_per_step in EVALUATIONS.items():
            if steps % evaluations_per_step == 0:
                show(solver, steps, draw(solver=solver, num_inference_steps=steps // evaluations_per_step))
    for way in filter(None, flags.ways.split(",")):
        show(way, 40, draw(num_inference_steps=40, **setting(way)))
    plain = draw(num_inference_steps=20) if flags.placement else None
    for placement in filter(None, flags.placement.split(",")):
        options = {"weights_dtype": "int8"} if placement == "int8" else {"offload": True}
        other = Ensemble.load(flags.ensemble, **options)
        show(placement, 20, draw(other, num_inference_steps=20), plain)


if __name__ == "__main__":
    main()
