"""`paris-jax export`: a network in another layout, an ensemble to publish, or a publisher's additions to either."""

from paris_jax.artifacts.publish import publish
from paris_jax.commands.import_weights import export_weights
from paris_jax.commands.seal import seal
from paris_jax.errors import UserError


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
