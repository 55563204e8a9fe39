"""`paris-jax export`: a network in another layout, an ensemble to publish, or a publisher's additions to either."""

import logging

from etils import epath

from paris_jax.artifacts import exported, locks, weight_files
from paris_jax.artifacts.publish import publish
from paris_jax.artifacts.tensors import Tensors
from paris_jax.commands.import_weights import progress_bar
from paris_jax.commands.seal import seal
from paris_jax.errors import UserError, nearest
from paris_jax.models import functional
from paris_jax.models.dit import DiTConfig
from paris_jax.weights import convert
from paris_jax.weights.layouts import LAYOUTS

logger = logging.getLogger(__name__)


def export(
    network: str | None,
    ensemble: str | None,
    layout: str | None,
    out: str | None,
    heldout: str | None,
    sign_key: str | None,
) -> None:
    """Exports according to the given flags.

    Raises:
      UserError: flags that do not go together.
    """
    if ensemble:
        for name, value in (("network", network), ("layout", layout), ("heldout", heldout)):
            if value:
                raise UserError(f"--{name} is for a single network, --ensemble for a whole one: give one of them")
        if not out:
            raise UserError("--out is missing; name the folder to write, such as --out=published")
        publish(ensemble, out)
        if sign_key:
            seal(out, None, sign_key)
    elif heldout or sign_key:
        if not network or layout or out:
            raise UserError(
                "--heldout and --sign_key change --network=RUN/experts/0/export where it is; give it without --layout "
                "and --out"
            )
        seal(network, heldout, sign_key)
    else:
        export_weights(network, layout or "diffusers", out)


def export_weights(network: str | None, layout: str, out: str | None) -> None:
    """Writes an exported network, or imported weights, as a safetensors file of another layout.

    Raises:
      UserError: a missing flag, an output that exists, or a network that the layout cannot hold.
    """
    if not network or not out:
        raise UserError("--network and --out are needed: --network=RUN/experts/0/export --out=expert.safetensors")
    if layout not in LAYOUTS:
        raise UserError(f"--layout={layout}: must be one of {', '.join(LAYOUTS)}{nearest(layout, LAYOUTS)}")
    if epath.Path(out).exists():
        raise UserError(f"{out} exists already; choose another --out")
    folder = epath.Path(network)
    found = convert.read_manifest(folder, verify=True)
    config = exported.network(found, folder)
    if not isinstance(config, DiTConfig):
        raise UserError(f"{folder} is a router; only experts and monoliths have a layout that others read")
    if config.prediction_type != "velocity":
        raise UserError(
            f"{folder} predicts {config.prediction_type}; these layouts are of networks that predict the velocity"
        )
    if config.attention != "joint":
        raise UserError(f"{folder} has {config.attention} attention; these layouts are of networks that attend jointly")
    tensors = Tensors(weight_files.location(folder, found.files))
    with locks.only_writer(out), progress_bar("writing", convert.count(config, layout)) as advance:
        convert.export_network(tensors, config, layout, epath.Path(out), advance)
    logger.info("wrote %s: %.2fM parameters as %s", out, functional.count(config) / 1e6, layout)
