"""A job as compiled programs on a mesh: its first state and its step. What a job runs is what `plan` compiles."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from paris_jax.models import functional
from paris_jax.models.dit import video_tokens
from paris_jax.training import flops, sharding, starting
from paris_jax.training import state as states
from paris_jax.training.settings import Masks, Training
from paris_jax.training.state import TrainState
from paris_jax.training.step import TimeLaw, make_step


@dataclasses.dataclass(frozen=True)
class Job:
    """One network to train on one slice."""

    name: str  # for people: "expert 0"
    folder: epath.Path  # where checkpoints and metrics go
    config: functional.Config
    settings: Training
    steps: int
    time_law: TimeLaw
    latent_shape: tuple[int, int, int, int]  # (T, H, W, C) of one sample
    text_length: int  # tokens of the longest caption; shorter ones are padded
    masks: Masks = Masks()  # which frames are given
    null: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # no text, where it is not zeros

    @property
    def flops_per_sample(self) -> int:
        """Of a training step, without recomputation."""
        return flops.training_step(self.config, self.latent_shape, self.text_length)

    @property
    def padded_text_length(self) -> int:
        """`text_length`, or a few more tokens of padding where a split over `sequence` needs them."""
        return self.text_length + -self.text_length % self.settings.sequence


class Program:
    """A job's state and step on the mesh of `devices` (by default all that this job has)."""

    def __init__(self, job: Job, devices: list[Any] | None = None):
        self.job, self.mesh = job, sharding.make_mesh(job.settings, devices)
        sharding.check_network(job.config, self.mesh, video_tokens(job.latent_shape))
        make_state = functools.partial(states.create, job.config, job.settings, job.steps)
        shapes = jax.eval_shape(make_state, jax.random.key(0))
        specs = sharding.state_specs(shapes, self.mesh.shape)
        self.shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        self.state = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, self.shardings
        )
        self._make_state = jax.jit(make_state, out_shardings=self.shardings)
        # One fixed compilation: the state keeps its place from step to step, and its memory is used again.
        step = make_step(job.config, job.settings, job.steps, job.time_law, job.masks, job.null)
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, None))

    def first_state(self) -> TrainState:
        with jax.set_mesh(self.mesh):
            state = self._make_state(jax.random.key(self.job.settings.seed))
        return starting.load(self.job.settings.start, state) if self.job.settings.start else state

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and places of a batch, as `data.pipeline.training_batches` makes it."""
        job, B = self.job, self.job.settings.batch
        text_width = getattr(job.config, "text_width", 1)
        shapes = {
            "latent": ((B, *job.latent_shape), jnp.float32),
            "tokens": ((B, job.padded_text_length, text_width), jnp.float32),
            "length": ((B,), jnp.int32),
            "pooled": ((B, job.config.pooled_width), jnp.float32),
            "cluster": ((B,), jnp.int32),
            "index": ((B,), jnp.int32),
        }
        place = sharding.batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, (shape, dtype) in shapes.items()}

    def lower(self) -> Any:
        """The step, traced and lowered for the mesh's devices, which need not be here."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, self.batch())
