# %% [markdown]
# # Quickstart: train the whole system, cell by cell
#
# Clips of moving shapes are cut into three clusters. Three experts are trained, each on one cluster and without the
# others; a router learns which expert to ask; a monolith is trained on everything with the same compute, to compare
# with. Then both draw videos. Every cell resumes: interrupt it and run it again, and it goes on where it was.

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

# %% [markdown]
# ## Experiment
#
# The config is `configs/shapes.py:tiny`, which `./launch/quickstart.sh` trains with 16,000 clips for 4,000 steps an
# expert. A quarter of both is set here: enough to see the experts learn their worlds, not enough for the figures in
# docs/benchmarks.md. `CHANGES` sets any other field of the config, such as `"training.learning_rate=0.002"`.

# %% tags=["parameters"]
# @title Settings
FOLDER = "runs/notebook"  # @param {type: "string"}
CLIPS = 4000  # @param {type: "slider", min: 1000, max: 16000, step: 1000}
STEPS = 1000  # @param {type: "slider", min: 200, max: 4000, step: 200}
EVALUATE = False  # @param {type: "boolean"}
CHANGES = []  # @param {type: "raw"}

# %%
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.config.experiment import Experiment
from paris_jax.config.files import change, embedded, load

config = load(f"{embedded()}:tiny")
change(config, [f"data.num_clips={CLIPS}", f"training.steps={STEPS}", "evaluation.num_clips=256", *CHANGES])
experiment, run = Experiment.from_config(config), RunFolder(FOLDER)
experts = [Role("expert", k) for k in range(experiment.clustering.num_clusters)]
for role in (*experts, Role("router"), Role("monolith")):
    print(f"{role.name:<9} {experiment.steps(role.kind):>6} steps")

# %% [markdown]
# ## Prepare
#
# Clips become latents, text embeddings and features, once, so that training reads no encoder.

# %%
from paris_jax.data.preparation import prepare

prepare(experiment, run)

# %% [markdown]
# ## Cluster
#
# Some videos are held out first. k-means on the features cuts the others into clusters, one folder each. The page shows
# sizes, clips, the words that tell the clusters apart, and a map.

# %%
from paris_jax.clustering.build import cluster
from paris_jax.notebooks.show import page

cluster(experiment, run)
page(run.partition / "report.html")

# %% [markdown]
# ## Train the experts
#
# Each reads its own cluster folder and nothing else, so each could train on another continent. Here they take turns.

# %%
from paris_jax.notebooks.training import train_and_watch

train_and_watch(experiment, run, experts)

# %% [markdown]
# What the first expert draws on its own. It has seen one cluster only, whatever the prompt says.

# %%
from paris_jax import Ensemble
from paris_jax.local_jobs.quickstart import PROMPTS

sampling = {"num_inference_steps": experiment.sampling.num_inference_steps, "seed": 0}
alone = Ensemble.single(run.export(experts[0]), guidance_scale=experiment.sampling.guidance_scale)
alone.sample(PROMPTS, **sampling)

# %% [markdown]
# ## Train the router
#
# A classifier of clusters that sees the noisy latent, the time and the text.

# %%
train_and_watch(experiment, run, [Role("router")])

# %% [markdown]
# ## Train the monolith
#
# One network of an expert's size on all clusters, for as many steps as all experts together: the same compute.

# %%
train_and_watch(experiment, run, [Role("monolith")])

# %% [markdown]
# ## Assemble and compare
#
# Every file of every network is checked, then the ensemble is one folder to load. Ensemble and monolith start from the
# same noise.

# %%
from paris_jax.commands.assemble import assemble
from paris_jax.ensemble.samples import compare

assemble(experiment, run)
ensemble = Ensemble.load(run.ensemble)
monolith = Ensemble.single(run.export(Role("monolith")), guidance_scale=experiment.sampling.guidance_scale)
samples = ensemble.sample(PROMPTS, **sampling)
compare({"ensemble": samples, "monolith": monolith.sample(PROMPTS, **sampling)})

# %%
samples.plot_routing()

# %% [markdown]
# ## Evaluate
#
# With `EVALUATE`, both are compared on held-out clips: flow loss, Frechet distances, how well videos follow their
# prompts. The report says what can be concluded from so short a training. It takes some minutes.

# %%
from paris_jax.evaluation.protocol import evaluate

if EVALUATE:
    evaluate(experiment, run)
report = page(run.evaluation / "report.html") if EVALUATE else "not evaluated: set EVALUATE above"
report

# %% [markdown]
# ## Next
#
# - [sample.ipynb](sample.ipynb) samples this ensemble with KIND `local` and the folder `runs/notebook/ensemble`.
# - [clusters_and_routing.ipynb](clusters_and_routing.ipynb) looks at how clusters and router fit together.
# - [train_an_expert.ipynb](train_an_expert.ipynb) contributes one expert to the ensemble of somebody else.
