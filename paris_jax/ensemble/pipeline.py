"""`Ensemble`: what people hold in their hands.

ensemble = Ensemble.load("RUN/ensemble")            # or "bundled:shapes"
samples = ensemble.sample(["a small red circle moving left slowly on a white ground"], seed=0)
samples.save("out.mp4")
"""

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
from paris_jax.config.sampling import SamplingParams
from paris_jax.diffusion import path, randomness, solvers
from paris_jax.encoders import codecs, text
from paris_jax.ensemble import conditioning, device_placement, sampling_params, sparse_velocity
from paris_jax.ensemble.conditioning import CondFrames, Image, PromptEncoder
from paris_jax.ensemble.device_placement import PlacedEnsemble
from paris_jax.ensemble.progress import Interrupted
from paris_jax.ensemble.routing import Routing, router_logits
from paris_jax.ensemble.samples import Samples
from paris_jax.errors import UserError
from paris_jax.models.dit import PATCH

logger = logging.getLogger(__name__)


class Ensemble:
    """Experts and their router, ready to sample."""

    def __init__(
        self,
        parts: ensemble_manifest.ExportedEnsemble,
        keeping: device_placement.PlacementOptions | None = None,
        encoders: Mapping[str, str] | None = None,
        drop_encoders: bool = False,
    ):
        shared = parts.shared
        self.clusters = sorted(parts.experts)
        sampling_params.check_encoders(encoders)
        self.codec = codecs.from_description(shared["codec"], (encoders or {}).get("vae", ""))
        self.text = text.from_description(shared["text"], encoders)
        self.latent_shape: tuple[int, int, int, int] = tuple(shared["latent"]["shape"])
        sampling_params.check_sizes(self.codec, self.text, shared)
        self.fps: float = shared["fps"]
        self.shift: float = shared["shift"]
        self.defaults = SamplingParams(**parts.sampling)
        self.scale = codecs.LatentScale.from_manifest(shared["latent"])
        self._placed = PlacedEnsemble(parts, self.clusters, keeping or device_placement.PlacementOptions())
        self._prompts = PromptEncoder(self.text, shared["text_length"], drop_encoders)
        if not drop_encoders:
            _ = self._placed.arrays

    @classmethod
    def load(
        cls,
        path: epath.PathLike,
        mesh: Mapping[str, int] | None = None,
        weights: str = "auto",
        offload: bool = False,
        encoders: Mapping[str, str] | None = None,
        drop_encoders: bool = False,
    ) -> "Ensemble":
        """Loads an ensemble folder (RUN/ensemble, local or gs://), or one that ships: "bundled:shapes".

        Args:
          mesh: spreads it over several devices, as {"expert": 3, "fsdp": 2}: see `ensemble/placement.py`.
          weights: "auto" keeps the experts as they compute, "int8" the matrices of their blocks as 8-bit integers.
          offload: keeps the experts' blocks in the host's memory; a layer at a time comes to the device.
          encoders: folders of published encoders, {"vae": ..., "t5": ..., "clip": ...}, where it was trained with them;
            by default those that PARIS_JAX_VAE, PARIS_JAX_T5 and PARIS_JAX_CLIP name.
          drop_encoders: forgets published text encoders as soon as prompts are encoded, before the experts come to the
            device, which then holds one or the other. Encoded prompts are remembered: `encode` all of them first.
        """
        parts = ensemble_manifest.read(path)
        return cls(parts, device_placement.placement_options(mesh, weights, offload), encoders, drop_encoders)

    @classmethod
    def single(
        cls,
        part: epath.PathLike,
        encoders: Mapping[str, str] | None = None,
        drop_encoders: bool = False,
        **sampling: Any,
    ) -> "Ensemble":
        """Loads one trained network on its own, such as the monolith's export folder; the rest as in `load`."""
        return cls(ensemble_manifest.read_single(part, sampling), None, encoders, drop_encoders)

    def encode(self, prompts: Sequence[str]) -> conditioning.EncodedText:
        """Encodes prompts, padded to the longest caption trained on (longer ones to the most the encoder takes).

        So there are two lengths, and new prompts do not recompile.

        Raises:
          Refused: an empty prompt, or one with more tokens than the text encoder takes.
        """
        return self._prompts([prompts] if isinstance(prompts, str) else prompts)

    def noise(
        self,
        count: int,
        seed: int | Sequence[int] = 0,
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> jax.Array:
        """Starting noise (count, T, H, W, C) for videos of this size; sample i's depends on the seed and i alone.

        A list names one seed (0 to 2^32 - 1) for each sample, which is then what it would be on its own.
        """
        shape = sampling_params.latent_shape(self.latent_shape, self.codec, frames, height, width)
        return randomness.normal(sampling_params.sample_keys(seed, count), shape)

    def sample(
        self,
        prompts: Sequence[str] | str,
        *,
        negative: Sequence[str] | str | None = None,
        image: Image | Sequence[Image] | None = None,
        last_image: Image | Sequence[Image] | None = None,
        video: Image | Sequence[Image] | None = None,
        video_frames: int | None = None,
        fit: str | None = None,
        kept: jax.Array | None = None,
        num_steps: int | None = None,
        times: Sequence[float] | None = None,
        experts: int | Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
        noise: jax.Array | None = None,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        drop: int | Sequence[int] = (),
        broken: str = "refuse",
        progress: bool = False,
        preview_every: int = 0,
        on_preview: Callable[[int, np.ndarray], None] | None = None,
        **how: Any,
    ) -> Samples:
        """Draws one video a prompt.

        Args:
          prompts: what to show.
          negative: what guidance leads away from, one prompt for all or one for each; by default from no prompt.
          image, last_image: the frame that the video begins, or ends, with: a picture's file, or an array (height,
            width, 3), uint8 or float in [-1, 1]; one for all prompts, or a list with one for each.
          video: what the video goes on from: a file, or an array (frames, height, width, 3); its last `video_frames`
            (by default all) are the first ones of what is made.
          fit: where these have another aspect than the video: "crop" what is over, or "letterbox" with black bars.
          kept: what the networks are told of frames that are given, instead of these (`diffusion.masks.kept`).
          num_steps: solver steps.
          times: the steps themselves, falling from 1 to 0, instead of `num_steps` ones spaced as in training.
          experts: one cluster, or one for each step: used whatever the router says, so instead of a routing rule.
          seed: of the noise, 0 to 2^32 - 1; a list gives every prompt its own.
          noise: the starting noise itself, (N, T, H, W, C); the seed is then for what a stochastic solver adds.
          frames, height, width: of the videos, in pixels; by default as trained.
          drop: clusters to do without, as if their experts were not there.
          broken: what to do where an expert answers with values that are not finite: "refuse", naming it, or "drop" it
            and begin again.
          progress: show a progress bar.
          preview_every, on_preview: every so many steps, `on_preview(steps done, videos)` is called with the videos
            (N, T, H, W, 3) as they are predicted so far.
          **how: any other field of `settings.Sampling`, among them
            guidance: classifier-free guidance scale; 1 is none.
            guidance_image: scale of guidance by frames that are given; 1 is none.
            routing: "top_k", "full" or "threshold".
            top_k: experts a sample uses at each step (implies routing="top_k").
            threshold: smallest set of experts with this weight (implies routing="threshold").
            solver: "euler", "heun", "ab2", "dpm++2m" or "ancestral".

        Returns:
          The videos (N, T, H, W, 3) float32 in [-1, 1] with the routing (S, N, experts), as an object that saves and
          shows them.

        Raises:
          Interrupted: Ctrl-C, where a bar or previews are shown; `samples` holds the videos as predicted by then.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("There is no prompt; give at least one")
        given = CondFrames(image, last_image, video, video_frames, fit)
        given.check(kept is not None)
        sampling_params.check_names(how)
        sampling_params.check_previews(broken, preview_every, on_preview is not None)
        grid = sampling_params.resolve_timesteps(times, num_steps, self.defaults.steps, self.shift)
        steps = len(grid) - 1
        self._prompts.expect([*prompts, *([negative] if isinstance(negative, str) else negative or [])])
        encoded, keys = self.encode(prompts), jax.random.key_data(sampling_params.sample_keys(seed, len(prompts)))
        if noise is None:
            start = self.noise(len(prompts), seed, frames=frames, height=height, width=width)
        else:
            start = jnp.asarray(noise, jnp.float32)
            self.check_latent(start, len(prompts))
        if kept is not None:
            sampling_params.check_cond(kept, start.shape)
        if given:
            kept = given.kept(self.codec, self.scale, start.shape[1:], len(prompts), self.fps)
        preview = (lambda step, data: on_preview(step, self.decode(data))) if on_preview else None

        def draw(how: dict[str, Any], dropped: list[int]) -> solvers.State:
            plan, told, forced = self._planned(how, encoded, negative, experts, dropped, steps, kept)
            return self._placed.draw(plan, start, (keys, grid, told, forced), progress, preview_every, preview)

        may_drop = None if experts is not None else broken == "drop"
        z, trace, stopped = self._drawn(draw, how | {"steps": steps}, sampling_params.dropped_clusters(drop), may_drop)

        def made(done: int) -> Samples:
            return Samples(self.decode(z), prompts, self.fps, trace.weight[:done], self.clusters)

        if stopped:
            stopped.samples = made(stopped.done) if stopped.done else None
            raise stopped
        return made(steps)

    def _drawn(
        self, draw: Callable[..., solvers.State], how: dict[str, Any], dropped: list[int], may_drop: bool | None
    ) -> tuple[np.ndarray, Any, Interrupted | None]:
        """Latents by experts that all answered with finite values, and what was told of their steps.

        Args:
          draw: of what is asked for, without the clusters dropped.
          may_drop: whether experts that break may be left out; None where they are forced.

        Returns:
          Both up to the step at which the draw was interrupted, and how it was; None if it came to its end.
        """
        while True:
            try:
                stopped, state = None, draw(how, dropped)
            except Interrupted as stop:
                stopped, state = stop, stop.samples
            z = state.data if stopped and stopped.done < stopped.steps else state.x
            z, trace = jax.tree.map(np.asarray, (z, sparse_velocity.trace_of(state)))
            failed = sampling_params.first_nonfinite(trace.broken, self.clusters)
            if not failed:
                break
            dropped = [*dropped, *failed[1]]
            left = len(self.clusters) - len(set(dropped))
            if stopped or not may_drop or not left:
                advice = f"leave out with drop={dropped}, or " if left and may_drop is not None else ""
                raise UserError(f"{sampling_params.describe_nonfinite(*failed)}; {advice}lower guidance") from stopped
            logger.warning("%s; left out", sampling_params.describe_nonfinite(*failed))
            how = how | ({"top_k": min(how["top_k"], left)} if how.get("top_k") else {})
        if not np.isfinite(trace.weight[0]).all():  # of noise, which is finite
            raise UserError("The router answered with weights that are not finite; give experts=K, or train it again")
        if not np.isfinite(z).all() or not np.isfinite(trace.weight).all():
            raise UserError("The sampled video is not finite, though every expert's answers are; lower guidance")
        return z, trace, stopped

    def velocity(
        self,
        x: jax.Array,
        t: jax.Array,
        encoded: conditioning.EncodedText,
        *,
        negative: Sequence[str] | str | None = None,
        kept: jax.Array | None = None,
        experts: int | None = None,
        drop: int | Sequence[int] = (),
        **how: Any,
    ) -> jax.Array:
        """The merged velocity at x (N, T, H, W, C) and times t (N,) for `encode`d prompts.

        `kept` (N, T, H, W, 1 + C) tells of frames that are given (`diffusion.masks.kept`). The rest is as in `sample`,
        without guidance unless it is given.

        Raises:
          Refused: an expert answers a finite x with values that are not, naming it.
        """
        sampling_params.check_names(how)
        how, dropped = {"guidance": 1.0, "guidance_image": 1.0} | how, sampling_params.dropped_clusters(drop)
        plan, told, forced = self._planned(how, encoded, negative, experts, dropped, 1, kept)
        v, trace = self._placed.run(sparse_velocity.ensemble_velocity, plan, x, t, told, forced[0])
        traced = isinstance(v, jax.core.Tracer)  # inside a caller's jit, nobody can be told
        if not traced and (failed := sampling_params.first_nonfinite(np.asarray(trace.broken)[None], self.clusters)):
            advice = f"leave out with drop={failed[1]}" if experts is None else "ask others"
            raise UserError(f"{sampling_params.describe_nonfinite(None, failed[1])}; {advice}")
        return v

    def route(
        self, x: jax.Array, t: jax.Array, encoded: conditioning.EncodedText, kept: jax.Array | None = None
    ) -> jax.Array:
        """p(cluster | x_t, t, text, kept frames) over the experts that are present, (N, experts)."""
        plan = sparse_velocity.SamplerConfig(
            self._placed.networks, self._placed.places, self._placed.router, Routing("full")
        )
        return jax.nn.softmax(self._placed.run(_routing_logits, plan, x, t, encoded.pooled, kept))

    def disagreement(
        self,
        x: jax.Array,
        t: jax.Array,
        encoded: conditioning.EncodedText,
        *,
        kept: jax.Array | None = None,
        drop: int | Sequence[int] = (),
        **how: Any,
    ) -> jax.Array:
        """How far the experts' answers lie apart, at every place of the latent, (N, T, H, W) float32.

        The spread over the experts, weighted by the router, of the data that each predicts at x (N, T, H, W, C) and
        times t (N,), as a root mean square over the channels: in units of the data's spread, 0 where all agree.
        """
        used = np.flatnonzero(sampling_params.present_experts(self.clusters, sampling_params.dropped_clusters(drop)))
        weight_NE = self.route(x, t, encoded, kept)[:, used]
        weight_NE = weight_NE / weight_NE.sum(-1, keepdims=True)
        v = [self.velocity(x, t, encoded, kept=kept, experts=self.clusters[e], **how) for e in used]
        each = jnp.stack([path.data_from_velocity(x, of_expert, t) for of_expert in v])
        mean = jnp.einsum("ne,enthwc->nthwc", weight_NE, each)
        return jnp.sqrt(jnp.einsum("ne,enthwc->nthw", weight_NE, jnp.square(each - mean)) / x.shape[-1])

    def one_by_one(self, prompts: Sequence[str] | str, **how: Any) -> dict[str, Samples]:
        """Each expert on its own, whatever the router says, from the same noise; to `samples.compare`."""
        return {f"expert {k}": self.sample(prompts, experts=k, **how) for k in self.clusters}

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Latents (..., T, H, W, C) in units of the training spread to videos (..., T', H', W', 3) in [-1, 1]."""
        return np.clip(self.codec.decode(self.scale.denormalise(latent)), -1.0, 1.0)

    def check_latent(self, x: jax.Array, count: int) -> None:
        """Refuses noise that no video of so many prompts could start from."""
        C = self.latent_shape[-1]
        if x.ndim != 5 or x.shape[0] != count or x.shape[-1] != C or x.shape[2] % PATCH or x.shape[3] % PATCH:
            expected = (count, *self.latent_shape)
            raise UserError(f"noise has shape {x.shape}; {count} prompts of this ensemble need {expected}")
        if not np.isfinite(x).all():
            raise UserError("noise holds values that are not finite")

    def _planned(
        self,
        how: dict[str, Any],
        encoded: conditioning.EncodedText,
        negative: Sequence[str] | str | None,
        experts: int | Sequence[int] | None,
        dropped: list[int],
        steps: int,
        kept: jax.Array | None,
    ) -> tuple[sparse_velocity.SamplerConfig, conditioning.Condition, jax.Array]:
        """What a call asks for, checked: the program, what it is told, and the expert of each step if one is forced."""
        sampling_params.check_one_rule(how, experts)
        settings, present = (
            sampling_params.resolve(self.defaults, how),
            sampling_params.present_experts(self.clusters, dropped),
        )
        chosen = sampling_params.routing(settings, how, experts is not None, int(present.sum()))
        by_image = kept is not None and settings.guidance_image != 1.0
        method = settings.guidance_method if settings.guidance != 1.0 else "classifier_free" if by_image else ""
        kinds = self._placed.networks, self._placed.places, self._placed.router
        rules = chosen, settings.solver, method, by_image, settings.routed_by, settings.rows_at_once
        plan = sparse_velocity.SamplerConfig(*kinds, *rules)
        if kept is not None:
            self._check_keeps_frames(present)
        forced = sampling_params.expert_schedule(experts, steps, self.clusters, present)
        return plan, self._told(encoded, settings, negative, present, kept), forced

    def _check_keeps_frames(self, present: np.ndarray) -> None:
        """Refuses frames where an expert that is used has no input for them."""
        places = zip(self.clusters, self._placed.places, present, strict=True)
        deaf = [str(k) for k, (kind, _), used in places if used and not self._placed.networks[kind].kept_frames]
        if deaf:
            who = f"Expert{'s' * (len(deaf) > 1)} {', '.join(deaf)}"
            raise UserError(f"{who} cannot be given frames; train with config.masks, as configs/shapes.py:image does")

    def _told(
        self,
        encoded: conditioning.EncodedText,
        settings: SamplingParams,
        negative: Sequence[str] | str | None,
        present: np.ndarray,
        kept: jax.Array | None,
    ) -> conditioning.Condition:
        """Prompts and frames with what guidance leads away from, and with the strength of it."""
        nothing, count = self._prompts.null(encoded), len(encoded.length)
        away = nothing
        if negative is not None:
            if settings.guidance == 1.0:
                raise UserError("negative: a negative prompt needs guidance; guidance=1 is none")
            negative = [negative] * count if isinstance(negative, str) else list(negative)
            if len(negative) != count:
                raise UserError(
                    f"negative names {len(negative)} for {count} prompts; give one for all, or one for each"
                )
            away = self.encode(negative)
            longest = max(encoded.tokens.shape[1], away.tokens.shape[1])
            encoded, away = encoded.padded(longest), away.padded(longest)
        strength, temperature = sampling_params.strength(settings), jnp.float32(settings.temperature)
        return conditioning.Condition(encoded, away, strength, kept, temperature, jnp.asarray(present), nothing.pooled)


@functools.partial(jax.jit, static_argnames=("config",))
def _routing_logits(
    config: sparse_velocity.SamplerConfig, params: sparse_velocity.EnsembleParams, *inputs: Any
) -> jax.Array:
    return router_logits(config.router, params.router, params.clusters, *inputs)
