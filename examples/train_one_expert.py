"""Trains one expert from Python: data, clusters, training, and its exported network.

python examples/train_one_expert.py runs/example
"""

import sys

from paris_jax.artifacts import exported
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.clustering.build import cluster
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.config.files import load
from paris_jax.data.preparation import prepare

experiment = Experiment.from_config(load("examples/write_a_config.py:short"))
run = RunFolder(sys.argv[1])

prepare(experiment, run)  # clips to latents, text embeddings, features
cluster(experiment, run)  # features to clusters
expert = Role("expert", 0)
train(experiment, run, expert)  # reads cluster 0 only; resumes where it was stopped

network = exported.read(run.export(expert))
print(f"{expert.name}: {network.manifest.parameters} parameters, trained {network.manifest.training.steps} steps")
