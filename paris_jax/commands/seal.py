"""`paris-jax export --network=... --heldout --sign_key`: a claimed loss, and a signature, of an exported network."""

import logging

from etils import epath

from paris_jax.artifacts import ensemble_manifest, exported, locks, manifest, signatures
from paris_jax.artifacts.schemas import EnsembleManifest
from paris_jax.errors import UserError
from paris_jax.training import claims

logger = logging.getLogger(__name__)


def seal(network: str, heldout: str | None, sign_key: str | None) -> None:
    """Records the held-out loss of an exported network in its manifest, then signs it.

    Args:
      network: the folder of an exported network, which is changed in place; without `heldout`, also of an ensemble.
      heldout: where the held-out clips are (`claims.heldout_folder`); None to leave the claim as it is.
      sign_key: PEM file of a private key; None not to sign.

    Raises:
      UserError: a network that does not pass its checks, other clips, a key that cannot be used, or a new claim in a
        network that is signed and would not be signed again; nothing is written then.
    """
    folder = epath.Path(network)
    if heldout and not sign_key and signatures.exists(folder):
        raise UserError(f"{folder} is signed, and a new claim would break that; give --sign_key, too")
    with locks.only_writer(folder):
        is_ensemble = not heldout and manifest.read_kind(folder) == manifest.kind(EnsembleManifest)
        part = None if is_ensemble else exported.read(folder)
        if part is None:
            ensemble_manifest.read(folder)
        if sign_key:
            signatures.check_private_key(sign_key)
        if part and heldout:
            found = claims.claim(part, claims.heldout_folder(heldout))
            claims.record(folder, found)
            logger.info("%s claims a loss of %.4g on %d held-out clips", folder, found.loss, found.clips)
        if sign_key:
            logger.info("%s is signed by %s", folder / manifest.FILE_NAME, signatures.sign(folder, sign_key))
