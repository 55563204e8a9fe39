"""`paris-jax serve`: a page in the browser that samples an ensemble."""

import contextlib
import dataclasses
from typing import Any

from paris_jax.errors import UserError
from paris_jax.serving.limits import Limits


def serve(ensemble: str, host: str, port: int, limits: Limits, load: dict[str, Any]) -> None:
    """Serves the page until Ctrl-C.

    Args:
      limits: of a request, and of those that wait.
      load: keyword arguments of `Ensemble.load`.

    Raises:
      UserError: a limit outside its range, no Gradio, no such ensemble, or an address where nothing can listen.
    """
    for problem in limits.problems():
        raise UserError(f"--{problem}")
    from paris_jax.serving import server

    # The server ends in order by itself where this process ignores SIGINT, as in the background.
    with contextlib.suppress(KeyboardInterrupt):
        server.serve(ensemble, host, port, limits, **load)
    print("stopped")


def limits_of(flags: Any) -> Limits:
    return Limits(**{field.name: flags[field.name] for field in dataclasses.fields(Limits)})
