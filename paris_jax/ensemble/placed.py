"""An ensemble's networks where they lie, and the sampler's compiled functions called there."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from paris_jax.diffusion import solvers
from paris_jax.ensemble import bundle, placement, sampler, watching
from paris_jax.models.dit import video_tokens


class Placed:
    """What is computed with.

    Attributes:
      networks: the kinds of expert.
      places: of each expert, its kind and its place in the kind's stack.
      router: its config, or None for one expert on its own.
      mesh: the devices that they are spread over; None for one.
    """

    def __init__(self, parts: bundle.Bundle, clusters: list[int], keeping: placement.Keeping):
        experts = [parts.experts[k] for k in clusters]
        self.networks = tuple(dict.fromkeys(expert.config for expert in experts))  # each kind once
        members = [[e for e in experts if e.config == kind] for kind in self.networks]
        self.places = tuple((kind, members[kind].index(e)) for e in experts for kind in [self.networks.index(e.config)])
        self.router = parts.router.config if parts.router else None
        self.mesh = keeping.mesh
        self.check(parts.shared["latent"]["shape"])

        def place() -> sampler.Weights:
            stacks = tuple(keeping.place(each[0].config, [expert.params for expert in each]) for each in members)
            router = placement.everywhere(parts.router.params if parts.router else None, self.mesh)
            return sampler.Weights(stacks, router, placement.everywhere(np.asarray(clusters, np.int32), self.mesh))

        self._place = place

    @functools.cached_property
    def arrays(self) -> sampler.Weights:
        """The experts and the router, brought to their places when they are first used."""
        with jax.ensure_compile_time_eval():  # also where they are first used inside a caller's own program
            arrays = self._place()
        del self._place  # and with it what it was read into
        return arrays

    def check(self, latent_shape: tuple[int, ...]) -> None:
        """Refuses latents (T, H, W, C) whose tokens the devices of a group cannot share."""
        if self.mesh:
            placement.check(self.networks, self.mesh, video_tokens(latent_shape))

    def run(self, function: Callable[..., Any], plan: sampler.Plan, x: jax.Array, *inputs: Any) -> Any:
        """Calls a compiled function of the sampler on latents x (N, T, H, W, C) and more."""
        self.check(x.shape[1:])
        with self._there():
            return function(plan, self.arrays, *(placement.everywhere(each, self.mesh) for each in (x, *inputs)))

    def draw(
        self,
        plan: sampler.Plan,
        noise: jax.Array,
        inputs: tuple[Any, ...],
        bar: bool,
        every: int,
        preview: watching.Preview | None,
    ) -> solvers.State:
        """Where the solver stands after all steps; `inputs` are the sampler's, from the keys on."""
        self.check(noise.shape[1:])
        steps = inputs[1].shape[0] - 1
        with self._there():
            state, inputs = placement.everywhere((sampler.begin(plan, noise, steps), inputs), self.mesh)
        if self.mesh is None:  # where every later state is, for one program to take all steps
            (device,) = self.arrays.clusters.devices()
            state = jax.device_put(state, device)

        def advance(state: solvers.State, first: int, last: int) -> solvers.State:
            with self._there():  # and not around what previews do
                return sampler.advance(plan, self.arrays, state, first, last, *inputs)

        if not bar and not preview:
            return advance(state, 0, steps)
        together = self.mesh is not None and len({device.process_index for device in self.mesh.devices.flat}) > 1
        return watching.watched(advance, state, steps, bar, every, preview, together)

    def _there(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()
