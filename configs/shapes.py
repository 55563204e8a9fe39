"""The embedded moving shapes, end to end: three worlds, three experts, a router, a monolith of the same compute.

get_config("tiny")     2 CPU cores, all roles and evaluation in under ten minutes
    ./launch/quickstart.sh
get_config("bundled")  2 CPU cores, about an hour: what `bundled:shapes` was made with
    python launch/local.py --config=configs/shapes.py:bundled --workdir=runs/bundled
"""

from ml_collections import ConfigDict

from paris_jax.experiment import default_config


def get_config(arg: str = "tiny") -> ConfigDict:
    """Returns the variant `arg`."""
    config = default_config()
    config.name = f"shapes-{arg}"
    # 8 frames of 20 x 20 pixels are 4 x 5 x 5 = 100 tokens of 96 numbers.
    config.data.update(source="shapes", num_clips=4800, frames=8, height=20, width=20, fps=8.0, heldout_fraction=0.06)
    config.network.preset = "tiny"
    config.router.preset = "tiny"
    # Found by measurement: what is where is decided in heavy noise, so that is where a small budget must be spent.
    config.diffusion.update(shift=4.0, time_std=1.2)
    config.training.update(steps=2000, batch=8, learning_rate=3e-3, warmup=100, ema=0.998, log_every=50)
    config.training.checkpoint_every = 1000
    config.router_training.update(steps=400, batch=32, learning_rate=2e-3, warmup=50, ema=0.99, times="uniform")
    config.sampling.update(steps=30, guidance=3.0, routing="top_k", top_k=1)
    VARIANTS[arg](config)
    return config


def _tiny(config: ConfigDict) -> None:
    del config


def _bundled(config: ConfigDict) -> None:
    config.data.num_clips = 12000
    config.training.update(steps=12000, learning_rate=2e-3, warmup=300, ema=0.9995, checkpoint_every=2000)
    config.router_training.update(steps=2000, ema=0.998)


VARIANTS = {"tiny": _tiny, "bundled": _bundled}
