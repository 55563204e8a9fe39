"""Config sections of training: timesteps, conditioning frames, optimization, parallelism and checkpoints."""

import dataclasses
from typing import Literal

from paris_jax.config import fields
from paris_jax.config.checks import Problems
from paris_jax.config.fields import setting

PredictionType = Literal["velocity", "noise", "x0"]
TimestepSamplerName = Literal["logit_normal", "uniform", "shifted_uniform"]
OptimizerName = Literal["adamw", "muon", "adafactor"]
LrSchedule = Literal["cosine", "constant", "wsd"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """Timesteps of training, and their shift in training and sampling."""

    timestep_mean: float = setting(0.0, "mean of the normal in t = sigmoid(normal(mean, std)), before the shift")
    timestep_std: float = setting(1.0, "standard deviation of that normal", above=0)
    timestep_shift: float = setting(
        0.0, "a in t <- a t / (1 + (a - 1) t); 0: Open-Sora 2.0's rule from the size of the latent", at_least=0
    )

    def problems(self) -> Problems:
        yield from fields.problems_of(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Weights of the kinds of conditioning masks in training (`diffusion.cond_masks`).

    The defaults train text-to-video only. Image guidance needs `none` beside other kinds.
    """

    none: float = setting(1.0, "weight of no conditioning frame", at_least=0)
    first: float = setting(0.0, "weight of the first latent frame: image-to-video", at_least=0)
    last: float = setting(0.0, "weight of the last latent frame", at_least=0)
    both: float = setting(0.0, "weight of the first and the last latent frame", at_least=0)
    prefix: float = setting(0.0, "weight of a prefix of any length: video continuation", at_least=0)

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
        if not sum(self.weights):
            yield "every weight is 0; at least one must be above"

    @property
    def weights(self) -> tuple[float, ...]:
        """In the order of `cond_masks.MASK_KINDS`."""
        return self.none, self.first, self.last, self.both, self.prefix

    @property
    def kinds(self) -> list[str]:
        """The kinds with conditioning frames whose weight is above 0."""
        return [name for name, weight in dataclasses.asdict(self).items() if weight and name != "none"]

    @property
    def image_kinds(self) -> list[str]:
        """Those of `kinds` whose frames are images in sampling: the first frame, the last, or both."""
        return [name for name in self.kinds if name != "prefix"]


# Fields of `TrainingSettings` that change how and where weights are computed, but not the weights: a job may be
# resumed with other values.
EXECUTION_FIELDS = (
    *("grad_accum_steps", "fsdp", "tensor", "sequence", "text_buckets"),
    *("log_every_steps", "checkpoint_every_steps", "max_to_keep", "keep_period"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One training job. `steps` is an expert's (or the router's); the monolith takes the sum over the experts."""

    steps: int = setting(1000, "optimizer steps", at_least=1)
    global_batch_size: int = setting(32, "clips per step, over all devices of the job", at_least=1)
    grad_accum_steps: int = setting(
        1, "microbatches of a step, computed one after the other: less memory, the same update", at_least=1
    )
    learning_rate: float = setting(1e-3, "peak learning rate", above=0)
    warmup_steps: int = setting(50, "steps of linear warm-up from 0", at_least=0)
    optimizer: str = setting("adamw", "muon learns more per step, adafactor takes least memory", choices=OptimizerName)
    lr_schedule: str = setting("cosine", "after warm-up; wsd: constant, then linear to 0", choices=LrSchedule)
    lr_decay_fraction: float = setting(
        0.2, "wsd: fraction of the steps, at the end, with linear decay", at_least=0.0, at_most=1.0
    )
    b1: float = setting(0.9, "Adam's decay of the first moment", at_least=0, below=1)
    b2: float = setting(0.99, "Adam's decay of the second moment", at_least=0, below=1)
    eps: float = setting(1e-8, "Adam's epsilon", above=0)
    weight_decay: float = setting(0.0, "decoupled weight decay of matrices; norms and biases have none", at_least=0)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this global norm", above=0)
    ema_decay: float = setting(0.999, "decay per step of the averaged, exported parameters", at_least=0, below=1)
    ema_sigma_rel: float = setting(
        0.0,
        "above 0: power-function average of this relative width instead of ema_decay; 0.05 to 0.15 are usual",
        at_least=0.0,
        at_most=0.25,
    )
    init_from: str = setting(
        "", "initial weights: an export, a folder of `paris-jax import`, or bundled:shapes/monolith; empty: random"
    )
    prediction_type: str = setting(
        "velocity",
        "velocity: flow matching; noise: DDPM on the cosine path, timesteps uniform; x0: the clean sample",
        choices=PredictionType,
    )
    timestep_sampler: str = setting(
        "logit_normal",
        "distribution of training timesteps; shifted_uniform suits the router, which is asked at those of sampling",
        choices=TimestepSamplerName,
    )
    drop_tokens: float = setting(0.3162, "probability of dropping the text tokens", at_least=0.0, at_most=1.0)
    drop_pooled: float = setting(
        0.3162, "probability of dropping the pooled text, independently", at_least=0.0, at_most=1.0
    )
    compute_dtype: str = setting(
        "auto",
        "of activations and products; auto: bfloat16, float32 on CPUs and GPUs without it (T4)",
        choices=ComputeDtype,
    )
    fsdp: int = setting(1, "devices that share the batch and shard the parameters", at_least=1)
    tensor: int = setting(1, "devices that share heads and hidden features", at_least=1)
    sequence: int = setting(1, "devices that share the tokens of each clip", at_least=1)
    text_buckets: int = setting(
        1,
        "static lengths that a batch's texts are padded to, evenly spaced up to the longest; each is compiled once",
        at_least=1,
        at_most=16,
    )
    log_every_steps: int = setting(20, "steps per line of metrics", at_least=1)
    checkpoint_every_steps: int = setting(500, "steps between checkpoints", at_least=1)
    max_to_keep: int = setting(2, "newest checkpoints to keep", at_least=1)
    keep_period: int = setting(0, "checkpoints at multiples of this step are kept for ever; 0: none", at_least=0)
    seed: int = fields.seed()

    def problems(self) -> Problems:
        yield from fields.problems_of(self)
        if self.warmup_steps >= self.steps:
            yield f"warmup_steps={self.warmup_steps}: must be below steps={self.steps}"
