# %% [markdown]
# # Train an expert for somebody else's ensemble
#
# You get one folder: the clips of one cluster, as latents. You train an expert on it where you are, and send back one
# folder: the exported network. Neither the other clusters, nor the other experts, nor the encoders are needed.

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
# ## What the owner sends
#
# `RUN/config.json` and `RUN/partition/clusters/K`. Name the folder that holds both (`config.json` and `K`) as
# `RECEIVED`. Empty, the next cells play the owner and make such a folder from the embedded shapes.

# %% tags=["parameters"]
# @title Settings
RECEIVED = ""  # @param {type: "string"}
CLUSTER = 1  # @param {type: "integer"}
FOLDER = "runs/mine"  # @param {type: "string"}
OWNER = "runs/owner"  # @param {type: "string"}
CLIPS = 2000  # @param {type: "integer"}
STEPS = 800  # @param {type: "integer"}
CHANGES = []  # @param {type: "raw"}

# %%
import shutil
from pathlib import Path

from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.clustering.build import cluster
from paris_jax.config.experiment import Experiment
from paris_jax.config.files import change, embedded, load
from paris_jax.data.preparation import prepare

received = Path(RECEIVED or "received")
if not RECEIVED:
    config, owner = load(f"{embedded()}:tiny"), RunFolder(OWNER)
    change(config, [f"data.num_clips={CLIPS}", f"training.steps={STEPS}", *CHANGES])
    prepare(Experiment.from_config(config), owner)
    cluster(Experiment.from_config(config), owner)
    shutil.copytree(owner.cluster(CLUSTER), received / str(CLUSTER), dirs_exist_ok=True)
    shutil.copy(owner.config, received / "config.json")
sorted(str(path.relative_to(received)) for path in received.rglob("*") if path.is_file())

# %% [markdown]
# ## Your run folder
#
# The cluster folder goes where the owner had it. The owner's config says which network to train and for how long. You
# may train another size, objective or optimizer ([heterogeneous experts](../docs/heterogeneous_experts.md)): change the
# config, and the owner assembles it all the same. Clusters, latents and text encoder must stay.

# %%
run, expert = RunFolder(FOLDER), Role("expert", CLUSTER)
shutil.copytree(received / str(CLUSTER), run.cluster(CLUSTER), dirs_exist_ok=True)
config = RunFolder(received).stored_config().config
experiment = Experiment.from_config(config)

# %% [markdown]
# What there is to learn from. The manifest says what was done to the clips, and the hashes of its files are compared
# before they are read.

# %%
from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import ClusterManifest

found = manifest.read(run.cluster(CLUSTER), ClusterManifest)
print(f"{found.clips} clips of cluster {CLUSTER}, latents {found.latent.shape}, {found.fps:g} frames a second")

# %% [markdown]
# ## Train
#
# Interrupt and run again as you like: training resumes exactly. On a machine of your own, the same as a command:
#
#     paris-jax train --workdir=runs/mine --role=expert --cluster=1

# %%
from paris_jax.notebooks.training import train_and_watch

train_and_watch(experiment, run, [expert])

# %% [markdown]
# ## Look at it
#
# An exported network is an ensemble of one. It draws its own cluster, whatever the prompt says.

# %%
from paris_jax import Ensemble
from paris_jax.local_jobs.quickstart import PROMPTS

alone = Ensemble.load(run.export(expert))
alone.sample(PROMPTS, num_inference_steps=experiment.sampling.num_inference_steps, seed=0)

# %% [markdown]
# ## Validate
#
# The checks that the owner runs before a network is admitted, in their order: schema, files, sizes, hashes, finite
# values, and a sample. A network that fails one raises an error that names it. What an owner may ask for beyond that, a
# signature and losses on held-out clips, are listed as not run.

# %%
from paris_jax.commands.validate import validate

checks = validate(str(run.export(expert)))
assert not any(check.outcome == "failed" for check in checks)

# %% [markdown]
# ## Send it
#
# One archive. It holds the weights and their manifest; no clip, no path and no name of your machine. The owner checks
# it once more and assembles:
#
#     paris-jax validate expert
#     paris-jax assemble --workdir=runs/owner --expert=1:expert

# %%
archive = Path(shutil.make_archive(f"expert-{CLUSTER}", "zip", run.export(expert)))
print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB")
