# %% [markdown]
# # Sampling from an ensemble
#
# Experts were trained apart, each on one cluster of the clips, and never exchanged anything. A small router looks at
# the noisy video, the time and the prompt, and weighs the experts at every step. This notebook draws videos from them
# and looks at which expert did what.

# %% [markdown] tags=["open"]
# On Colab or Kaggle, upload this notebook and write the repository's address into the next cell.
# On Kaggle, switch the internet on.

# %% tags=["install"]
# @title Install { display-mode: "form" }
# Does nothing where paris_jax is installed, as on your own machine after: ./launch/install.sh notebooks
REPOSITORY = ""  # @param {type: "string"}

import importlib.util
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path("paris_jax_checkout").resolve()  # is cloned, unless it was uploaded
found = importlib.util.find_spec("paris_jax")
if found is None or found.origin is None:  # a folder of this name is not the package
    if not CHECKOUT.exists():
        if not REPOSITORY:
            raise SystemExit("Write the repository's address into REPOSITORY, or upload it as paris_jax_checkout")
        subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, CHECKOUT], check=True)
    print("Installing, which takes a minute or two")
    command = [sys.executable, CHECKOUT / "launch" / "install_notebook.py", *{m.split(".")[0] for m in sys.modules}]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    if done.returncode == 3:
        raise SystemExit("Restart the session (Colab: Runtime > Restart session; Kaggle: Run > Restart), run all again")
    if done.returncode:
        raise SystemExit("paris_jax could not be installed; see the lines above")
    importlib.invalidate_caches()

# %% [markdown]
# ## Runtime

# %%
from paris_jax.notebooks import runtime

runtime.start()

# %% [markdown]
# ## Ensemble
#
# | kind | name |
# |---|---|
# | bundled | `shapes`: moving shapes, patterned balls that circle, handwritten digits that drift |
# | local | a folder that `paris-jax assemble` or `paris-jax export` wrote: `runs/mine/ensemble` |
# | bucket | the same on Google Cloud: `gs://BUCKET/RUN/ensemble` |
# | hub | an exported folder on the Hugging Face hub: `OWNER/NAME` |
#
# Its files are checked before they are used, and nothing in them is executed. The clips and the prompts below are those
# of `bundled:shapes`; for another ensemble, write prompts of its own.

# %% tags=["parameters"]
# @title Settings
KIND = "bundled"  # @param ["bundled", "local", "bucket", "hub"]
NAME = "shapes"  # @param {type: "string"}
COMPUTE_DTYPE = ""  # @param ["", "float32", "bfloat16", "float16"]
STEPS = 30  # @param {type: "slider", min: 4, max: 100, step: 1}
GUIDANCE = 3.0  # @param {type: "slider", min: 1, max: 10, step: 0.5}
SEED = 0  # @param {type: "integer"}
PROMPT = ""  # @param {type: "string"}
OPEN_GUIDANCE = 2.0  # @param {type: "number"}

# %%
from paris_jax import Ensemble
from paris_jax.notebooks.sources import find_ensemble

source = find_ensemble(KIND, NAME)
ensemble = Ensemble.load(source, compute_dtype=COMPUTE_DTYPE)
print(f"experts {ensemble.clusters}, latent {ensemble.latent_shape}, {ensemble.fps:g} frames a second")

# %% [markdown]
# ## Videos
#
# One prompt for each of the three worlds, and one more (or your own, `PROMPT` above). The first call compiles the
# solver loop; later calls of the same shape start at once.

# %%
prompts = [
    "a large red circle moving right fast on a white ground",
    "a large blue striped ball circling clockwise fast on a sandy ground",
    "a large yellow digit three drifting up left slowly on a black ground",
    PROMPT or "a large green square moving down slowly on a white ground",
]
settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "seed": SEED}
samples = ensemble.sample(prompts, progress=True, **settings)
samples

# %% [markdown]
# ## Grid and contact sheet
#
# All videos in one, and frame by frame. `samples.videos` holds the arrays, (N, frames, height, width, 3) in [-1, 1].

