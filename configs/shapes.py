"""The embedded moving shapes, end to end: three worlds, three experts, a router, a monolith of the same compute.

get_config("tiny")     2 CPU cores, all roles and the evaluation in six to fifteen minutes. Expect the right colour,
    size and ground, and two thirds of the motions; shapes take longer to learn (figures: docs/benchmarks.md).
        ./launch/quickstart.sh
get_config("bundled")  2 CPU cores, about two hours: trained `bundled:shapes`. Expect the right object, colour and
    direction for most prompts (figures: docs/benchmarks.md).
        paris-jax quickstart --config=configs/shapes.py:bundled --workdir=runs/bundled
get_config("image")    2 CPU cores, about half an hour: experts for image-to-video and video continuation.
        paris-jax quickstart --config=configs/shapes.py:image --workdir=runs/image
get_config("small")    one accelerator, minutes: 40M parameters, 512 tokens a clip. By the FLOP formula, 5.3 TFLOP a
    step and 18,000 steps for experts and monolith: 5 minutes on one H200 at 35 % of its peak. Not measured yet.
        paris-jax quickstart --config=configs/shapes.py:small --workdir=runs/small
get_config("h200")     one H200, ten minutes for all roles: 40M parameters, 800 tokens a clip, batch 128. By the FLOP
    formula, 18 TFLOP a step and 10,200 steps for experts and monolith: 9 minutes at 35 % of peak. Not measured yet.
        paris-jax quickstart --config=configs/shapes.py:h200 --workdir=runs/h200
"""

from ml_collections import ConfigDict

from paris_jax.config.experiment import default_config
from paris_jax.errors import UserError, nearest


def get_config(arg: str = "tiny") -> ConfigDict:
    """Returns the variant `arg`: tiny, bundled, image, small or h200."""
    if arg not in VARIANTS:
        raise UserError(f"configs/shapes.py:{arg}: must be one of {', '.join(VARIANTS)}{nearest(arg, VARIANTS)}")
    config = default_config()
    config.name = f"shapes-{arg}"
    # 8 frames of 20 x 20 pixels are 4 x 5 x 5 = 100 tokens of 96 numbers.
    config.data.update(
        source="shapes", num_clips=4800, num_frames=8, height=20, width=20, fps=8.0, heldout_fraction=0.06
    )
    # Measured: the layout is decided at high noise, so a small training budget must be spent there.
    config.diffusion.update(timestep_shift=8.0, timestep_std=1.4)
    config.training.update(
        steps=1300, global_batch_size=8, optimizer="muon", learning_rate=3e-3, warmup_steps=50, ema_decay=0.998
    )
    config.training.update(log_every_steps=50, checkpoint_every_steps=650)
    config.router_training.update(
        steps=400,
        global_batch_size=16,
        learning_rate=2e-3,
        warmup_steps=50,
        ema_decay=0.99,
        timestep_sampler="shifted_uniform",
    )
    config.sampling.update(num_inference_steps=30, guidance_scale=4.0, routing="top_k", top_k=1)
    VARIANTS[arg](config)
    return config


def _tiny(config: ConfigDict) -> None:
    # Measured: a network that predicts the clean sample can be narrower than its tokens, 50 of 192 numbers, so that a
    # step takes a sixth of the time.
    config.data.update(num_clips=16000, heldout_fraction=0.2)  # 2,240 for the test: 1,024 prompts at most
    config.codec.time = 4
    config.network.update(hidden=48, heads=3)
    config.training.update(
        steps=4000, prediction_type="x0", ema_decay=0.999, log_every_steps=100, checkpoint_every_steps=2000
    )
    config.sampling.update(num_inference_steps=20, guidance_scale=2.0)
    config.evaluation.num_clips = 512


def _bundled(config: ConfigDict) -> None:
    config.data.num_clips = 24000
    config.training.update(
        steps=20000, learning_rate=2e-3, warmup_steps=300, ema_decay=0.9995, checkpoint_every_steps=1000
    )
    config.router_training.update(steps=2000, global_batch_size=32, ema_decay=0.998)
    config.sampling.guidance_scale = 3.0  # measured: with 2 and 4, videos follow the prompts a little less


def _image(config: ConfigDict) -> None:
    config.codec.time = 1  # one latent frame per conditioning frame: 8 x 5 x 5 = 200 tokens of 48 numbers
    config.data.cond_images = True
    config.masks.update(none=0.3, first=0.4, last=0.1, both=0.1, prefix=0.1)
    # Measured: with Open-Sora 2.0's guidance, the error of conditioning frames is half of that without oscillation.
    config.sampling.update(image_guidance_scale=3.0, guidance_oscillation="both", image_guidance_ramp=True)


def _accelerator(config: ConfigDict) -> None:
    """Settings of both accelerator variants: a network that fills one accelerator."""
    config.data.update(num_clips=30000, num_frames=16, fps=16.0, heldout_fraction=0.04)
    config.network.preset = "small"
    config.router.preset = "small"
    config.training.update(learning_rate=4e-4, warmup_steps=300, ema_decay=0.999)
    config.router_training.update(steps=1000, global_batch_size=64, learning_rate=5e-4)
    config.sampling.num_inference_steps = 50
    config.evaluation.update(num_clips=384, num_loss_clips=768)


def _small(config: ConfigDict) -> None:
    _accelerator(config)
    config.data.update(height=32, width=32)
    config.training.update(steps=3000, global_batch_size=64)


def _h200(config: ConfigDict) -> None:
    _accelerator(config)
    config.data.update(height=40, width=40)
    config.training.update(steps=1700, global_batch_size=128)


VARIANTS = {"tiny": _tiny, "bundled": _bundled, "image": _image, "small": _small, "h200": _h200}
