"""What a training job is told: the times it sees, and how it optimises."""

import dataclasses
from typing import Literal, get_args

from paris_jax.config import checks
from paris_jax.config.checks import Problems

PredictionType = Literal["velocity", "noise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """Times seen in training and walked through in sampling."""

    time_mean: float = 0.0  # t = sigmoid(normal(mean, std)), then shifted
    time_std: float = 1.0
    shift: float = 0.0  # t <- a t / (1 + (a - 1) t); 0: Open-Sora 2.0's rule from the size of the latent

    def problems(self) -> Problems:
        yield from checks.above(0, time_std=self.time_std)
        yield from checks.at_least(0, shift=self.shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """Which latent frames are given to the networks in training, as weights of each kind (`diffusion.masks`).

    As they stand, none ever are: text to video only. `none` beside others is what image guidance leads away from.
    """

    none: float = 1.0
    first: float = 0.0  # image to video
    last: float = 0.0
    both: float = 0.0
    prefix: float = 0.0  # from the first frame on, any number of them: video continuation

    def problems(self) -> Problems:
        yield from checks.at_least(0, **dataclasses.asdict(self))
        if not sum(self.weights):
            yield "every weight is 0; at least one must be above"

    @property
    def weights(self) -> tuple[float, ...]:
        """In the order of `masks.KINDS`."""
        return self.none, self.first, self.last, self.both, self.prefix

    @property
    def kinds(self) -> list[str]:
        """The kinds that give frames and occur."""
        return [name for name, weight in dataclasses.asdict(self).items() if weight and name != "none"]


# Fields of `Training` that do not decide what is learned, only how and where the work is done: a job that goes on may
# change them.
EXECUTION_FIELDS = ("accumulate", "fsdp", "tensor", "sequence", "log_every", "checkpoint_every", "keep", "keep_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One training job. `steps` is an expert's (or the router's); the monolith takes the sum over the experts."""

    steps: int = 1000
    batch: int = 32  # clips a step, over all devices of the job
    accumulate: int = 1  # parts of a batch that are worked on one after the other: less memory, the same update
    learning_rate: float = 1e-3
    warmup: int = 50  # steps, linear from 0
    optimizer: str = "adamw"  # "muon": more progress for more work a step; "adafactor": least memory
    decay: str = "cosine"  # after warm-up: "cosine" to 0, "constant", or "wsd": constant, then linear to 0 ...
    decay_share: float = 0.2  # ... over this last share of the steps
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0  # of matrices; norms and biases are never decayed
    clip_norm: float = 1.0
    ema: float = 0.999  # decay a step of the averaged parameters, which are the ones exported ...
    ema_width: float = 0.0  # ... or, above 0, their horizon as a share of the training so far (0.05 to 0.15 are usual)
    start: str = ""  # folder of weights to start from: `paris-jax import`, or another run's export; "": fresh ones
    objective: str = "velocity"  # flow matching; or "noise": DDPM's, on the cosine path (`diffusion.predictions`)
    times: str = "logit_normal"  # or "uniform", for the router: its weights matter equally at every time
    drop_tokens: float = 0.3162  # probability of training without the token sequence
    drop_pooled: float = 0.3162  # and, independently, without the pooled vector
    compute_dtype: str = "auto"  # "auto" (bfloat16 where the device has it), "float32", "bfloat16"
    fsdp: int = 1  # devices that share the batch and the parameters; what is left of the slice shares the batch only
    tensor: int = 1  # devices that share the heads and hidden features
    sequence: int = 1  # devices that share the tokens of each clip, for long videos
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2  # newest checkpoints kept
    keep_every: int = 0  # and all whose step is a multiple of this; 0: none
    seed: int = 0

    def problems(self) -> Problems:
        yield from checks.at_least(1, steps=self.steps, batch=self.batch, log_every=self.log_every)
        yield from checks.at_least(1, fsdp=self.fsdp, tensor=self.tensor, sequence=self.sequence)
        yield from checks.at_least(1, checkpoint_every=self.checkpoint_every, keep=self.keep)
        yield from checks.at_least(1, accumulate=self.accumulate)
        yield from checks.at_least(0, keep_every=self.keep_every, warmup=self.warmup, weight_decay=self.weight_decay)
        yield from checks.seed(seed=self.seed)
        yield from checks.above(0, learning_rate=self.learning_rate, eps=self.eps, clip_norm=self.clip_norm)
        yield from checks.choice("objective", self.objective, get_args(PredictionType))
        yield from checks.choice("times", self.times, ("logit_normal", "uniform"))
        yield from checks.choice("optimizer", self.optimizer, ("adamw", "muon", "adafactor"))
        yield from checks.choice("decay", self.decay, ("cosine", "constant", "wsd"))
        yield from checks.choice("compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        yield from checks.between(0.0, 1.0, drop_tokens=self.drop_tokens, drop_pooled=self.drop_pooled)
        yield from checks.between(0.0, 1.0, decay_share=self.decay_share)
        yield from checks.between(0.0, 0.25, ema_width=self.ema_width)
        for name in ("b1", "b2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)}: must be at least 0 and below 1"
        if self.warmup >= self.steps:
            yield f"warmup={self.warmup}: must be below steps={self.steps}"