# %%
from pathlib import Path

from IPython.display import Image

from paris_jax.notebooks.show import gallery

gallery(samples.grid()[None], ["all samples"], samples.fps)

# %%
folder = Path("samples")
Image(samples.save(folder / "contact_sheet.png").read_bytes())

# %% [markdown]
# ## Routing
#
# The share of each expert. The prompts above name their world so plainly that the router is sure from the first step.

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
open_settings = settings | {"guidance_scale": OPEN_GUIDANCE}
full = ensemble.sample(open_prompts, routing="full", **open_settings)
full.plot_routing()

# %% [markdown]
# ## One, two or all experts
#
# The same open prompts from the same noise. `top_k=1` costs one expert a step, whatever the number of experts. Where
# the router is sure all rules agree; where it is not, they part early and may end in different worlds.

# %%
import numpy as np

from paris_jax.ensemble.samples import compare

by_rule = {
    "top 1": ensemble.sample(open_prompts, top_k=1, **open_settings),
    "top 2": ensemble.sample(open_prompts, top_k=min(2, len(ensemble.clusters)), **open_settings),
    "full": full,
}
for name, drawn in by_rule.items():
    print(f"{name:<6} mean distance from full: {np.abs(drawn.videos - full.videos).mean() / 2:.2%} of the range")
compare(by_rule)

# %% [markdown]
# ## One expert at a time
#
# The first prompts again, each expert on its own, whatever the router says. Every expert knows only its own cluster:
# asked for anything else, it paints what it knows.

# %%
compare(ensemble.one_by_one(prompts, **settings))

# %% [markdown]
# `fixed_expert` takes a schedule too, one expert for each step: here the first expert lays out the scene in heavy
# noise, and the last one finishes it.

# %%
first, last = ensemble.clusters[0], ensemble.clusters[-1]
schedule = [first if step < STEPS // 2 else last for step in range(STEPS)]
ensemble.sample(prompts, fixed_expert=schedule, **settings)

# %% [markdown]
# ## Image to video
#
# An ensemble that was trained with conditioning frames (`config.masks`; `configs/shapes.py:image` trains one in half an
# hour on two cores) takes a picture as the first frame: `image=...`. `bundled:shapes` was not. For such ensembles, a
# callback holds the first latent frame instead: after each step it is set to the picture, noised to the time of the
# next step. The experts see it there and go on from it, as well as they can without having learned to.

# %%
from paris_jax.diffusion import timesteps

picture = samples[0].pixels()[0, 0]  # or any picture, (height, width, 3) uint8
caption = prompts[0].replace("right", "left")
frames = np.repeat(picture[None], samples.videos.shape[1], axis=0)
known = ensemble.scale.normalise(ensemble.codec.encode(frames[None]))
noise = ensemble.noise(1, SEED)
times = np.asarray(timesteps.timestep_schedule(STEPS, ensemble.timestep_shift or 1.0))


def hold(ensemble, step, timestep, latents):
    t = times[step + 1]
    held = (1 - t) * known[:, :1] + t * noise[:, :1]
    return {"latents": latents["latents"].at[:, :1].set(held)}


if ensemble.takes_frames:
    animated = ensemble.sample(caption, image=picture, **settings)
else:
    given = {"timesteps": times.tolist(), "noise": noise, "callback_on_step_end": hold}
    animated = ensemble.sample(caption, guidance_scale=GUIDANCE, seed=SEED, **given)
gallery(np.concatenate([frames[None], animated.pixels()]), ["the picture", caption], ensemble.fps)

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
noise = ensemble.noise(len(open_prompts), SEED)
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
# ## Download
#
# One file with the grid as .mp4 and .gif, the contact sheet, and `settings.json`: ensemble and hash, prompts, every
# sampling parameter, versions. `ensemble.sample(prompts, SamplingParams(**params))` draws the same videos again from
# the `prompts` and `params` of that file (`from paris_jax.config.sampling import SamplingParams`).

# %%
from paris_jax.notebooks.download import offer, pack

offer(pack(folder / "samples.zip", ensemble, source, samples, settings))
