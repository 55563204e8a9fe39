"""The training step as a pure function, (state, batch) -> (state, metrics), and its compiled form on a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paris_jax.config.training import MaskSettings, TrainingSettings
from paris_jax.diffusion import losses, randomness
from paris_jax.encoders.codecs import UNIT_SCALE, LatentScale, Normaliser
from paris_jax.models import functional
from paris_jax.models.dit import video_tokens
from paris_jax.training import optimizer, sharding
from paris_jax.training import state as states
from paris_jax.training.job import Job
from paris_jax.training.losses import (
    MASK_KEY,
    TIME_BINS,
    Batch,
    PerSampleLosses,
    TimestepSampler,
    add_cond_frames,
    drop_text,
)
from paris_jax.training.state import TrainState, load_initial_weights

# Settings that a compiled step does not depend on.
NOT_COMPILED = (
    *("learning_rate", "seed", "init_from"),
    *("log_every_steps", "checkpoint_every_steps", "max_to_keep", "keep_period", "text_buckets"),
)


class StepInputs(NamedTuple):
    """Values of a job that its step takes as inputs: jobs that differ in nothing else share one compiled program."""

    learning_rate: Any  # peak, a scalar
    seed: Any  # a scalar
    normalise: Normaliser  # of the latents of a batch
    null: dict[str, Any]  # the null embedding where it is not zeros, for text dropout (`losses.drop_text`)

    @classmethod
    def of(
        cls,
        settings: TrainingSettings,
        scale: LatentScale = UNIT_SCALE,
        null: Mapping[str, np.ndarray] | None = None,
    ) -> "StepInputs":
        """The inputs, as NumPy arrays."""
        return cls(np.float32(settings.learning_rate), np.uint32(settings.seed), scale.normaliser, dict(null or {}))


def make_step(
    per_sample_losses: PerSampleLosses,
    config: functional.Config,
    settings: TrainingSettings,
    steps: int,
    timestep_sampler: TimestepSampler,
    masks: MaskSettings,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
    """Builds the training step of a network, not yet jitted.

    Args:
      per_sample_losses: `losses.expert_losses` or `losses.router_losses`.
      config: of the network.
      settings, steps: of the training.
      timestep_sampler: distribution of the timesteps.
      masks: distribution of the conditioning frames.

    Returns:
      (state, batch, inputs) -> (state, metrics); the inputs are by default those of the settings; metrics are
      scalars, and sums and counts by timestep bin.
    """
    # All updates are proportional to the learning rate, weight decay among them.
    relative = dataclasses.replace(settings, learning_rate=1.0)
    transform, schedule = optimizer.optimizer(relative, steps), optimizer.learning_rate(relative, steps)
    default_inputs = StepInputs.of(settings)

    def gradient(
        params: functional.Params, step: jax.Array, batch: Batch, inputs: StepInputs
    ) -> tuple[functional.Params, Any]:
        """Gradient of the mean loss, and each sample's loss and timestep."""
        keys = randomness.sample_keys(inputs.seed, step, batch["index"])
        noise_keys, time_keys, drop_keys = jnp.moveaxis(jax.vmap(lambda k: jax.random.split(k, 3))(keys), 1, 0)
        # The barrier keeps the values those of this line alone, whatever XLA fuses them with.
        batch = batch | {"latent": jax.lax.optimization_barrier(inputs.normalise(batch["latent"]))}
        x_0 = batch["latent"]
        noise, t_B = randomness.normal(noise_keys, x_0.shape[1:]), timestep_sampler.draw(time_keys)
        given = drop_text(batch, drop_keys, settings, inputs.null)
        if config.cond_frames:
            mask_keys = jax.vmap(lambda key: jax.random.fold_in(key, MASK_KEY))(keys)
            given = add_cond_frames(given, mask_keys, masks, inputs.normalise)

        def mean_loss(params: functional.Params) -> tuple[jax.Array, jax.Array]:
            losses_B = per_sample_losses(config, params, given, x_0, noise, t_B)
            return losses_B.mean(), losses_B

        grads, losses_B = jax.grad(mean_loss, has_aux=True)(params)
        return grads, (losses_B, t_B)

    def step(state: TrainState, batch: Batch, inputs: StepInputs = default_inputs) -> tuple[TrainState, dict[str, Any]]:
        if settings.grad_accum_steps == 1:
            grads, (losses_B, t_B) = gradient(state.params, state.step, batch, inputs)
        else:

            def add_gradient(total: functional.Params, microbatch: Batch) -> tuple[functional.Params, Any]:
                grads, per_sample = gradient(state.params, state.step, microbatch, inputs)
                return jax.tree.map(jnp.add, total, grads), per_sample

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            total, per_sample = jax.lax.scan(add_gradient, zeros, microbatches(batch, settings.grad_accum_steps))
            grads = jax.tree.map(lambda g: g / settings.grad_accum_steps, total)
            losses_B, t_B = (x.reshape(-1) for x in per_sample)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda update: inputs.learning_rate * update, updates)
        params: Any = optax.apply_updates(state.params, updates)
        decay = optimizer.ema_decay(settings, state.step)
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params)
        bin_sum, bin_count = losses.by_time_bin(losses_B, t_B, TIME_BINS)
        metrics = {
            "loss": losses_B.mean(),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
            "learning_rate": inputs.learning_rate * schedule(state.step),
            "bin_sum": bin_sum,
            "bin_count": bin_count,
        }
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return step


