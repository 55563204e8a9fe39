"""Held-out clips in a stratified order, and sampling, velocity and routing of a model on them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax.data.records import Record
from paris_jax.data.sources.shapes import ATTRIBUTES
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.evaluation.metrics.flow_loss import Velocity

BATCH = 32  # prompts per batch; of one size, so that each model compiles once


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Held-out clips, ordered so that every prefix has the clusters in their natural proportion.

    Attributes:
      latents: (N, T, H, W, C) float32, the codec's, not normalised.
      clusters: (N,) int, the nearest cluster of each.
      ids, captions, attributes: N each; attributes are {} where the source knows none.
    """

    ids: list[str]
    latents: np.ndarray
    clusters: np.ndarray
    captions: list[str]
    attributes: list[dict[str, str]]

    @classmethod
    def order(cls, records: Iterable[Record], seed: int) -> "Heldout":
        """Shuffles by (seed, clip id), so that the order of the records does not matter, and stratifies by cluster."""
        found = sorted(records, key=lambda r: hashlib.sha256(f"{seed}\n{r.id}".encode()).digest())
        clusters = np.array([-1 if r.cluster is None else r.cluster for r in found])
        place = np.zeros(len(found))
        for k in np.unique(clusters):
            members = np.flatnonzero(clusters == k)
            place[members] = (np.arange(len(members)) + 0.5) / len(members)
        chosen = [found[i] for i in np.argsort(place, kind="stable")]
        return cls(
            ids=[r.id for r in chosen],
            latents=np.stack([r.latent.astype(np.float32) for r in chosen]),
            clusters=np.array([-1 if r.cluster is None else r.cluster for r in chosen]),
            captions=[r.caption for r in chosen],
            attributes=[_in_order(r.attributes) for r in chosen],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Heldout":
        return Heldout(
            self.ids[part], self.latents[part], self.clusters[part], self.captions[part], self.attributes[part]
        )

    @property
    def described(self) -> bool:
        """Whether every clip has attributes that can be read back."""
        return all(self.attributes)


def _in_order(attributes: dict[str, str]) -> dict[str, str]:
    """The attributes in the order of the shapes' (records sort them by name), others last."""
    known = [*ATTRIBUTES, *attributes]
    return {name: attributes[name] for name in sorted(attributes, key=known.index)}


def sample(
    model: Ensemble,
    captions: list[str],
    noise: np.ndarray,
    how: dict,
    advance: Callable[[int], object],
    cond: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples one video per caption from noise (N, T, H, W, C), batch by batch.

    Args:
      how: keywords of `Ensemble.sample`.
      advance: called with the number of videos after each batch.
      cond: conditioning input (N, T, H, W, 1 + C), or None.
    Returns:
      videos (N, T', H', W', 3) float32 in [-1, 1] and routing (S, N, E) float32.
    """
    size = min(BATCH, len(captions))
    videos, routing = [], []
    for start in range(0, len(captions), size):
        index = np.minimum(np.arange(start, start + size), len(captions) - 1)
        given = {} if cond is None else {"cond": jnp.asarray(cond[index])}
        made = model.sample([captions[i] for i in index], noise=jnp.asarray(noise[index]), **given, **how)
        count = min(size, len(captions) - start)
        videos.append(made.videos[:count])
        routing.append(made.routing[:, :count])
        advance(count)
    return np.concatenate(videos).astype(np.float32), np.concatenate(routing, axis=1).astype(np.float32)


def velocity(model: Ensemble, captions: list[str], how: dict) -> Velocity:
    """The model's velocity at (x, t, clip indices) for the clips' captions; `how` as in `Ensemble.velocity`."""
    encoded = model.encode(captions)

    def at(x: np.ndarray, t: np.ndarray, index: np.ndarray) -> np.ndarray:
        return np.asarray(
            model.velocity(jnp.asarray(x), jnp.asarray(t), jax.tree.map(lambda a: a[index], encoded), **how)
        )

    return at


def route(model: Ensemble, captions: list[str], num_clusters: int) -> Velocity:
    """The router's p(cluster) (B, K) at (x, t, clip indices); 0 for clusters whose expert is missing."""
    encoded = model.encode(captions)

    def at(x: np.ndarray, t: np.ndarray, index: np.ndarray) -> np.ndarray:
        weights = np.zeros((len(x), num_clusters))
        weights[:, model.clusters] = model.route(
            jnp.asarray(x), jnp.asarray(t), jax.tree.map(lambda a: a[index], encoded)
        )
        return weights

    return at


def decode(model: Ensemble, latents: np.ndarray) -> np.ndarray:
    """Codec latents (N, T, H, W, C) to videos (N, T', H', W', 3) float32 in [-1, 1]."""
    return np.clip(model.codec.decode(latents), -1, 1).astype(np.float32)
