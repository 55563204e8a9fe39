"""`paris-jax export --ensemble`: an ensemble as one self-contained folder, ready for a hub.

The manifest of a run's ensemble only names its parts, which lie with the run. Here they are copied beside it, byte for
byte, so that every hash still holds, with a card that describes them and their use.
"""

import logging

from etils import epath
from rich.progress import track

from paris_jax.artifacts import ensemble_manifest, exported, locks, manifest, schemas
from paris_jax.artifacts.ensemble_manifest import ExportedEnsemble
from paris_jax.artifacts.exported import ExportedNetwork
from paris_jax.artifacts.schemas import EnsembleManifest
from paris_jax.errors import UserError
from paris_jax.models import functional

logger = logging.getLogger(__name__)
CARD = "README.md"
NAMES = ("experts", "router", CARD)  # contents of the folder before its manifest, or of an interrupted copy


def publish(ensemble: epath.PathLike, out: epath.PathLike) -> None:
    """Copies an ensemble (a folder, local or gs://, or `bundled:NAME`) with all its parts to the folder `out`.

    The manifest comes last; a copy that was interrupted is made again.

    Raises:
      UserError: an ensemble that cannot be loaded; a single network, whose folder is whole already; a folder that holds
        other things.
    """
    with locks.only_writer(out):
        _publish(ensemble_manifest.resolve(ensemble), epath.Path(out))


def _publish(source: epath.Path, folder: epath.Path) -> None:
    found = ensemble_manifest.read(source)
    if found.router is None:
        raise UserError(f"{source} is a single network, whose folder holds all of it: copy it as it is")
    if manifest.exists(folder):
        raise UserError(f"{folder} holds something finished already; choose another --out, or delete it")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --out")
    others = sorted(p.name for p in folder.iterdir() if p.name not in NAMES) if folder.exists() else []
    if not others and (folder / CARD).exists() and not (folder / "experts").exists():
        others = [CARD]  # of somebody else: a copy that was cut short has experts first
    if others:
        raise UserError(f"{folder} holds {', '.join(others[:3])}, which is no part of this; choose another --out")
    pieces = {f"experts/{k}": part for k, part in found.experts.items()} | {"router": found.router}
    original = manifest.read(source, EnsembleManifest)
    copied = {name: exported.copy(part, folder / name) for name, part in track(pieces.items(), "writing")}
    manifest.write_atomically(folder / CARD, card(found))
    provenance = {"provenance": original.provenance} if original.provenance else {}
    experts = {k: copied[f"experts/{k}"] for k in found.experts}
    ensemble_manifest.write(folder, experts, copied["router"], found.sampling, original.config_hash, **provenance)
    logger.info("%s holds %d experts and the router; say in %s under which licence", folder, len(experts), CARD)


def card(found: ExportedEnsemble) -> str:
    """The model card of an ensemble, as hubs show it."""
    shared, sampling = found.shared, found.sampling
    T, H, W, C = shared.latent.shape
    used = {"full": "all experts", "top_k": f"top {sampling.top_k} of the experts"}.get(sampling.routing, "a threshold")
    rows = [
        ("network", "parameters", "prediction_type", "trained for"),
        ("---",) * 4,
        *((f"expert {k}", *_facts(part)) for k, part in sorted(found.experts.items())),
        *([("router", *_facts(found.router))] if found.router else []),
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""---
library_name: paris_jax
pipeline_tag: text-to-video
---
# {len(found.experts)} experts and a router, for paris_jax

Decentralized diffusion for video: each expert was trained alone on one cluster of the clips, and the router weighs
them at every denoising step.

    paris-jax sample --ensemble=THIS_FOLDER --prompt="..."

{table}

- latents: {T} x {H} x {W} x {C}, of the codec `{schemas.name_of(shared.codec)}`; {shared.fps:g} frames per second
- text: `{schemas.name_of(shared.text)}`, up to {shared.text_length} tokens
- sampled by default in {sampling.num_inference_steps} steps of {sampling.solver}, guidance scale
  {sampling.guidance_scale:g}, {used}

Every file's size and hash stand in the manifests and are checked when it is loaded.
"""


def _facts(part: ExportedNetwork) -> tuple[str, str, str]:
    training = part.manifest.training
    trained = f"{training.steps} steps of {training.global_batch_size} clips" if training else "imported weights"
    prediction_type = getattr(part.config, "prediction_type", "cluster")
    return f"{functional.count(part.config) / 1e6:.2f}M", prediction_type, trained
