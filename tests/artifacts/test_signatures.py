"""Signatures: who signed is shown; a missing, wrong, stale or foreign signature is refused where a key is given."""

import json
import shutil
import subprocess

import pytest

from paris_jax import cli
from paris_jax.artifacts import ensemble_manifest, exported, manifest, signatures
from paris_jax.artifacts.publish import publish
from paris_jax.commands.validate import validate
from paris_jax.errors import UserError
from tests.artifacts.test_exported import edit_manifest

ensemble_folder = ensemble_manifest.BUNDLED_FOLDER / "shapes"


def write_keys(folder, name):
    """A private and a public key, by the tool that users have."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    pytest.importorskip("cryptography")
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the keys")
    return {name: write_keys(tmp_path_factory.mktemp("keys"), name) for name in ("ours", "theirs")}


@pytest.fixture
def signed(keys, tmp_path):
    shutil.copytree(ensemble_folder / "experts" / "0", tmp_path / "expert")
    assert cli.run(["export", f"--network={tmp_path}/expert", f"--sign_key={keys['ours'][0]}"]) == 0
    return tmp_path / "expert"


def test_a_signed_network_passes_and_its_signer_stands_in_the_table(signed, keys):
    checks = validate(str(signed), probe=False, keys=[keys["theirs"][1], keys["ours"][1]])
    assert (checks[0].name, checks[0].outcome) == ("signature", "passed")
    assert checks[0].detail.startswith("ed25519:") and len(checks[0].detail) == 8 + 64
    exported.read(signed)  # without keys, a signature is no extra file


def test_the_signature_is_that_of_openssl(signed, keys, tmp_path):
    found = json.loads((signed / signatures.FILE_NAME).read_text())
    (tmp_path / "sig").write_bytes(bytes.fromhex(found["signature"]))
    text = f"paris_jax manifest, sha256 {manifest.hash_file(signed / manifest.FILE_NAME)}"
    (tmp_path / "text").write_text(text)
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys["ours"][1], "-rawin"]
    subprocess.run([*command, "-in", tmp_path / "text", "-sigfile", tmp_path / "sig"], check=True)


def of_another_file_set(folder):
    shutil.copy(ensemble_folder / "experts" / "1" / manifest.FILE_NAME, folder)
    shutil.copy(ensemble_folder / "experts" / "1" / "model.safetensors", folder)


def change_signature(**changes):
    def change(folder):
        path = folder / signatures.FILE_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / signatures.FILE_NAME).unlink(), "is not signed"),
        (lambda folder: edit_manifest(folder, lambda m: m.update(note="x")), "no signature of manifest.json beside it"),
        (of_another_file_set, "no signature of manifest.json beside it"),
        (change_signature(signature="0" * 128), "no signature of manifest.json beside it"),
        (change_signature(public_key="0" * 64), "is signed by ed25519:.*, not by ed25519:"),
        (change_signature(signature="0"), "signature: expected `str` matching"),
        (change_signature(algorithm="none"), "algorithm: invalid enum value"),
        (lambda folder: (folder / signatures.FILE_NAME).write_text("x"), "is not readable JSON"),
    ],
)
def test_a_signature_that_is_missing_stale_or_of_other_files_is_refused(change, sentence, signed, keys):
    change(signed)
    with pytest.raises(UserError, match=sentence):
        validate(str(signed), keys=[keys["ours"][1]])


def test_another_signer_is_refused_by_fingerprint(signed, keys, capsys):
    assert cli.run(["validate", str(signed), f"--public_key={keys['theirs'][1]}"]) == 1
    shown = capsys.readouterr()
    assert "is signed by ed25519:" in shown.err and "signature" in shown.out


def test_a_changed_weight_below_a_good_signature_is_refused(signed, keys):
    path = signed / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="was altered"):
        validate(str(signed), keys=[keys["ours"][1]])


def test_a_link_in_the_place_of_a_signature_is_refused(signed, keys, tmp_path):
    shutil.move(signed / signatures.FILE_NAME, tmp_path / "elsewhere")
    (signed / signatures.FILE_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        validate(str(signed), keys=[keys["ours"][1]])


def test_a_signed_ensemble_covers_its_networks_and_keeps_their_own_signatures(keys, tmp_path):
    out, key = tmp_path / "published", keys["ours"]
    assert cli.run(["export", "--ensemble=bundled:shapes", f"--out={out}", f"--sign_key={key[0]}"]) == 0
    checks = validate(str(out), probe=False, keys=[key[1]])
    assert [c.subject for c in checks if c.name == "signature"] == ["ensemble"]
    edit_manifest(out / "experts" / "0", lambda m: m.update(note="x"))
    with pytest.raises(UserError, match="is not the network that"):
        validate(str(out), probe=False, keys=[key[1]])


def test_an_ensemble_without_a_signature_needs_one_of_every_network(keys, tmp_path):
    publish("bundled:shapes", tmp_path / "mixed")
    names = ("experts/0", "experts/1", "experts/2")
    for name in names:
        signatures.sign(tmp_path / "mixed" / name, keys["ours"][0])
    with pytest.raises(UserError, match="router is not signed"):
        validate(str(tmp_path / "mixed"), probe=False, keys=[keys["ours"][1]])
    signatures.sign(tmp_path / "mixed" / "router", keys["theirs"][0])
    with pytest.raises(UserError, match="is signed by"):
        validate(str(tmp_path / "mixed"), probe=False, keys=[keys["ours"][1]])
    checks = validate(str(tmp_path / "mixed"), probe=False, keys=[pair[1] for pair in keys.values()])
    assert sum(c.name == "signature" for c in checks) == 4
    publish(tmp_path / "mixed", tmp_path / "again")
    validate(str(tmp_path / "again"), probe=False, keys=[pair[1] for pair in keys.values()])


@pytest.mark.parametrize("name", ["public", "rsa", "nonsense", "missing", "encrypted"])
def test_a_key_that_cannot_sign_is_refused_and_nothing_is_written(name, keys, tmp_path):
    shutil.copytree(ensemble_folder / "experts" / "0", tmp_path / "expert")
    path, before = tmp_path / "key", sorted(p.name for p in (tmp_path / "expert").iterdir())
    if name == "public":
        path = keys["ours"][1]
    elif name == "rsa":
        subprocess.run(["openssl", "genpkey", "-algorithm", "RSA", "-out", path], check=True, capture_output=True)
    elif name == "nonsense":
        path.write_text("key")
    elif name == "encrypted":
        command = ["openssl", "genpkey", "-algorithm", "ed25519", "-aes256", "-pass", "pass:x", "-out", path]
        subprocess.run(command, check=True, capture_output=True)
    with pytest.raises(UserError, match=r"is no private Ed25519 key|Cannot read the key"):
        signatures.sign(tmp_path / "expert", path)
    assert sorted(p.name for p in (tmp_path / "expert").iterdir()) == before
    with pytest.raises(UserError, match=r"is no public Ed25519 key|Cannot read the key"):
        validate(str(tmp_path / "expert"), keys=[keys["ours"][0] if name == "public" else path])


@pytest.mark.parametrize(
    "flags",
    [
        ["--sign_key=k"],
        ["--network=x", "--sign_key=k", "--out=y"],
        ["--network=x", "--heldout=k", "--layout=bfl"],
        ["--ensemble=bundled:shapes", "--out=y", "--heldout=k"],
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, tmp_path, capsys):
    assert cli.run(["export", *flags]) == 1
    assert "error: --" in capsys.readouterr().err
