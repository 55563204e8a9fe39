"""Guard in front of Gradio: the few routes that the page needs, requests of this page only, bounded bodies.

Gradio has routes for files, uploads, proxies and other programs. The page uses none of them: its videos and pictures
are in its messages. Nothing else exists here.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from paris_jax.artifacts.safe_files import is_plain

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

API = "/gradio_api"
READ = {"/", "/config", "/theme.css", "/favicon.ico", f"{API}/queue/data", f"{API}/startup-events", f"{API}/app_id"}
READ_BELOW = ("/assets/", "/static/", f"{API}/heartbeat/")
WRITE = {f"{API}/queue/join", f"{API}/cancel", f"{API}/reset"}
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src data: blob:; font-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """An ASGI application around another one.

    Attributes:
      app: the application.
      hosts: names that a request's Host may have (another one is DNS that was bent to this machine), or None for all.
      body_bytes: the largest body of a request.
    """

    def __init__(self, app: Any, hosts: Sequence[str] | None, body_bytes: int):
        self.app, self.hosts, self.body_bytes = app, hosts, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the server closes the connection
        status, reason = self.refusal(scope)
        body = b""
        if not status and scope["method"] == "POST":
            found = await _body(receive, self.body_bytes)
            if found is None:
                status, reason = 413, "the request is too large"
            else:
                body = found
        if status:
            await _answer(send, status, reason)
            return
        await self.app(scope, _replayed(body, receive) if scope["method"] == "POST" else receive, _secured(send))

    def refusal(self, scope: Scope) -> tuple[int, str]:
        """Status and reason for a request that is not passed on; 0 for one that is."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self.hosts is not None and urlsplit(f"//{host}").hostname not in self.hosts:
            return 421, "this page is for this machine only"
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "requests of other pages are not allowed"
        if not is_allowed(scope["method"], scope["path"]):
            return 404, "there is no such page"
        return 0, ""


def is_allowed(method: str, path: str) -> bool:
    """Whether the page needs a route; names below a folder must be plain: no "..", no root, no odd character."""
    if method == "POST":
        return path in WRITE
    below = next((prefix for prefix in READ_BELOW if path.startswith(prefix)), None)
    return method in ("GET", "HEAD") and (path in READ or (below is not None and is_plain(path[len(below) :])))


async def _body(receive: Receive, limit: int) -> bytes | None:
    """The body of a request; None for one of more than `limit` bytes, of which no more is read."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body)
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            return None
    return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> dict[str, Any]:
        return messages.pop() if messages else await receive()

    return replay


def _secured(send: Send) -> Send:
    async def secured(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in HEADERS}
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
            message = message | {"headers": [*kept, *HEADERS]}
        await send(message)

    return secured


async def _answer(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
