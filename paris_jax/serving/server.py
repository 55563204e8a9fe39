"""The server of the page: Gradio behind the guard, by uvicorn, on this machine only unless another host is named."""

import contextlib
import ipaddress
import logging
import os
import socket
import tempfile
from typing import Any

from paris_jax.data.decoding.decoders import Decoders
from paris_jax.errors import UserError
from paris_jax.serving import pictures
from paris_jax.serving.guard import Guard
from paris_jax.serving.limits import Limits
from paris_jax.serving.side_by_side import SideBySide

logger = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SHUTDOWN_SECONDS = 3


def serve(ensemble: str, host: str, port: int, limits: Limits, **options: Any) -> None:
    """Serves the page for an ensemble until it is interrupted.

    Args:
      host: the address to listen at.
      port: 0 for any that is free.
      **options: of `Ensemble.load`.

    Raises:
      UserError: Gradio is missing, or nothing can listen at this address.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        prepare_gradio(stack.enter_context(tempfile.TemporaryDirectory(prefix="paris_jax-serve-")))
        decoders = stack.enter_context(Decoders(1, pictures.LIMITS))
        models = SideBySide.load(ensemble, decoders, **options)
        server = make_server(ensemble, models, limits, is_loopback(host))
        shown = f"[{host}]" if ":" in host else host
        print(f"{ensemble} is served at http://{shown}:{listener.getsockname()[1]}; Ctrl-C ends it", flush=True)
        if not is_loopback(host):
            logger.warning(
                "%s is not a loopback address: everyone who reaches it can sample, without a password or encryption; "
                "leave --host out and use a tunnel (ssh -L), or stand a proxy with both in front",
                host,
            )
        server.run(sockets=[listener])


def prepare_gradio(folder: str) -> None:
    """Makes Gradio report to nobody and keep its own files in a folder that is deleted with the server.

    Raises:
      UserError: Gradio is not installed.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"serve needs the extra 'serve' ({error}); ./launch/install.sh serve") from error


def make_server(name: str, models: SideBySide, limits: Limits, local: bool) -> Any:
    """A uvicorn server of the page; `local` refuses requests that name another host than this machine."""
    import fastapi
    import gradio
    import uvicorn

    from paris_jax.serving import page

    blocks = page.build(name, models, limits)
    app = fastapi.FastAPI(openapi_url=None)
    app = gradio.mount_gradio_app(
        app, blocks, path="/", allowed_paths=[], blocked_paths=["/"], max_file_size=1, show_error=False,
        footer_links=[], ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, run_history=False,
        theme=page.theme(), css=page.style(),
    )  # fmt: skip
    guard = Guard(app, LOOPBACK if local else None, limits.body_bytes)
    return uvicorn.Server(
        uvicorn.Config(guard, log_level="warning", server_header=False, timeout_graceful_shutdown=SHUTDOWN_SECONDS)
    )


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises:
      UserError: it is taken, or not one of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"--host={host} --port={port}: nothing can listen there ({error}); give another --port, or 0 for a free one"
        ) from error
