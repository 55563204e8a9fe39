"""`Ensemble`: the sampling pipeline.

ensemble = Ensemble.load("RUN/ensemble")            # or "bundled:shapes"
samples = ensemble.sample("a small red circle moving left slowly on a white ground", num_inference_steps=30, seed=0)
samples.save("out.mp4")
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from etils import epath

from paris_jax.artifacts import ensemble_manifest
from paris_jax.config.sampling import SamplingParams, SamplingSettings
from paris_jax.diffusion import cond_masks, path, randomness, solvers
from paris_jax.encoders import codecs, text
from paris_jax.encoders.published import EncoderStore
from paris_jax.ensemble import device_placement, sampling_params, sparse_velocity
from paris_jax.ensemble.conditioning import CondFrames, Condition, EncodedText, PromptEncoder
from paris_jax.ensemble.device_placement import PlacedEnsemble, PlacementOptions
from paris_jax.ensemble.progress import Interrupted, Watcher
from paris_jax.ensemble.routing import Routing, router_logits
from paris_jax.ensemble.samples import Samples
from paris_jax.errors import UserError
from paris_jax.models.dit import PATCH

logger = logging.getLogger(__name__)

# (pipeline, step, timestep, {"latents", "x0", "routing"}) -> None, or {"latents": new ones}
StepCallback = Callable[["Ensemble", int, float, dict[str, Any]], dict[str, Any] | None]


class Ensemble:
    """Experts and their router, ready to sample."""

    def __init__(
        self,
        exported: ensemble_manifest.ExportedEnsemble,
        options: PlacementOptions | None = None,
        encoders: Mapping[str, str] | None = None,
        drop_encoders: bool = False,
        store: EncoderStore | None = None,
    ):
        shared = exported.shared
        self.clusters = sorted(exported.experts)
        sampling_params.check_encoders(encoders)
        store = store or EncoderStore()
        self.codec = codecs.from_description(shared.codec, (encoders or {}).get("vae", ""), store)
        self.text = text.from_description(shared.text, encoders, store)
        self.latent_shape: tuple[int, int, int, int] = shared.latent.shape
        sampling_params.check_encoder_sizes(self.codec, self.text, shared)
        self.fps = shared.fps
        self.timestep_shift = shared.timestep_shift
        self.params = SamplingParams(**dataclasses.asdict(exported.sampling))
        self.scale = codecs.LatentScale.from_manifest(shared.latent)
        self._placed = PlacedEnsemble(exported, self.clusters, options or PlacementOptions())
        self._prompts = PromptEncoder(self.text, shared.text_length, drop_encoders)
        if not drop_encoders:
            _ = self._placed.params

    @property
    def size(self) -> dict[str, int]:
        """num_frames, height and width of the videos that were trained on."""
        return sampling_params.video_size(self.latent_shape, self.codec)

    @property
    def takes_images(self) -> bool:
        """Whether every expert takes conditioning frames."""
        return all(network.cond_frames for network in self._placed.networks)

    @classmethod
    def load(
        cls,
        path: epath.PathLike,
        mesh: Mapping[str, int] | None = None,
        weights_dtype: str = "auto",
        offload: bool = False,
        encoders: Mapping[str, str] | None = None,
        drop_encoders: bool = False,
        store: EncoderStore | None = None,
        compute_dtype: str = "",
    ) -> "Ensemble":
        """Loads an ensemble folder (RUN/ensemble, local or gs://), or one that ships: "bundled:shapes".

        Args:
          mesh: spreads it over several devices, as {"expert": 3, "fsdp": 2}: see `ensemble/device_placement.py`.
          weights_dtype: "auto" keeps the experts in the dtype of the computation, "int8" the matrices of their blocks
            as 8-bit integers.
          offload: keeps the experts' blocks in host memory and fetches them layer by layer.
          encoders: folders of published encoders, {"vae": ..., "t5": ..., "clip": ...}, where it was trained with them;
            by default those that PARIS_JAX_VAE, PARIS_JAX_T5 and PARIS_JAX_CLIP name.
          drop_encoders: frees published text encoders as soon as prompts are encoded, before the experts are placed on
            the device, which then holds one or the other. Encoded prompts are cached: `encode` all of them first.
          store: published encoders to share with other ensembles; by default this ensemble has its own.
          compute_dtype: "float32", "bfloat16" or "float16", of activations and matrix products; by default that of
            training. Flash attention on GPUs takes 16-bit floats only; a T4 has no bfloat16.
        """
        options = device_placement.placement_options(mesh, weights_dtype, offload, compute_dtype)
        return cls(ensemble_manifest.read(path), options, encoders, drop_encoders, store)

    @classmethod
    def single(
        cls,
        network: epath.PathLike,
        encoders: Mapping[str, str] | None = None,
        drop_encoders: bool = False,
        store: EncoderStore | None = None,
        **sampling: Any,
    ) -> "Ensemble":
        """Loads one exported network on its own, such as the monolith's; `sampling` are its sampling settings."""
        return cls(
            ensemble_manifest.read_single(network, SamplingSettings(**sampling)), None, encoders, drop_encoders, store
        )

    @property
    def takes_frames(self) -> bool:
        """Whether every expert was trained with conditioning frames: image-to-video and video continuation."""
        return all(network.cond_frames for network in self._placed.networks)

    def encode(self, prompts: Sequence[str]) -> EncodedText:
        """Encodes prompts, padded to the longest training caption (longer ones to the encoder's maximum).

        So there are two lengths, and new prompts do not recompile.

        Raises:
          UserError: an empty prompt, or one with more tokens than the text encoder takes.
        """
        return self._prompts([prompts] if isinstance(prompts, str) else prompts)

    def noise(
        self,
        count: int,
        seed: int | Sequence[int] = 0,
        *,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> jax.Array:
        """Initial noise (count, T, H, W, C) for videos of this size; sample i's depends on the seed and i alone.

        A list gives each sample its own seed (0 to 2^64 - 1); its noise is then that of a batch of one.
        """
        size = SamplingParams(num_frames=num_frames, height=height, width=width)
        shape = sampling_params.latent_shape(self.latent_shape, self.codec, size)
        return randomness.normal(sampling_params.sample_keys(seed, count), shape)

    def sample(
        self,
        prompt: Sequence[str] | str,
        params: SamplingParams | None = None,
        *,
        cond: jax.Array | None = None,
        noise: jax.Array | None = None,
        progress: bool = False,
        on_preview: Callable[[int, np.ndarray], None] | None = None,
        callback_on_step_end: StepCallback | None = None,
        **overrides: Any,
    ) -> Samples:
        """Samples one video per prompt.

        Args:
          prompt: one prompt, or several.
          params: sampling parameters; by default the ensemble's own, `self.params`.
          cond: the networks' conditioning input itself (N, T, H, W, 1 + C), instead of images or a video; its frames
            are decoded as they are sampled.
          noise: the initial noise itself, (N, T, H, W, C); the seed is then for the noise of a stochastic solver.
          progress: show a progress bar.
          on_preview: called every `preview_every_steps` steps as `on_preview(steps done, videos)`, with the videos
            (N, T, H, W, 3) as predicted so far.
          callback_on_step_end: called after every step as `callback(ensemble, step, timestep, tensors)`, with latents
            and x0 predicted so far (N, T, H, W, C) and the step's routing weights (N, experts) as {"latents", "x0",
            "routing"}; may return {"latents": ...} to replace them.
          **overrides: any field of `SamplingParams` (docs/config.md lists them), among them num_inference_steps,
            guidance_scale, negative_prompt, seed, height, width, num_frames, top_k, fixed_expert, solver, image.

        Returns:
          The videos (N, T, H, W, 3) float32 in [-1, 1] with the routing weights (S, N, experts), as an object that
          saves and shows them.

        Raises:
          TypeError: an unknown parameter, with the nearest known one.
          UserError: a value that this ensemble cannot sample with.
          Interrupted: Ctrl-C, where a bar or a callback is shown; `samples` holds the videos as predicted by then.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("There is no prompt; give at least one")
        resolved = sampling_params.resolve(self.params, params, overrides)
        frames = CondFrames(resolved.image, resolved.last_image, resolved.video, resolved.num_cond_frames, resolved.fit)
        frames.check(cond is not None)
        sampling_params.check_previews(resolved, on_preview is not None)
        explicit_steps = overrides.get("num_inference_steps") is not None
        start = self._initial_noise(noise, resolved, len(prompts))
        timesteps = sampling_params.resolve_timesteps(resolved, explicit_steps, self.timestep_shift, start.shape[1:])
        steps = len(timesteps) - 1
        if unknown := self.describe_unknown_words(prompts):
            logger.warning("%s", unknown)
        negative = resolved.negative_prompt
        self._prompts.prefetch([*prompts, *([negative] if isinstance(negative, str) else negative or [])])
        encoded = self.encode(prompts)
        keys = jax.random.key_data(sampling_params.sample_keys(resolved.seed, len(prompts)))
        if cond is not None:
            sampling_params.check_cond(cond, start.shape)
        if frames:
            cond = frames.encode(self.codec, self.scale, start.shape[1:], len(prompts), self.fps)
        strict = params is not None or overrides.get("top_k") is not None
        watcher = self._watcher(progress, resolved.preview_every_steps, on_preview, callback_on_step_end, timesteps)

        def draw(params: SamplingParams, dropped: list[int]) -> solvers.State:
            config, condition, fixed_expert = self._prepare(params, encoded, dropped, steps, cond, strict)
            return self._placed.draw(config, start, (keys, timesteps, condition, fixed_expert), watcher)

        z, trace, stopped = self._draw_finite(draw, resolved)
        if frames:  # as Open-Sora 2.0: images and videos are decoded as they were given
            z = cond_masks.write_back(z, np.asarray(cond))

        def decoded(done: int) -> Samples:
            return Samples(self.decode(z), prompts, self.fps, np.asarray(trace.weight[:done]), self.clusters)

        if stopped:
            stopped.samples = decoded(stopped.done) if stopped.done else None
            raise stopped
        return decoded(steps)

    def _initial_noise(self, noise: jax.Array | None, params: SamplingParams, count: int) -> jax.Array:
        if noise is None:
            size = {"num_frames": params.num_frames, "height": params.height, "width": params.width}
            return self.noise(count, params.seed, **size)
        start = jnp.asarray(noise, jnp.float32)
        self.check_latent(start, count)
        return start

    def _watcher(
        self, bar: bool, every: int, on_preview: Any, on_step_end: StepCallback | None, timesteps: jax.Array
    ) -> Watcher:
        """The callbacks of a caller as functions of the solver state."""

        def preview(step: int, data: np.ndarray) -> None:
            on_preview(step, self.decode(data))

        def step_end(done: int, state: solvers.State) -> Any:
            assert on_step_end
            routing = sparse_velocity.trace_of(state).weight[done - 1]
            tensors = {"latents": state.x, "x0": state.data, "routing": routing}
            result = on_step_end(self, done - 1, float(timesteps[done - 1]), tensors) or {}
            replaced = result.get("latents")
            return None if replaced is None or replaced is state.x else jax.device_put(replaced, state.x.sharding)

        return Watcher(bar, every, preview if on_preview else None, step_end if on_step_end else None)

    def describe_unknown_words(self, prompts: Sequence[str]) -> str:
        """A sentence on words of prompts that the text encoder does not know; "" if it knows all."""
        unknown = {word: hint for prompt in prompts for word, hint in self.text.unknown_words(prompt).items()}
        words = ", ".join(f"{word!r}{hint}" for word, hint in sorted(unknown.items()))
        return f"the text encoder does not know {words}; such words were not in the training captions" if words else ""

    def _draw_finite(
        self, draw: Callable[..., solvers.State], params: SamplingParams
    ) -> tuple[np.ndarray, sparse_velocity.Trace, Interrupted | None]:
        """Latents of experts that all predicted finite values, and the trace of their steps.

        Args:
          draw: samples with parameters, without the dropped clusters.

        Returns:
          Both up to the step of an interrupt, and the interrupt; None after the last step.
        """
        dropped = sampling_params.dropped_clusters(params.drop_experts)
        routed = params.fixed_expert is None
        while True:
            try:
                stopped, state = None, draw(params, dropped)
            except Interrupted as stop:
                stopped, state = stop, stop.samples
            z = state.data if stopped and stopped.done < stopped.steps else state.x
            z, trace = jax.tree.map(np.asarray, (z, sparse_velocity.trace_of(state)))
            failed = sampling_params.first_nonfinite(trace.nonfinite, self.clusters)
            if not failed:
                break
            dropped = [*dropped, *failed[1]]
            left = len(self.clusters) - len(set(dropped))
            described = sampling_params.describe_nonfinite(*failed)
            if stopped or not routed or params.on_nonfinite == "error" or not left:
                advice = f"leave out with drop_experts={dropped}, or " if left and routed else ""
                raise UserError(f"{described}; {advice}lower guidance_scale") from stopped
            logger.warning("%s; dropped", described)
            params = dataclasses.replace(params, top_k=min(params.top_k, left))
        if not np.isfinite(trace.weight[0]).all():  # of noise, which is finite
            raise UserError("The router's weights are not finite; give fixed_expert=K, or train it again")
        if not np.isfinite(z).all() or not np.isfinite(trace.weight).all():
            raise UserError(
                "The sampled video is not finite, though every expert's prediction is; lower guidance_scale"
            )
        return z, trace, stopped

    def velocity(
        self,
        x: jax.Array,
        t: jax.Array,
        encoded: EncodedText,
        *,
        cond: jax.Array | None = None,
        **overrides: Any,
    ) -> jax.Array:
        """The merged velocity at x (N, T, H, W, C) and timesteps t (N,) for `encode`d prompts.

        `cond` (N, T, H, W, 1 + C) is the conditioning input (`cond_masks.cond_input`). The overrides are those of
        `sample`; guidance is off unless it is given.

        Raises:
          UserError: an expert predicts non-finite values for a finite x; it is named.
        """
        overrides = {"guidance_scale": 1.0, "image_guidance_scale": 1.0} | overrides
        params = sampling_params.resolve(self.params, None, overrides)
        dropped = sampling_params.dropped_clusters(params.drop_experts)
        strict = overrides.get("top_k") is not None
        config, condition, fixed_expert = self._prepare(params, encoded, dropped, 1, cond, strict)
        v, trace = self._placed.run(sparse_velocity.ensemble_velocity, config, x, t, condition, fixed_expert[0])
        traced = isinstance(v, jax.core.Tracer)  # inside a caller's jit, values are unknown
        if not traced and (failed := sampling_params.first_nonfinite(np.asarray(trace.nonfinite)[None], self.clusters)):
            advice = f"leave out with drop_experts={failed[1]}" if params.fixed_expert is None else "use others"
            raise UserError(f"{sampling_params.describe_nonfinite(None, failed[1])}; {advice}")
        return v

    def route(self, x: jax.Array, t: jax.Array, encoded: EncodedText, cond: jax.Array | None = None) -> jax.Array:
        """p(cluster | x_t, t, text, conditioning frames) over the experts that are present, (N, experts)."""
        placed = self._placed
        config = sparse_velocity.SamplerConfig(placed.networks, placed.slots, placed.router, Routing("full"))
        return jax.nn.softmax(placed.run(_routing_logits, config, x, t, encoded.pooled, cond))

    def disagreement(
        self,
        x: jax.Array,
        t: jax.Array,
        encoded: EncodedText,
        *,
        cond: jax.Array | None = None,
        drop_experts: int | Sequence[int] = (),
        **overrides: Any,
    ) -> jax.Array:
        """Standard deviation over the experts' predictions of x0, at every latent position, (N, T, H, W) float32.

        Weighted by the router, at x (N, T, H, W, C) and timesteps t (N,), as a root mean square over the channels: in
        units of the data's standard deviation, 0 where all experts agree.
        """
        dropped = sampling_params.dropped_clusters(drop_experts)
        used = np.flatnonzero(sampling_params.present_experts(self.clusters, dropped))
        weight_NE = self.route(x, t, encoded, cond)[:, used]
        weight_NE = weight_NE / weight_NE.sum(-1, keepdims=True)
        v = [self.velocity(x, t, encoded, cond=cond, fixed_expert=self.clusters[e], **overrides) for e in used]
        each = jnp.stack([path.data_from_velocity(x, of_expert, t) for of_expert in v])
        mean = jnp.einsum("ne,enthwc->nthwc", weight_NE, each)
        return jnp.sqrt(jnp.einsum("ne,enthwc->nthw", weight_NE, jnp.square(each - mean)) / x.shape[-1])

    def one_by_one(self, prompt: Sequence[str] | str, **overrides: Any) -> dict[str, Samples]:
        """Samples of each expert on its own, regardless of the router, from the same noise; for `samples.compare`."""
        return {f"expert {k}": self.sample(prompt, fixed_expert=k, **overrides) for k in self.clusters}

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Latents (..., T, H, W, C) in units of the training spread to videos (..., T', H', W', 3) in [-1, 1]."""
        return np.clip(self.codec.decode(self.scale.denormalise(latent)), -1.0, 1.0)

    def check_latent(self, x: jax.Array, count: int) -> None:
        """Refuses initial noise of another shape than the latents of `count` videos."""
        C = self.latent_shape[-1]
        if x.ndim != 5 or x.shape[0] != count or x.shape[-1] != C or x.shape[2] % PATCH or x.shape[3] % PATCH:
            expected = (count, *self.latent_shape)
            raise UserError(f"noise has shape {x.shape}; {count} prompts of this ensemble need {expected}")
        if not np.isfinite(x).all():
            raise UserError("noise holds values that are not finite")

    def _prepare(
        self,
        params: SamplingParams,
        encoded: EncodedText,
        dropped: list[int],
        steps: int,
        cond: jax.Array | None,
        strict: bool,
    ) -> tuple[sparse_velocity.SamplerConfig, Condition, jax.Array]:
        """The sampler's static config, its condition, and the fixed expert of each step; `strict`: see `routing`."""
        present = sampling_params.present_experts(self.clusters, dropped)
        image_guidance = cond is not None and params.image_guidance_scale != 1.0
        guided = params.guidance_scale != 1.0
        config = sparse_velocity.SamplerConfig(
            networks=self._placed.networks,
            slots=self._placed.slots,
            router=self._placed.router,
            routing=sampling_params.routing(params, strict, int(present.sum())),
            solver=params.solver,
            guidance=params.guidance_method if guided else "classifier_free" if image_guidance else "",
            image_guidance=image_guidance,
            router_conditioning=params.router_conditioning,
            expert_batch_size=params.expert_batch_size,
        )
        if cond is not None:
            self._check_takes_frames(present)
        fixed_expert = sampling_params.expert_schedule(params.fixed_expert, steps, self.clusters, present)
        return config, self._condition(encoded, params, present, cond), fixed_expert

    def _check_takes_frames(self, present: np.ndarray) -> None:
        """Refuses conditioning frames where a selected expert has no input for them."""
        slots = zip(self.clusters, self._placed.slots, present, strict=True)
        without = [str(k) for k, (kind, _), used in slots if used and not self._placed.networks[kind].cond_frames]
        if without:
            who = f"Expert{'s' * (len(without) > 1)} {', '.join(without)}"
            raise UserError(
                f"{who} cannot take conditioning frames; train with config.masks, as configs/shapes.py:image does"
            )

    def _condition(
        self, encoded: EncodedText, params: SamplingParams, present: np.ndarray, cond: jax.Array | None
    ) -> Condition:
        """The condition of a batch: prompts, negative prompts (or the null embedding), frames, guidance."""
        null, count = self._prompts.null(encoded), len(encoded.length)
        negative = null
        if params.negative_prompt is not None:
            if params.guidance_scale == 1.0:
                raise UserError("negative_prompt needs guidance, and guidance_scale=1 disables it; raise it")
            given = params.negative_prompt
            given = [given] * count if isinstance(given, str) else list(given)
            if len(given) != count:
                raise UserError(
                    f"negative_prompt names {len(given)} for {count} prompts; give one for all, or one for each"
                )
            negative = self.encode(given)
            longest = max(encoded.tokens.shape[1], negative.tokens.shape[1])
            encoded, negative = encoded.pad_to(longest), negative.pad_to(longest)
        strength, temperature = sampling_params.strength(params), jnp.float32(params.router_temperature)
        return Condition(encoded, negative, strength, cond, temperature, jnp.asarray(present), null.pooled)


@functools.partial(jax.jit, static_argnames=("config",))
def _routing_logits(
    config: sparse_velocity.SamplerConfig, params: sparse_velocity.EnsembleParams, *inputs: Any
) -> jax.Array:
    return router_logits(config.router, params.router, params.clusters, *inputs)
