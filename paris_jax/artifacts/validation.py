"""Validation of exported networks and ensembles, as a table of named checks in a fixed order.

What a file says is checked before anything is allocated for it, and what it holds before it is used. A network that
passes can still be badly or maliciously trained: hashes prove what was sent, not who sent it or how good it is.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from paris_jax.artifacts import exported
from paris_jax.artifacts.exported import CHECKS, ExportedNetwork
from paris_jax.diffusion import predictions, timesteps
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.models.dit import PATCH
from paris_jax.models.router import RouterConfig

PEER_RATIO = 8.0  # [O] between an expert's parameter norm and the median of all experts of an ensemble
TOKENS = 4096  # of the probe, at most
STEPS = 4  # of the probe's sample
SMALLEST_DEVIATION = 1e-3  # of a sample, in standard deviations of the data; below, it counts as constant
Outcome = Literal["passed", "failed", "not run"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One row of the table."""

    subject: str  # a folder's name, or "ensemble"
    name: str
    outcome: Outcome
    detail: str = ""


class Validation:
    """Runs checks and records them in `checks`; the first that fails raises its error."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def network(self, folder: epath.PathLike, subject: str = "") -> ExportedNetwork:
        """Reads an exported network, recording each check of `exported.read`.

        Raises:
          UserError: the first check that failed; those after it are recorded as not run.
        """
        subject, done = subject or str(folder), []

        def passed(name: str, detail: str) -> None:
            done.append(name)
            self.checks.append(Check(subject, name, "passed", detail))

        try:
            return exported.read(folder, passed)
        except UserError as error:
            first, *rest = CHECKS[len(done) :]
            self.checks.append(Check(subject, first, "failed", str(error)))
            self.checks += [Check(subject, name, "not run") for name in rest]
            raise

    @contextlib.contextmanager
    def check(self, subject: str, name: str) -> Iterator[list[str]]:
        """Records one check around its code; the detail is what the code appends to the list."""
        detail: list[str] = []
        try:
            yield detail
        except UserError as error:
            self.checks.append(Check(subject, name, "failed", str(error)))
            raise
        self.checks.append(Check(subject, name, "passed", ", ".join(detail)))

    def peers(self, experts: Mapping[int, ExportedNetwork]) -> None:
        """Compares the experts' parameter norms, root mean square, of networks of one size.

        Raises:
          UserError: a norm that is `PEER_RATIO` times larger or smaller than the median.
        """
        with self.check("ensemble", "norms") as detail:
            norms = {k: root_mean_square(part.params) for k, part in experts.items()}
            median = float(np.median(list(norms.values())))
            detail.append(", ".join(f"expert {k} {norm:.3g}" for k, norm in norms.items()))
            for k, norm in norms.items():
                if not median / PEER_RATIO <= norm <= median * PEER_RATIO:
                    raise UserError(
                        f"{experts[k].folder} has parameters of root mean square {norm:.3g}, the experts' median is "
                        f"{median:.3g}; train it again, or leave it out with --allow_missing"
                    )

    def sample(self, part: ExportedNetwork, subject: str) -> None:
        """Runs the network on one noise without text: a sample of few steps, or the router's weights.

        Raises:
          UserError: values that are not finite, or a constant sample.
        """
        with self.check(subject, "probe") as detail:
            values = probe(part)
            if not np.isfinite(values).all():
                raise UserError(f"{part.folder} gives values that are not finite; train it again")
            if isinstance(part.config, RouterConfig):
                detail.append(f"weights {', '.join(f'{w:.2f}' for w in values[0])}")
                return
            if values.std() < SMALLEST_DEVIATION:
                raise UserError(f"{part.folder} gives a constant sample; train it again")
            detail.append(f"a sample of {STEPS} steps, standard deviation {values.std():.3g}")


def root_mean_square(params: functional.Params) -> float:
    """Of all parameters together."""
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(params)]
    return float(np.sqrt(sum(np.square(x).sum(dtype=np.float64) for x in leaves) / sum(x.size for x in leaves)))


def probe(part: ExportedNetwork) -> np.ndarray:
    """A sample (1, T, H, W, C) of `STEPS` steps without text, or a router's weights (1, K), from one noise.

    Latents of more than `TOKENS` tokens are cut, in time first: attention takes memory of their square.
    """
    config, params, shape = part.config, part.params, (1, *_probe_shape(part.manifest.latent.shape))
    x, t_1 = jax.random.normal(jax.random.key(0), shape), jnp.ones(1)
    pooled = jnp.zeros((1, config.pooled_width))
    if isinstance(config, RouterConfig):
        return np.asarray(jax.nn.softmax(functional.apply(config, params, x, t_1, pooled, None)))
    tokens, length = jnp.zeros((1, 1, config.text_width)), jnp.ones(1, jnp.int32)

    @jax.jit
    def step(params: functional.Params, x: jax.Array, t: jax.Array, t_next: jax.Array) -> jax.Array:
        network = lambda x, t: functional.apply(config, params, x, t, tokens, length, pooled, None)  # noqa: E731
        return x + (t_next - t) * predictions.velocity(config.prediction_type, network, x, t * t_1)

    schedule = timesteps.timestep_schedule(STEPS, 1.0)
    for t, t_next in itertools.pairwise(schedule):
        x = step(params, x, t, t_next)
    return np.asarray(x)


def _probe_shape(shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The shape (T, H, W, C) of at most `TOKENS` tokens that a network is run on."""
    T, H, W, C = shape
    side = PATCH * math.isqrt(TOKENS)
    H, W = min(H, side), min(W, side)
    return min(T, max(1, TOKENS // ((H // PATCH) * (W // PATCH)))), H, W, C
