"""Held-out clips in stratified order, and a model's samples, velocity and routing on them."""

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

BATCH = 32  # prompts per batch; a fixed size, so that each model compiles once


@dataclasses.dataclass(frozen=True)
class Heldout:
    """Held-out clips, ordered so that every prefix has the clusters in their natural proportion.

    Attributes:
      latents: (N, T, H, W, C) float32, as encoded by the codec, not normalised.
      clusters: (N,) int, nearest cluster of each clip.
      ids, captions, attributes: N each; attributes are {} if the source provides none.
      cond_images: (N, 2, H, W, C) float32, first and last frames encoded as images; None where records have none.
    """

    ids: list[str]
    latents: np.ndarray
    clusters: np.ndarray
    captions: list[str]
    attributes: list[dict[str, str]]
    cond_images: np.ndarray | None = None

    @classmethod
    def order(cls, records: Iterable[Record], seed: int) -> "Heldout":
        """Shuffles by (seed, clip id), so that the order of the records does not matter, and stratifies by cluster."""
        shuffled = sorted(records, key=lambda r: hashlib.sha256(f"{seed}\n{r.id}".encode()).digest())
        clusters = np.array([-1 if r.cluster is None else r.cluster for r in shuffled])
        rank = np.zeros(len(shuffled))
        for k in np.unique(clusters):
            members = np.flatnonzero(clusters == k)
            rank[members] = (np.arange(len(members)) + 0.5) / len(members)
        ordered = [shuffled[i] for i in np.argsort(rank, kind="stable")]
        images = [r.cond_images.astype(np.float32) for r in ordered if r.cond_images is not None]
        return cls(
            ids=[r.id for r in ordered],
            latents=np.stack([r.latent.astype(np.float32) for r in ordered]),
            clusters=np.array([-1 if r.cluster is None else r.cluster for r in ordered]),
            captions=[r.caption for r in ordered],
            attributes=[_in_order(r.attributes) for r in ordered],
            cond_images=np.stack(images) if len(images) == len(ordered) > 0 else None,
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> "Heldout":
        return Heldout(
            *(self.ids[part], self.latents[part], self.clusters[part], self.captions[part], self.attributes[part]),
            None if self.cond_images is None else self.cond_images[part],
        )

    @property
    def has_attributes(self) -> bool:
        """Whether every clip has ground-truth attributes."""
        return all(self.attributes)

    @property
    def has_shapes_attributes(self) -> bool:
        """Whether every clip has the attributes of the embedded shapes, and no value that they do not have."""
        return self.has_attributes and all(
            a.keys() == ATTRIBUTES.keys() and all(v in ATTRIBUTES[k] for k, v in a.items()) for a in self.attributes
        )


def _in_order(attributes: dict[str, str]) -> dict[str, str]:
    """Returns the attributes in the order of `ATTRIBUTES`, others last; records store them sorted by name."""
    order = [*ATTRIBUTES, *attributes]
    return {name: attributes[name] for name in sorted(attributes, key=order.index)}


def sample(
    model: Ensemble,
    captions: list[str],
    noise: np.ndarray,
    options: dict,
    advance: Callable[[int], object],
    cond: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples one video per caption from noise (N, T, H, W, C), batch by batch.

    Args:
      model: ensemble to sample from.
      captions: N prompts.
      noise: (N, T, H, W, C) float32 initial noise.
      options: keyword arguments of `Ensemble.sample`.
      advance: called after each batch with its number of videos.
      cond: conditioning input (N, T, H, W, 1 + C), or None.
    Returns:
      videos (N, T', H', W', 3) float32 in [-1, 1] and routing (S, N, E) float32.
    """
    size = min(BATCH, len(captions))
    videos, routing = [], []
    for start in range(0, len(captions), size):
        index = np.minimum(np.arange(start, start + size), len(captions) - 1)
        conditioning = {} if cond is None else {"cond": jnp.asarray(cond[index])}
        samples = model.sample([captions[i] for i in index], noise=jnp.asarray(noise[index]), **conditioning, **options)
        count = min(size, len(captions) - start)
        videos.append(samples.videos[:count])
        routing.append(samples.routing[:, :count])
        advance(count)
    return np.concatenate(videos).astype(np.float32), np.concatenate(routing, axis=1).astype(np.float32)


def velocity(model: Ensemble, captions: list[str], options: dict) -> Velocity:
    """Returns the model's velocity as a function of (x, t, clip indices), for the clips' captions.

    Args:
      model: ensemble to evaluate.
      captions: N captions, which the clip indices select from.
      options: keyword arguments of `Ensemble.velocity`.
    """
    encoded = model.encode(captions)

    def velocity_at(x: np.ndarray, t: np.ndarray, index: np.ndarray) -> np.ndarray:
        return np.asarray(
            model.velocity(jnp.asarray(x), jnp.asarray(t), jax.tree.map(lambda a: a[index], encoded), **options)
        )

    return velocity_at


def route(model: Ensemble, captions: list[str], num_clusters: int) -> Velocity:
    """Returns the router's p(cluster), (B, K), as a function of (x, t, clip indices); 0 for clusters without expert."""
    encoded = model.encode(captions)

    def weights_at(x: np.ndarray, t: np.ndarray, index: np.ndarray) -> np.ndarray:
        weights = np.zeros((len(x), num_clusters))
        weights[:, model.clusters] = model.route(
            jnp.asarray(x), jnp.asarray(t), jax.tree.map(lambda a: a[index], encoded)
        )
        return weights

    return weights_at


def decode(model: Ensemble, latents: np.ndarray) -> np.ndarray:
    """Decodes latents (N, T, H, W, C) to videos (N, T', H', W', 3) float32 in [-1, 1]."""
    return np.clip(model.codec.decode(latents), -1, 1).astype(np.float32)
