"""A config file: an experiment of a few minutes on the embedded shapes, with two variants.

paris-jax quickstart --config=examples/write_a_config.py --workdir=runs/mine
paris-jax train --config=examples/write_a_config.py:long --workdir=runs/long --role=expert --cluster=0 --print_config
"""

from ml_collections import ConfigDict

from paris_jax.config.experiment import default_config


def get_config(variant: str = "short") -> ConfigDict:
    """The config of a variant: "short" or "long". Fields that do not exist cannot be set."""
    config = default_config()
    config.name = f"mine-{variant}"
    config.data.update(num_clips=120, num_frames=8, height=20, width=20, heldout_fraction=0.1)
    config.clustering.num_clusters = 2
    config.diffusion.timestep_shift = 8.0
    steps = {"short": 20, "long": 2000}[variant]
    config.training.update(steps=steps, global_batch_size=8, warmup_steps=5, optimizer="muon", learning_rate=3e-3)
    config.router_training.update(steps=steps, global_batch_size=8, warmup_steps=5, timestep_sampler="uniform")
    config.sampling.update(num_inference_steps=30, guidance_scale=4.0, top_k=1)
    return config
