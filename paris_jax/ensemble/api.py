"""`Ensemble`: what people hold in their hands.

ensemble = Ensemble.load("RUN/ensemble")            # or "bundled:shapes"
samples = ensemble.sample(["a small red circle moving left slowly on a white ground"], seed=0)
samples.save("out.mp4")
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from rich.progress import Progress

from paris_jax import checks
from paris_jax.diffusion import randomness, times
from paris_jax.encoders import codecs, text
from paris_jax.ensemble import bundle, sampler
from paris_jax.ensemble.routing import Routing
from paris_jax.ensemble.samples import Samples
from paris_jax.ensemble.settings import Sampling
from paris_jax.errors import Refused


class Ensemble:
    """Experts and their router, ready to sample."""

    def __init__(self, parts: bundle.Bundle):
        shared = parts.shared
        self.clusters = sorted(parts.experts)
        self.codec = codecs.from_description(shared["codec"])
        self.text = text.from_description(shared["text"])
        self.latent_shape: tuple[int, int, int, int] = tuple(shared["latent"]["shape"])
        self.fps: float = shared["fps"]
        self.shift: float = shared["shift"]
        self.defaults = Sampling(**parts.sampling)
        self.scale = codecs.LatentScale.from_manifest(shared["latent"])
        self._text_length = shared["text_length"]
        self._network = next(iter(parts.experts.values())).config
        self._router = parts.router.config if parts.router else None
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(parts.experts[k].params for k in self.clusters))
        router = jax.tree.map(jnp.asarray, parts.router.params) if parts.router else None
        self._arrays = sampler.Weights(stacked, router, jnp.asarray(self.clusters, jnp.int32))

    @classmethod
    def load(cls, path: epath.PathLike) -> "Ensemble":
        """Loads an ensemble folder (RUN/ensemble, local or gs://), or one that ships: "bundled:shapes"."""
        return cls(bundle.read(path))

    @classmethod
    def single(cls, part: epath.PathLike, **sampling: Any) -> "Ensemble":
        """Loads one trained network on its own, such as the monolith's export folder."""
        return cls(bundle.single(part, sampling))

    def encode(self, prompts: Sequence[str]) -> sampler.Text:
        """Encodes prompts, padded to the longest caption trained on (longer ones to the most the encoder takes).

        So there are two lengths, and new prompts do not recompile.

        Raises:
          Refused: an empty prompt, or one with more tokens than the text encoder takes.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        encodings = self.text.encode(list(prompts))
        longest = max(len(e.tokens) for e in encodings)
        length = self._text_length if longest <= self._text_length else self.text.max_tokens
        tokens = np.zeros((len(encodings), length, encodings[0].tokens.shape[1]), np.float32)
        for row, encoding in zip(tokens, encodings, strict=True):
            row[: len(encoding.tokens)] = encoding.tokens
        return sampler.Text(
            jnp.asarray(tokens),
            jnp.asarray([len(e.tokens) for e in encodings], jnp.int32),
            jnp.asarray(np.stack([e.pooled for e in encodings]), jnp.float32),
        )

    def noise(self, count: int, seed: int = 0) -> jax.Array:
        """Starting noise (count, T, H, W, C); sample i's depends on the seed (0 to 2^32 - 1) and i alone."""
        for problem in checks.seed(seed=seed):
            raise Refused(problem)
        return randomness.normal(randomness.sample_keys(seed, 0, jnp.arange(count)), self.latent_shape)

    def sample(
        self,
        prompts: Sequence[str] | str,
        *,
        num_steps: int | None = None,
        guidance: float | None = None,
        routing: str | None = None,
        top_k: int | None = None,
        threshold: float | None = None,
        experts: int | Sequence[int] | None = None,
        solver: str | None = None,
        seed: int = 0,
        noise: jax.Array | None = None,
        progress: bool = False,
    ) -> Samples:
        """Draws one video a prompt.

        Args:
          prompts: what to show.
          num_steps: solver steps.
          guidance: classifier-free guidance scale; 1 is none.
          routing: "top_k", "full" or "threshold".
          top_k: experts a sample uses at each step (implies routing="top_k").
          threshold: smallest set of experts with this weight (implies routing="threshold").
          experts: one cluster, or one for each step: used whatever the router says, so instead of the three above.
          solver: "euler" or "heun".
          seed: of the starting noise.
          noise: the starting noise itself, (N, T, H, W, C), instead of a seed.
          progress: show a progress bar.

        Returns:
          The videos (N, T, H, W, 3) float32 in [-1, 1] with the routing (S, N, experts), as an object that saves and
          shows them.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise Refused("There is no prompt; give at least one")
        settings, plan = self._plan(num_steps, guidance, routing, top_k, threshold, experts, solver)
        forced = self._forced(experts, settings.steps)
        encoded = self.encode(prompts)
        start = self.noise(len(prompts), seed) if noise is None else jnp.asarray(noise)
        self.check_latent(start, len(prompts))
        with _StepProgress(settings.steps, progress) as on_step:
            z, used = sampler.sample(
                plan,
                self._arrays,
                start,
                times.grid(settings.steps, self.shift),
                encoded,
                jnp.float32(settings.guidance),
                forced,
                on_step,
            )
            z = np.asarray(z)
        if not np.isfinite(z).all():
            raise Refused("The sampled video is not finite; lower guidance, or leave out a broken expert")
        videos = np.stack([self.decode(latent) for latent in z])
        return Samples(videos, prompts, self.fps, np.asarray(used), self.clusters)

    def velocity(self, x: jax.Array, t: jax.Array, encoded: sampler.Text, **how: Any) -> jax.Array:
        """The merged velocity at x (N, T, H, W, C) and times t (N,) for `encode`d prompts; `how` as in `sample`."""
        how = {"guidance": 1.0} | how
        settings, plan = self._plan(
            None, *(how.get(k) for k in ("guidance", "routing", "top_k", "threshold", "experts", "solver"))
        )
        forced = self._forced(how.get("experts"), 1)[0]
        return sampler.velocity(plan, self._arrays, x, t, encoded, jnp.float32(settings.guidance), forced)[0]

    def route(self, x: jax.Array, t: jax.Array, encoded: sampler.Text) -> jax.Array:
        """p(cluster | x_t, t, text) over the experts that are present, (N, experts)."""
        plan = sampler.Plan(self._network, self._router, Routing("full"))
        return jax.nn.softmax(_route(plan, self._arrays, x, t, encoded))

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """A latent (T, H, W, C) in units of the training spread to video (T', H', W', 3) float32 in [-1, 1]."""
        return np.clip(self.codec.decode(self.scale.denormalise(latent)), -1.0, 1.0)

    def check_latent(self, x: jax.Array, count: int) -> None:
        expected = (count, *self.latent_shape)
        if x.shape != expected:
            raise Refused(f"noise has shape {x.shape}; {count} prompts of this ensemble need {expected}")

    def _plan(self, steps, guidance, routing, top_k, threshold, experts, solver) -> tuple[Sampling, sampler.Plan]:
        _refuse_contradictions(routing, top_k, threshold, experts)
        if routing is None and experts is None:
            routing = "top_k" if top_k is not None else "threshold" if threshold is not None else None
        given = {"steps": steps, "guidance": guidance, "routing": routing, "top_k": top_k, "threshold": threshold}
        given |= {"solver": solver}
        settings = dataclasses.replace(self.defaults, **{k: v for k, v in given.items() if v is not None})
        for problem in settings.problems():
            raise Refused(problem.replace("steps=", "num_steps="))
        rule = "forced" if experts is not None else settings.routing
        # The default may ask for more experts than are present; what the caller asks for may not.
        k = settings.top_k if top_k is not None else min(settings.top_k, len(self.clusters))
        chosen = Routing(rule, k if rule == "top_k" else 1, settings.threshold if rule == "threshold" else 0.0)
        chosen.check(len(self.clusters))
        guided = settings.guidance != 1.0
        return settings, sampler.Plan(self._network, self._router, chosen, settings.solver, guided)

    def _forced(self, experts: int | Sequence[int] | None, steps: int) -> jax.Array:
        """Positions of the forced experts, (S,) int32; zeros where none is forced."""
        if experts is None:
            return jnp.zeros(steps, jnp.int32)
        schedule = [int(k) for k in np.atleast_1d(experts)]
        schedule = schedule * steps if np.ndim(experts) == 0 else schedule
        if len(schedule) != steps:
            raise Refused(f"experts names {len(schedule)} steps where num_steps={steps}; give one expert for each step")
        absent = sorted({k for k in schedule if k not in self.clusters})
        if absent:
            raise Refused(f"experts={absent}: this ensemble has the experts {', '.join(map(str, self.clusters))}")
        return jnp.asarray([self.clusters.index(k) for k in schedule], jnp.int32)


def _refuse_contradictions(routing: Any, top_k: Any, threshold: Any, experts: Any) -> None:
    """One rule at a time: of two that are asked for, neither is passed over in silence."""
    rules = {"top_k": top_k, "threshold": threshold, "experts": experts}
    asked = [f"{name}={value}" for name, value in rules.items() if value is not None and name != routing]
    if routing is not None and asked:
        asked.insert(0, f"routing={routing!r}")
    if len(asked) > 1:
        raise Refused(f"{' and '.join(asked)} are different routing rules; give one of them")


_route = functools.partial(jax.jit, static_argnames=("plan",))(sampler.route)


class _StepProgress:
    """A progress bar fed from inside the compiled loop. One function serves all calls, so that none recompiles."""

    _current: "_StepProgress | None" = None

    def __init__(self, steps: int, shown: bool):
        self._steps, self._shown = steps, shown

    def __enter__(self) -> Callable[[Any], None] | None:
        if not self._shown:
            return None
        self._bar = Progress()
        self._task = self._bar.add_task("sampling (first call compiles)", total=self._steps)
        self._bar.start()
        _StepProgress._current = self
        return _on_step

    def __exit__(self, *_: Any) -> None:
        if self._shown:
            jax.effects_barrier()
            self._bar.update(self._task, completed=self._steps, description="sampling")
            self._bar.stop()
            _StepProgress._current = None


def _on_step(step: Any) -> None:
    current = _StepProgress._current
    if current is not None:
        current._bar.update(current._task, completed=int(step), description="sampling")
