"""Signatures of folders: Ed25519 over the manifest, which names every file with its size and hash.

`manifest.sig` lies beside the manifest and holds the public key and the signature. Keys are PEM files, as
`openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them; no service takes part. The `model-signing`
package does the same with 19 further packages, clients of services among them, and does not import as it is installed.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

from etils import epath

from paris_jax.artifacts import manifest, safe_files
from paris_jax.artifacts.schemas import SignatureFile
from paris_jax.errors import UserError

FILE_NAME = "manifest.sig"
KEY_BYTES = 1 << 16  # of a key file, at most


def sign(folder: epath.PathLike, key: epath.PathLike) -> str:
    """Signs the manifest of a folder with the private key in a file; returns the signer's fingerprint.

    Raises:
      UserError: no Ed25519 key, one with a password, or the package `cryptography` is missing.
    """
    folder, private = epath.Path(folder), _private_key(key)
    public = private.public_key().public_bytes_raw()
    content = {"algorithm": "ed25519", "public_key": public.hex(), "signature": private.sign(_signed(folder)).hex()}
    manifest.write_json(folder / FILE_NAME, content)
    return fingerprint(public)


def check_private_key(key: epath.PathLike) -> None:
    """Raises UserError for a file that `sign` cannot sign with."""
    _private_key(key)


def exists(folder: epath.PathLike) -> bool:
    return (epath.Path(folder) / FILE_NAME).exists()


def read(folder: epath.Path) -> SignatureFile:
    """The signature beside a manifest, unchecked.

    Raises:
      UserError: a file that is not regular, or no signature.
    """
    return manifest.read_json(safe_files.inside(folder, FILE_NAME), SignatureFile, "get it again from its publisher")


def verify(folder: epath.PathLike, keys: Sequence[epath.PathLike]) -> str:
    """Checks that the manifest of a folder is signed by one of the public keys in files; returns its fingerprint.

    Raises:
      UserError: no signature, one of another key, or one of another manifest.
    """
    folder = epath.Path(folder)
    trusted = {_public_key(key) for key in keys}
    if not exists(folder):
        raise UserError(
            f"{folder} is not signed; get {FILE_NAME} from its publisher, or validate without --public_key if you "
            "trust where it comes from"
        )
    found = read(folder)
    public = bytes.fromhex(found.public_key)
    if public not in trusted:
        raise UserError(
            f"{folder} is signed by {fingerprint(public)}, not by {' or '.join(sorted(map(fingerprint, trusted)))}; do "
            "not use it, or give --public_key of its signer if you trust that one"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        _ed25519().Ed25519PublicKey.from_public_bytes(public).verify(bytes.fromhex(found.signature), _signed(folder))
    except InvalidSignature as error:
        raise UserError(
            f"{folder / FILE_NAME} is no signature of {manifest.FILE_NAME} beside it, which was changed or exchanged "
            "after it was signed; get both again from the publisher"
        ) from error
    return fingerprint(public)


def fingerprint(public: bytes) -> str:
    """The fingerprint of a raw public key, as signer and user compare it."""
    return f"ed25519:{hashlib.sha256(public).hexdigest()}"


def _signed(folder: epath.Path) -> bytes:
    """The signed message: the purpose, and the hash of the manifest."""
    return f"paris_jax manifest, sha256 {manifest.hash_file(folder / manifest.FILE_NAME)}".encode()


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise UserError("Signatures need the package cryptography; pip install 'paris-jax[signing]'") from error
    return ed25519


def _read_key(path: epath.PathLike) -> bytes:
    try:
        return safe_files.read_bytes(path, KEY_BYTES, follow_links=True)
    except OSError as error:
        raise UserError(f"Cannot read the key {path} ({error.strerror or error}); name a PEM file") from error


def _private_key(path: epath.PathLike) -> Any:
    kind = _ed25519().Ed25519PrivateKey
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_read_key(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, kind):
        raise UserError(
            f"{path} is no private Ed25519 key without a password; make one with 'openssl genpkey -algorithm ed25519 "
            "-out key.pem'"
        )
    return key


def _public_key(path: epath.PathLike) -> bytes:
    kind = _ed25519().Ed25519PublicKey
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key: Any
    try:
        key = load_pem_public_key(_read_key(path))
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, kind):
        raise UserError(
            f"{path} is no public Ed25519 key; write it with 'openssl pkey -in key.pem -pubout -out key.pub.pem'"
        )
    return key.public_bytes_raw()
