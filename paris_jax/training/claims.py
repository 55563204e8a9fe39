"""Held-out losses that an exported network claims: measured by its trainer, and again by its validator.

Clips, timesteps and noise are those of a fixed probe of a held-out folder, so that nobody can choose favourable ones.
The timesteps of a clip are uniform in equal bins of [0, 1], one in each.
"""

import functools

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.exported import ExportedNetwork
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import HeldoutClaim, HeldoutManifest, NetworkManifest
from paris_jax.data.loader import Collate
from paris_jax.data.records import Record, read_records
from paris_jax.diffusion import randomness
from paris_jax.encoders.codecs import LatentScale
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.models.router import RouterConfig
from paris_jax.training.losses import Batch, expert_losses, router_losses

CLIPS, TIMESTEPS, SEED = 16, 4, 0  # of the probe; fewer clips where a split has fewer of a network's cluster
SMALLEST_TOLERANCE = 1e-3  # absolute: of losses near zero, as a router's may be
BATCH = 8  # points that are computed together
SHARED = ("latent", "codec", "text", "text_length", "partition")  # by network and held-out clips


def heldout_folder(path: epath.PathLike, split: str = "validation") -> epath.Path:
    """The held-out clips at a path: RUN, RUN/data, RUN/partition, or the folder of the split itself.

    Raises:
      UserError: none of these.
    """
    given = epath.Path(path)
    kind = manifest.kind(HeldoutManifest)
    run = given.parent if given.name == "data" else given
    for folder in (given, RunFolder(run).partition / split, given / split):
        if manifest.read_kind(folder) == kind:
            return folder
    raise UserError(
        f"{path} has no held-out clips; name a run folder, its data folder, or RUN/partition/{split}, and see that "
        "config.data.heldout_fraction and config.data.validation_share leave some"
    )


def claim(part: ExportedNetwork, folder: epath.Path) -> HeldoutClaim:
    """The claim of a network on the held-out clips in `folder`.

    Raises:
      UserError: clips of another partition, latent space or text, none of the network's cluster, or a loss that is not
        finite.
    """
    data = manifest.read(folder, HeldoutManifest, verify=True)
    loss, clips = _measure(part, folder, data)
    return HeldoutClaim(loss, data.split, manifest.contents_hash(data), clips, TIMESTEPS, SEED)


def record(folder: epath.Path, found: HeldoutClaim) -> None:
    """Writes a claim into the manifest of an exported network."""
    path = folder / manifest.FILE_NAME
    value = manifest.read_json(path) | {"heldout": msgspec.to_builtins(found)}
    msgspec.convert(value, NetworkManifest)
    manifest.write_json(path, value)


def check(part: ExportedNetwork, folder: epath.Path) -> str:
    """Measures the claimed loss again; returns it in words.

    Raises:
      UserError: no claim, a claim on other clips, or on another probe of them, or a loss that is not the claimed one.
    """
    said = part.manifest.heldout
    if said is None:
        raise UserError(
            f"{part.folder} claims no held-out loss; record one with 'paris-jax export --network=... --heldout=RUN', "
            "or validate without --data"
        )
    data = manifest.read(folder, HeldoutManifest, verify=True)
    if manifest.contents_hash(data) != said.data or data.split != said.split:
        raise UserError(
            f"{part.folder} claims a loss on other held-out clips ({said.split}, {said.data[:12]}) than those of "
            f"{folder} ({data.split}, {manifest.contents_hash(data)[:12]}); give --data of the run of its clips"
        )
    loss, clips = _measure(part, folder, data)
    if (said.clips, said.timesteps, said.seed) != (clips, TIMESTEPS, SEED):
        raise UserError(
            f"{part.folder} claims a loss of {said.clips} clips, {said.timesteps} timesteps and seed {said.seed}, the "
            f"probe of {folder} has {clips}, {TIMESTEPS} and {SEED}; let its trainer record it again"
        )
    allowed = max(said.tolerance * said.loss, SMALLEST_TOLERANCE)
    if abs(loss - said.loss) > allowed:
        raise UserError(
            f"{part.folder} claims a held-out loss of {said.loss:.4g} and has {loss:.4g} on the same {clips} clips, "
            f"more than {allowed:.2g} away; do not use it before its trainer has explained this"
        )
    return f"{loss:.4g}, claimed {said.loss:.4g} within {allowed:.2g}, {clips} clips of {data.split}"


def _measure(part: ExportedNetwork, folder: epath.Path, data: HeldoutManifest) -> tuple[float, int]:
    """The mean loss over the points of the probe, and its number of clips."""
    for name in SHARED:
        own, theirs = getattr(part.manifest, name), getattr(data, name)
        if own != theirs:
            raise UserError(
                f"{part.folder} was trained with another {name} than the clips of {folder}: {str(own)[:200]} instead "
                f"of {str(theirs)[:200]}; give the held-out clips of its run"
            )
    clips = _clips(folder, part.manifest.cluster if part.manifest.role == "expert" else None)
    points = [(n, b) for n in range(len(clips)) for b in range(TIMESTEPS)]
    params, scale, losses = jax.device_put(part.params), LatentScale.from_manifest(data.latent), []
    is_router = isinstance(part.config, RouterConfig)
    fields = ("latent", "pooled", "cluster") if is_router else ("latent", "tokens", "length", "pooled")
    collate = Collate(data.text_length, fields)
    for start in range(0, len(points), BATCH):
        chosen = points[start : start + BATCH]
        padded = chosen + [chosen[-1]] * (BATCH - len(chosen))
        batch = collate([(n, clips[n]) for n, _ in padded])
        batch["latent"] = scale.normalise(batch["latent"])
        index = np.asarray([n * TIMESTEPS + b for n, b in padded], np.int32)
        found = _losses(part.config, params, batch, index)
        losses.append(np.asarray(found, np.float64)[: len(chosen)])
    mean = float(np.concatenate(losses).mean())
    if not np.isfinite(mean):
        raise UserError(f"{part.folder} has a held-out loss that is not finite; train it again")
    return mean, len(clips)


def _clips(folder: epath.Path, cluster: int | None) -> list[Record]:
    """The first clips of a cluster, or of all, in an order that depends on their number alone."""
    records = read_records(folder)
    chosen: list[Record] = []
    for position in np.random.default_rng(SEED).permutation(len(records)):
        clip = records[int(position)]
        if cluster is None or clip.cluster == cluster:
            chosen.append(clip)
        if len(chosen) == CLIPS:
            return chosen
    if not chosen:
        which = "no clip" if cluster is None else f"no clip of cluster {cluster}"
        raise UserError(f"{folder} holds {which}, so there is no held-out loss; hold out more clips in a new --workdir")
    return chosen


@functools.partial(jax.jit, static_argnums=0)
def _losses(config: functional.Config, params: functional.Params, batch: Batch, index_B: jax.Array) -> jax.Array:
    """Loss of each point, (B,): of the router its cross-entropy, of the others that of their prediction type."""
    keys = randomness.sample_keys(SEED, 0, index_B)
    noise_keys, time_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    uniform_B = jax.vmap(jax.random.uniform)(time_keys)
    t_B = (index_B % TIMESTEPS + uniform_B) / TIMESTEPS
    noise = randomness.normal(noise_keys, batch["latent"].shape[1:])
    of_role = router_losses if isinstance(config, RouterConfig) else expert_losses
    return of_role(config, params, batch, batch["latent"], noise, t_B)
