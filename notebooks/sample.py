# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sampling from an ensemble
#
# Three experts were trained apart, each on one cluster of the clips, and never exchanged anything. A small router looks
# at the noisy video, the time and the prompt, and weighs the experts at every step. This notebook draws videos from
# them and looks at who did what. It works offline, and on a CPU.
#
# The ensemble that ships with the package knows moving shapes: flat ones on plain grounds, patterned ones that circle,
# and handwritten digits that drift.

# %%
import sys

if "google.colab" in sys.modules:  # anywhere else, what is installed is used
    import subprocess

    CHECKOUT = "/content/paris_jax"  # where the repository was uploaded or cloned to
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", CHECKOUT], check=True)

# %%
import os
from pathlib import Path

import numpy as np

from paris_jax import Ensemble
from paris_jax.ensemble.samples import compare

# A run of your own: export PARIS_JAX_ENSEMBLE=RUN/ensemble, or write its path here.
ensemble = Ensemble.load(os.environ.get("PARIS_JAX_ENSEMBLE", "bundled:shapes"))
steps = int(os.environ.get("PARIS_JAX_STEPS", 30))

print(f"experts {ensemble.clusters}, latent {ensemble.latent_shape}, {ensemble.fps:g} frames a second")

# %% [markdown]
# ## Videos
#
# One prompt for each of the three worlds, and one more. The first call compiles the whole solver loop; later calls of
# the same shape start at once.

# %%
prompts = [
    "a large red circle moving right fast on a white ground",
    "a large blue striped ball circling clockwise fast on a sandy ground",
    "a large yellow digit three drifting up left slowly on a black ground",
    "a large green square moving down slowly on a white ground",
]
samples = ensemble.sample(prompts, num_inference_steps=steps, seed=0, progress=True)
samples

# %% [markdown]
# ## Routing
#
# How much of each step came from which expert. The prompts above name their world so plainly that the router is sure
# from the first step on.

# %%
print(samples.bars())

# %% [markdown]
# A prompt that leaves the world open makes it wait until it sees something in the noise. With `routing="full"` the
# bands are the router's probabilities, step by step. (Less guidance, because such prompts were never trained on.)

# %%
open_prompts = [
    "a small purple on a ground",
    "a large cyan fast on a ground",
    "a large red slowly on a ground",
    "a large green on a ground",
]
full = ensemble.sample(open_prompts, num_inference_steps=steps, seed=0, guidance_scale=2.0, routing="full")
full.plot_routing()

# %% [markdown]
# ## One, two or all experts
#
# The same open prompts from the same noise. `top_k=1` costs one expert a step, whatever the number of experts. Where
# the router is sure all rules agree; where it is not, they part early and may end in different worlds.

# %%
noise = ensemble.noise(len(open_prompts), seed=0)
same = {"num_inference_steps": steps, "noise": noise, "guidance_scale": 2.0}
by_way = {
    "top 1": ensemble.sample(open_prompts, top_k=1, **same),
    "top 2": ensemble.sample(open_prompts, top_k=2, **same),
    "full": ensemble.sample(open_prompts, routing="full", **same),
}
for name, drawn in by_way.items():
    apart = np.abs(drawn.videos - by_way["full"].videos).mean() / 2
    print(f"{name:<6} mean distance from full: {apart:.2%} of the range")
compare(by_way)

# %% [markdown]
# ## One expert at a time
#
# The first prompts again, each expert on its own, whatever the router says. Every expert knows only its own cluster:
# asked for anything else, it paints what it knows.

# %%
compare(ensemble.one_by_one(prompts, num_inference_steps=steps, noise=noise))

# %% [markdown]
# `fixed_expert` takes a schedule too, one expert for each step: here the first expert lays out the scene in heavy
# noise, and the last one finishes it.

# %%
first, last = ensemble.clusters[0], ensemble.clusters[-1]
schedule = [first if step < steps // 2 else last for step in range(steps)]
ensemble.sample(prompts, num_inference_steps=steps, noise=noise, fixed_expert=schedule)

# %% [markdown]
# ## Where the experts disagree
#
# The open prompts again: what was drawn is noised to a time t, and each expert says what it sees. Bright is where they
# lie far apart, weighted by the router: at first on the ground, by which the worlds differ most, and nowhere once the
# router has made up its mind.

# %%
import matplotlib.pyplot as plt

drawn = ensemble.scale.normalise(ensemble.codec.encode(full.videos))  # as the networks see it
words = ensemble.encode(open_prompts)
seen_at = (0.99, 0.95, 0.9, 0.7)
figure, axes = plt.subplots(len(open_prompts), len(seen_at), figsize=(7, 7))
for column, t in enumerate(seen_at):
    x = (1 - t) * drawn + t * noise
    spread = ensemble.disagreement(x, np.full(len(x), t), words)
    for row, each in enumerate(np.asarray(spread.mean(1))):  # over the frames
        axes[row, column].imshow(each, vmin=0, vmax=1, cmap="magma")
        axes[row, column].set_axis_off()
    axes[0, column].set_title(f"t = {t}")
plt.close(figure)  # what a cell returns is shown
figure

# %% [markdown]
# ## Files
#
# All samples as one grid, or frame by frame as a contact sheet. `samples.videos` holds the arrays,
# (N, frames, height, width, 3) in [-1, 1].

# %%
folder = Path("samples")
for ending in ("mp4", "gif", "png"):
    print("wrote", samples.save(folder / f"notebook.{ending}"))
