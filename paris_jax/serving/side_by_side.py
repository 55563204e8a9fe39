"""Samples a request in one column after another, and reports the predictions so far."""

import dataclasses
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from paris_jax.artifacts import ensemble_manifest, manifest
from paris_jax.artifacts.run_folder import Role, find_run_folder
from paris_jax.artifacts.schemas import NetworkManifest
from paris_jax.config.sampling import SamplingSettings
from paris_jax.data.decoding.decoders import Decoders
from paris_jax.encoders.codecs import to_uint8
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.ensemble.samples import Samples
from paris_jax.serving import pictures
from paris_jax.serving.requests import ENSEMBLE, FRAMES, MONOLITH, ROUTING, Request

PREVIEW_SECONDS = 0.5  # least time between two previews of a column
PREVIEW_SHARE = 0.2  # of the time, at most, for decoding previews
OF_EXPERTS = (*ROUTING, "drop_experts", "router_temperature", "on_nonfinite")  # mean nothing to a single network


@dataclasses.dataclass(frozen=True)
class Update:
    """State of one column.

    Attributes:
      column: its name.
      done, steps: solver steps.
      routing: (done, E) float32, the routing weights of each step; (0, 0) where the router chooses nothing.
      clusters: the experts' clusters, E of them.
      video: (T, H, W, 3) uint8 as predicted so far, or None if it did not change.
      fps: frames a second.
      finished: whether this is the video.
    """

    column: str
    done: int
    steps: int
    routing: np.ndarray
    clusters: list[int]
    video: np.ndarray | None
    fps: float
    finished: bool = False


class SideBySide:
    """An ensemble, its experts alone and the monolith of the same run, sampled one at a time."""

    def __init__(self, ensemble: Ensemble, monolith: Ensemble | None, decoders: Decoders):
        self.ensemble, self.monolith, self.decoders = ensemble, monolith, decoders
        alone = [f"expert {k}" for k in ensemble.clusters] if len(ensemble.clusters) > 1 else []
        self.columns = (ENSEMBLE, *alone, *([MONOLITH] if monolith else []))
        self._turn = threading.Lock()

    @classmethod
    def load(cls, path: str, decoders: Decoders, **options: Any) -> "SideBySide":
        """Loads an ensemble with options of `Ensemble.load`, and the monolith beside it where there is one."""
        ensemble, monolith = Ensemble.load(path, **options), find_monolith(path)
        if monolith is None:
            return cls(ensemble, None, decoders)
        sampling = {f.name: getattr(ensemble.params, f.name) for f in dataclasses.fields(SamplingSettings)}
        return cls(ensemble, Ensemble.single(monolith, options.get("encoders"), **sampling), decoders)

    def sample(self, request: Request, stopped: threading.Event) -> Iterator[Update]:
        """Yields updates of the columns until all are sampled, or `stopped` is set.

        Sampling goes on in a thread of its own, and ends at the next step once nobody waits for updates any more.

        Raises:
          UserError: a request that cannot be sampled, or a picture that cannot be decoded.
        """
        mailbox = _Mailbox(stopped)
        thread = threading.Thread(target=self._run, args=(request, mailbox), daemon=True, name="paris_jax, sampling")
        thread.start()
        try:
            while (updates := mailbox.wait()) is not None:
                yield from updates
        finally:
            mailbox.abandoned = True
            thread.join()
        if mailbox.error is not None:
            raise mailbox.error

    def _run(self, request: Request, mailbox: "_Mailbox") -> None:
        try:
            with self._turn:
                params = request.params
                if request.image is not None:
                    params = params | {"image": pictures.decode(request.image, self.decoders)}
                for column in request.columns:
                    if mailbox.is_stopped:
                        return
                    self._sample_column(column, request.prompt, params, mailbox)
        except _Stopped:
            pass
        except Exception as error:  # is raised where the updates are read
            mailbox.error = error
        finally:
            mailbox.end()

    def _sample_column(self, column: str, prompt: str, params: dict[str, Any], mailbox: "_Mailbox") -> None:
        model, own = self._model(column, params)
        steps = own.get("num_inference_steps") or model.params.num_inference_steps
        watch = _Watch(column, model, steps, mailbox)
        watch.begin()
        samples: Samples = model.sample(prompt, callback_on_step_end=watch, **own)
        watch.end(samples)

    def _model(self, column: str, params: dict[str, Any]) -> tuple[Ensemble, dict[str, Any]]:
        """The model of a column, and the parameters that concern it."""
        if column == ENSEMBLE:
            return self.ensemble, params
        own = {name: value for name, value in params.items() if name not in OF_EXPERTS}
        if column != MONOLITH:
            return self.ensemble, own | {"fixed_expert": int(column.removeprefix("expert "))}
        assert self.monolith
        if not self.monolith.takes_images:
            own = {name: value for name, value in own.items() if name not in ("image", *FRAMES)}
        return self.monolith, own