def microbatches(batch: Batch, parts: int) -> Batch:
    """A batch (B, ...) as (parts, B / parts, ...); every device keeps the samples it has."""
    return {name: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for name, x in batch.items()}


class Programs(NamedTuple):
    """The jitted functions of a job on a mesh, and the shardings of its state."""

    make_state: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, Any]]]
    abstract_state: Any


@functools.lru_cache(maxsize=32)
def _programs(
    per_sample_losses: PerSampleLosses,
    config: functional.Config,
    settings: TrainingSettings,
    steps: int,
    timestep_sampler: TimestepSampler,
    masks: MaskSettings,
    mesh: Mesh,
) -> Programs:
    """Cached, so that jobs of one process that differ in their `StepInputs` alone trace and compile once."""
    make_state = functools.partial(states.create, config, settings, steps)
    shapes = jax.eval_shape(make_state, jax.random.key(0))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), sharding.state_specs(shapes, mesh.shape))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    # It runs once: on a CPU, optimizing its code would take longer than running it.
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    options = quickly if mesh.devices.flat[0].platform == "cpu" else None
    # One compilation: the state keeps its sharding from step to step, and its memory is reused.
    step = make_step(per_sample_losses, config, settings, steps, timestep_sampler, masks)
    return Programs(
        jax.jit(make_state, out_shardings=shardings, compiler_options=options),
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        abstract,
    )


class ShardedStep:
    """A job's state and compiled step on a mesh of `devices`, by default all of this job."""

    def __init__(self, job: Job, devices: list[Any] | None = None):
        self.job, self.mesh = job, sharding.make_mesh(job.settings, devices)
        sharding.check_network(job.config, self.mesh, video_tokens(job.latent_shape))
        defaults = TrainingSettings()
        settings = dataclasses.replace(job.settings, **{name: getattr(defaults, name) for name in NOT_COMPILED})
        self._programs = _programs(
            job.losses, job.config, settings, job.steps, job.timestep_sampler, job.masks, self.mesh
        )
        self.state = self._programs.abstract_state

    @functools.cached_property
    def inputs(self) -> StepInputs:
        """The job's inputs, on every device of the mesh."""
        return sharding.replicate(StepInputs.of(self.job.settings, self.job.scale, self.job.null), self.mesh)

    def first_state(self) -> TrainState:
        """A fresh state on the mesh, with the initial weights of `init_from` where that is set."""
        with jax.set_mesh(self.mesh):
            state = self._programs.make_state(jax.random.key(self.job.settings.seed))
        return load_initial_weights(self.job.settings.init_from, state) if self.job.settings.init_from else state

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and shardings of a batch, as `data.loader.training_batches` makes it."""
        job, B = self.job, self.job.settings.global_batch_size
        text_width = getattr(job.config, "text_width", 1)
        shapes = {
            "latent": ((B, *job.latent_shape), jnp.float16),
            "tokens": ((B, job.padded_text_length, text_width), job.text_dtype),
            "length": ((B,), jnp.int32),
            "pooled": ((B, job.config.pooled_width), job.text_dtype),
            "cluster": ((B,), jnp.int32),
            "index": ((B,), jnp.int32),
            "cond_images": ((B, 2, *job.latent_shape[1:]), jnp.float16),
        }
        place = sharding.batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(*shapes[name], sharding=place) for name in job.fields}

    def argument_bytes(self) -> float:
        """Bytes of the state and a batch on each device."""
        return sharding.bytes_per_device((self.state, self.batch()))

    def step(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, Any]]:
        """One update of a state, whose memory is reused; compiles at the first call."""
        return self._programs.step(state, batch, self.inputs)

    def lower(self, state: Any = None, batch: Any = None) -> Any:
        """The step, lowered for the mesh's devices, which need not be attached; by default of abstract arrays."""
        inputs = StepInputs.of(self.job.settings, self.job.scale, self.job.null)
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), inputs)
        with jax.set_mesh(self.mesh):
            return self._programs.step.lower(state or self.state, batch or self.batch(), inputs)
