# %% [markdown]
# # Clusters and routing
#
# Two decisions make a decentralized system: how clips are cut into clusters, before anything is trained, and which
# expert is asked, at every step of sampling. This notebook looks at both: first k-means on the features of fresh clips,
# then the router of `bundled:shapes`.

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

# %%
from paris_jax.notebooks import runtime

runtime.start()

# %% tags=["parameters"]
# @title Settings
FOLDER = "runs/clusters"  # @param {type: "string"}
CLIPS = 3000  # @param {type: "slider", min: 500, max: 16000, step: 500}
NUM_CLUSTERS = 3  # @param {type: "slider", min: 2, max: 8, step: 1}
CANDIDATES = [2, 3, 4, 6]  # @param {type: "raw"}
STEPS = 20  # @param {type: "slider", min: 4, max: 50, step: 1}
SHOWN = 16  # @param {type: "integer"}

# %% [markdown]
# ## How many clusters
#
# Inertia falls with K in any data. The silhouette says whether clusters are apart, the stability whether other seeds
# find the same ones, and purity how well they match what is known of the clips. For clips of your own, set
# `data.source` and `data.path` as [docs/your_data.md](../docs/your_data.md) says.

# %%
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.clustering.choose_k import choose_k
from paris_jax.config.experiment import Experiment
from paris_jax.config.files import change, embedded, load
from paris_jax.data.preparation import prepare

config, run = load(f"{embedded()}:tiny"), RunFolder(FOLDER)
change(config, [f"data.num_clips={CLIPS}", f"clustering.num_clusters={NUM_CLUSTERS}"])
experiment = Experiment.from_config(config)
prepare(experiment, run)
compared = choose_k(experiment, run, CANDIDATES)

# %% [markdown]
# ## The clusters
#
# Clips nearest to each centroid, the words that distinguish their captions, and a map of the features.

# %%
from paris_jax.clustering.build import cluster
from paris_jax.notebooks.show import page

cluster(experiment, run)
page(run.partition / "report.html")

# %% [markdown]
# ## What the router sees
#
# New clips, which no network was trained on, are noised to a time t (1 is pure noise). Each row is a clip, each
# column a time, and the colour mixes those of the experts by their probability. With its caption, the router is sure
# even in pure noise, because captions name a world. Without it, the world has to appear in the noise first.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb

from paris_jax import Ensemble
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.ensemble.samples import COLOURS, compare
from paris_jax.notebooks.show import gallery

ensemble = Ensemble.load("bundled:shapes")
frames, height, width = ensemble.decode(ensemble.noise(1)).shape[1:4]
source = ShapesSource(seed=2026, num_clips=20 * SHOWN, frames=frames, height=height, width=width, fps=ensemble.fps)
by_world = {}
for clip in source:
    same = by_world.setdefault(clip.attributes["world"], [])
    if len(same) < SHOWN:
        same.append(clip)
clips = [clip for same in by_world.values() for clip in same]
first = [same[0] for same in by_world.values()]
gallery(np.stack([clip.video for clip in first]), [clip.caption for clip in first], ensemble.fps)

# %%
times = np.linspace(1, 0.8, 21)
data = ensemble.scale.normalise(ensemble.codec.encode(np.stack([clip.video for clip in clips])))
noise = ensemble.noise(len(clips), seed=0)
captions = ensemble.encode([clip.caption for clip in clips])
without = jax.tree.map(jnp.zeros_like, captions)  # the embedding of no text


def route(text):
    """p(expert), (times, clips, experts)."""
    noised = ((t, (1 - t) * data + t * noise) for t in times)
    return np.stack([ensemble.route(x, jnp.full(len(clips), t), text) for t, x in noised])


probability = {"with its caption": route(captions), "without text": route(without)}

# %%
colours = np.array([to_rgb(COLOURS[k % len(COLOURS)]) for k in ensemble.clusters])
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4), sharey=True, layout="constrained")
for axis, (name, p) in zip(axes, probability.items()):
    image = p.transpose(1, 0, 2) @ colours
    axis.imshow(image, aspect="auto", extent=(times[0], times[-1], len(clips), 0), interpolation="nearest")
    axis.set(title=name, xlabel="time t, noise to data")
axes[0].set_yticks([SHOWN * (n + 0.5) for n in range(len(by_world))], list(by_world))
patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
figure.legend(patches, [f"expert {k}" for k in ensemble.clusters], loc="outside lower center", ncols=8, frameon=False)
plt.close(figure)  # what a cell returns is shown
figure

# %% [markdown]
# ## What a routing rule costs
#
# The number of experts that a rule asks for a clip without text. `top_k` always costs the same; a threshold asks more
# of them only while the router is in doubt.

# %%
from paris_jax.ensemble.routing import Routing, weights

rules = {"top 1": Routing("top_k", 1), "threshold 0.9": Routing("threshold", p=0.9), "full": Routing("full")}
figure, axis = plt.subplots(figsize=(7.5, 3), layout="constrained")
for name, rule in rules.items():
    asked = [(weights(jnp.log(p + 1e-9), rule, 0) > 0).sum(-1).mean() for p in probability["without text"]]
    axis.step(times, asked, where="mid", label=name)
axis.set(xlabel="time t, noise to data", ylabel="experts asked", xlim=(times[0], times[-1]), ylim=(0, None))
axis.spines[["top", "right"]].set_visible(False)
axis.legend(frameon=False)
plt.close(figure)
figure

# %% [markdown]
# ## An expert is lost
#
# A job that never came back, say. The lost expert drops out of the softmax and the others take over: its world is gone,
# the other worlds are as before.

# %%
prompts = [clip.caption for clip in first]
sampling = {"num_inference_steps": STEPS, "seed": 0}
drawn = {"all experts": ensemble.sample(prompts, **sampling)}
for k in ensemble.clusters:
    drawn[f"without expert {k}"] = ensemble.sample(prompts, drop_experts=[k], **sampling)
compare(drawn)

# %% [markdown]
# ## Temperature
#
# `router_temperature` evens out the router's weights (above 1) or sharpens them (below). In doubt, `full` routing then
# mixes more experts, or fewer.

# %%
open_prompts = ["a large cyan fast on a ground", "a large red slowly on a ground"]
mixed = sampling | {"routing": "full", "guidance_scale": 2.0}
by_temperature = {
    f"temperature {t:g}": ensemble.sample(open_prompts, router_temperature=t, **mixed) for t in (0.3, 1, 3)
}
compare(by_temperature)

# %%
by_temperature["temperature 3"].plot_routing()