def find_monolith(path: str) -> epath.Path | None:
    """The monolith's export beside an ensemble: of its run folder, or in its own folder; None if there is none."""
    folder = ensemble_manifest.resolve(path)
    run = find_run_folder(folder) if not path.startswith(ensemble_manifest.BUNDLED_PREFIX) else None
    candidates = [*([run.export(Role("monolith"))] if run else []), folder / "monolith"]
    for candidate in candidates:
        if manifest.exists(candidate) and manifest.read_kind(candidate) == manifest.kind(NetworkManifest):
            return candidate
    return None


class _Stopped(Exception):
    """The samples are not wanted any more."""


class _Mailbox:
    """The updates that were not read yet, the newest of each column; `wait` returns None after the last."""

    def __init__(self, stopped: threading.Event):
        self.abandoned = False  # nobody reads it any more
        self.error: Exception | None = None
        self._stopped = stopped
        self._changed = threading.Condition()
        self._updates: dict[str, Update] = {}
        self._ended = False

    @property
    def is_stopped(self) -> bool:
        return self.abandoned or self._stopped.is_set()

    def put(self, update: Update) -> None:
        with self._changed:
            before = self._updates.get(update.column)
            if update.video is None and before is not None:
                update = dataclasses.replace(update, video=before.video)
            self._updates[update.column] = update
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()

    def wait(self) -> list[Update] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._updates or self._ended)
            updates, self._updates = list(self._updates.values()), {}
            return updates or None


class _Watch:
    """`callback_on_step_end` of one column: stops if asked to, and puts updates into the mailbox."""

    def __init__(self, column: str, model: Ensemble, steps: int, mailbox: _Mailbox):
        self.column, self.model, self.steps, self.mailbox = column, model, steps, mailbox
        self.weights: list[np.ndarray] = []
        self.next_preview = 0.0

    def begin(self) -> None:
        self._put(0, None)

    def end(self, samples: Samples) -> None:
        self.weights = list(samples.routing[:, 0])
        self._put(len(self.weights), samples.pixels()[0], True)

    def __call__(self, ensemble: Ensemble, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        if self.mailbox.is_stopped:
            raise _Stopped
        weights = np.asarray(tensors["routing"], np.float32)[0]
        self.weights = [*self.weights[:step], weights]  # sampling starts again where an expert was dropped
        now, video = time.monotonic(), None
        if now >= self.next_preview and step + 1 < self.steps:
            video = to_uint8(np.nan_to_num(self.model.decode(np.asarray(tensors["x0"]))))[0]
            took = time.monotonic() - now
            self.next_preview = now + max(PREVIEW_SECONDS, took / PREVIEW_SHARE)
        self._put(step + 1, video)

    def _put(self, done: int, video: np.ndarray | None, finished: bool = False) -> None:
        routed = self.weights and self.column == ENSEMBLE and len(self.model.clusters) > 1
        weights = np.stack(self.weights) if routed else np.zeros((0, 0), np.float32)
        self.mailbox.put(
            Update(self.column, done, self.steps, weights, self.model.clusters, video, self.model.fps, finished)
        )
