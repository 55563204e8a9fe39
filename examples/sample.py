"""Samples from an ensemble with parameters of one's own, and watches every step.

python examples/sample.py bundled:shapes sample.mp4
"""

import dataclasses
import sys

import numpy as np

from paris_jax import Ensemble

ensemble = Ensemble.load(sys.argv[1])
params = dataclasses.replace(ensemble.params, num_inference_steps=8, guidance_scale=3.0, solver="dpm++2m")


def watch(pipeline, step, timestep, latents):
    print(f"step {step}, t = {timestep:.2f}, predicted data has standard deviation {np.std(latents['x0']):.2f}")


samples = ensemble.sample(
    "a large green square moving down slowly on a white ground",
    params,
    top_k=2,  # overrides: any field of SamplingParams
    seed=7,
    callback_on_step_end=watch,
)
samples.save(sys.argv[2])
print(samples.bars())
