"""The guard passes on what the page needs, and nothing else."""

import asyncio

import pytest

from paris_jax.serving.guard import Guard, is_allowed
from paris_jax.serving.server import is_loopback


def ask(method="GET", path="/", headers=(), body=(b"",), hosts=("127.0.0.1", "localhost")):
    """Status of a request, headers of the answer, and the bodies that reached the application behind the guard."""
    reached, sent = [], []
    messages = [{"type": "http.request", "body": part, "more_body": i + 1 < len(body)} for i, part in enumerate(body)]

    async def application(scope, receive, send):
        reached.append((await receive())["body"] if method == "POST" else b"")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-content-type-options", b"no")]})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:7860"} | dict(headers)
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
    }
    asyncio.run(Guard(application, hosts, 100)(scope, receive, send))
    return sent[0]["status"], sent[0]["headers"], reached


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/assets/../../etc/passwd",
     "/assets//etc/passwd", "/assets/..\\..\\secret", "/static/.env", "/gradio_api/proxy=http://localhost:22",
     "/gradio_api/upload_progress", "/gradio_api/info", "/monitoring", "/docs", "/gradio_api/vibe-code"],
)  # fmt: skip
def test_files_proxies_and_tools_of_gradio_do_not_exist(path):
    status, _, reached = ask(path=path)
    assert (status, reached) == (404, [])


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/run/predict", "/login", "/", "/assets/index.js"])
def test_nothing_is_written_but_requests_for_samples(path):
    assert ask("POST", path)[0] == 404
    assert not is_allowed("PUT", "/gradio_api/queue/join")


def test_the_page_and_its_messages_pass_with_a_policy_that_names_no_other_host():
    for path in ("/", "/config", "/theme.css", "/assets/Index-Akn07EZk2.js", "/gradio_api/queue/data"):
        status, headers, reached = ask(path=path)
        assert status == 200 and reached
    policy = dict(headers)[b"content-security-policy"].decode()
    assert "http" not in policy and "default-src 'self'" in policy
    assert [value for name, value in headers if name == b"x-content-type-options"] == [b"nosniff"]
    assert ask("POST", "/gradio_api/queue/join", body=(b"one", b"two"))[2] == [b"onetwo"]


def test_requests_that_name_another_host_or_come_from_another_page_are_refused():
    assert ask(headers={"host": "evil.example"}.items())[0] == 421
    assert ask(headers={"host": "localhost:7860"}.items())[0] == 200
    assert ask(headers={"host": "evil.example"}.items(), hosts=None)[0] == 200
    join = "/gradio_api/queue/join"
    assert ask("POST", join, headers={"origin": "http://evil.example"}.items())[0] == 403
    assert ask("POST", join, headers={"origin": "http://127.0.0.1:7860"}.items())[0] == 200


def test_a_large_body_is_refused_before_the_page_sees_it():
    status, _, reached = ask("POST", "/gradio_api/queue/join", body=(b"x" * 60, b"x" * 60))
    assert (status, reached) == (413, [])
    assert ask("POST", "/gradio_api/queue/join", body=(b"x" * 60, b"x" * 40))[0] == 200


@pytest.mark.parametrize(
    "host, local",
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.2", False), ("localhost.example", False)],
)  # fmt: skip
def test_only_addresses_of_this_machine_alone_are_loopback(host, local):
    assert is_loopback(host) == local
