"""A real browser opens the page of `paris-jax serve`, samples, and sees videos, routing and sentences."""

import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from playwright import sync_api

from paris_jax.data import video
from tests.evaluation.browser import BROWSER, FLAGS, PATIENCE, needs_browser

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="no Gradio (./launch/install.sh serve)"
)
pytestmark = [needs_browser, needs_gradio]
PROMPT = "a large red circle moving right fast on a white ground"
HERE = [flag for flag in FLAGS if "resolver" not in flag] + ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@contextlib.contextmanager
def served(folder, ensemble, *flags):
    """The port of a server of its own process, which is interrupted at the end, must end in order and leave no file."""
    command = [sys.executable, "-m", "paris_jax", "serve", f"--ensemble={ensemble}", "--port=0", *flags]
    environment = os.environ | {"TMPDIR": str(folder)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+); Ctrl-C ends it", line)
        assert found, line + process.stderr.read()
        yield int(found[1])
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "stopped\n"), errors
        assert "Traceback" not in errors
        assert not list(Path(folder).iterdir())
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def port():
    with tempfile.TemporaryDirectory() as folder, served(folder, "bundled:shapes", "--max_steps=400") as port:
        yield port


@contextlib.contextmanager
def opened(port, width=1280):
    """The page in a browser, without any other address that it asked for and without errors in its console."""
    asked, logged = set(), []
    with sync_api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=HERE)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(PATIENCE * 1000)
        page.on("request", lambda request: asked.add(request.url))
        page.on("console", lambda message: message.type == "error" and logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#prompt textarea")
        yield page
        browser.close()
    own = (f"http://127.0.0.1:{port}/", "data:", "blob:")
    assert not [address for address in asked if not address.startswith(own)]
    assert not logged


def ask(page, prompt=PROMPT, steps=3):
    page.fill("#prompt textarea", prompt)
    page.locator("#field-num_inference_steps input[type=number]").fill(str(steps))
    page.click("#sample")


def says(page, text):
    page.wait_for_function("text => document.querySelector('#says').innerText.includes(text)", arg=text)
    return page.inner_text("#says")


def get(port, path, method="GET", body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_a_prompt_becomes_videos_side_by_side_with_the_routing_of_each_step(port):
    with opened(port) as page:
        for model in ("expert 1", "monolith"):
            page.get_by_label(model, exact=True).check()
        for more in ("routing", "more"):  # controls that were never seen keep the defaults
            page.get_by_role("button", name=more).click()
        ask(page, steps=5)
        page.wait_for_selector("video.preview, video.finished")
        page.wait_for_function("document.querySelectorAll('video.finished').length == 3")
        says(page, "Sampled in")
        assert page.locator(".sample h3").all_inner_texts() == ["ensemble", "expert 1", "monolith"]
        page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.videoWidth > 0 && !v.error)")
        steps = page.locator(".routing rect title").all_text_contents()
        assert {step.partition(",")[0] for step in steps} == {f"step {i}" for i in range(1, 6)}
        assert page.locator(".routing").count() == 1


def test_a_wrong_prompt_gives_its_sentence(port):
    with opened(port) as page:
        ask(page, " ")
        assert "is empty; describe the video" in says(page, "empty")
        ask(page, "a large red circle " * 40)
        assert "the maximum is" in says(page, "shorten it")
        ask(page)
        page.locator("#field-seed input").fill("-4")
        page.click("#sample")
        assert "seed=-4: must be from 0 to" in says(page, "seed=-4")


def test_what_a_stranger_typed_stays_text(port):
    with opened(port) as page:
        ask(page, "a red <img src=x onerror=\"document.title='owned'\"> circle")
        says(page, "onerror")
        page.wait_for_selector("video.finished")
        assert page.title() == "paris_jax: bundled:shapes"
        assert page.locator("#results img").count() == 0


def test_stop_ends_sampling_and_the_next_request_is_sampled(port):
    with opened(port) as page:
        ask(page, steps=400)
        page.wait_for_function("/step [0-9]/.test(document.querySelector('.steps')?.innerText)")
        page.click("#stop")
        says(page, "Stopped")
        assert re.fullmatch(r"stopped after \d+ of 400 steps", page.inner_text(".steps"))
        ask(page, steps=2)
        page.wait_for_selector("video.finished")


def test_stop_also_ends_a_request_that_waits(port):
    with opened(port) as first:
        second = first.context.browser.new_page()
        second.set_default_timeout(PATIENCE * 1000)
        second.goto(first.url)
        second.wait_for_selector("#prompt textarea")
        ask(first, steps=400)
        first.wait_for_function("/step [0-9]/.test(document.querySelector('.steps')?.innerText)")
        ask(second, steps=2)
        says(second, "queue")
        second.click("#stop")
        second.wait_for_timeout(500)
        first.click("#stop")
        says(second, "Stopped")
        assert second.locator("video").count() == 0
        ask(second, steps=2)
        second.wait_for_selector("video.finished")


def test_a_closed_page_does_not_keep_others_waiting(port):
    with opened(port) as page:
        ask(page, steps=400)
        page.wait_for_selector("video.preview")
    with opened(port) as page:
        ask(page, steps=2)
        page.wait_for_selector("video.finished")


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(width, port):
    with opened(port, width) as page:
        ask(page)
        page.wait_for_selector("video.finished")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=/etc/passwd", "/gradio_api/file=../../../../etc/passwd", "/assets/../../../../etc/passwd",
     "/assets/..%2f..%2f..%2f..%2fetc/passwd", "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
     "/gradio_api/proxy=http://127.0.0.1:1/"],
)  # fmt: skip
def test_no_file_of_the_host_is_reachable(path, port):
    status, body = get(port, path)
    assert status == 404 and b"root:" not in body


JSON = {"Content-Type": "application/json"}


def message(port, session, **changes):
    """A request for samples as the page sends it, with some of its values changed."""
    config = json.loads(get(port, "/config")[1])
    (sampling,) = [each for each in config["dependencies"] if len(each["inputs"]) > 5]
    components = {each["id"]: each["props"] for each in config["components"]}
    inputs = [components[number] for number in sampling["inputs"]]
    names = [each.get("label") or each.get("elem_id") for each in inputs]
    assert changes.keys() <= set(names)
    values = [changes.get(name, each.get("value")) for name, each in zip(names, inputs)]
    return json.dumps({"data": values, "fn_index": sampling["id"], "session_hash": session})


def test_a_message_that_names_a_file_of_the_host_is_refused(port):
    file = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    sent = message(port, "test", prompt=PROMPT, picture=file)
    assert get(port, "/gradio_api/queue/join", "POST", sent, JSON)[0] == 200
    status, answer = get(port, "/gradio_api/queue/data?session_hash=test")
    assert status == 200 and b"did not arrive as a file" in answer and b"root:" not in answer
    assert get(port, "/gradio_api/upload", "POST", b"x")[0] == 404
    assert get(port, "/gradio_api/queue/join", "POST", b"x" * 12_000_000, JSON)[0] == 413


def test_messages_outside_the_limits_and_a_full_queue_are_refused(port):
    sent = message(port, "many", prompt=PROMPT, num_inference_steps=401)
    assert get(port, "/gradio_api/queue/join", "POST", sent, JSON)[0] == 200
    assert (
        b"num_inference_steps=401: this page allows at most 400"
        in get(port, "/gradio_api/queue/data?session_hash=many")[1]
    )
    sent = [message(port, f"full-{i}", prompt=PROMPT, num_inference_steps=2) for i in range(12)]
    with opened(port) as page:
        ask(page, steps=400)
        page.wait_for_selector(".sample")
        statuses = [get(port, "/gradio_api/queue/join", "POST", each, JSON)[0] for each in sent]
    assert statuses[0] == 200 and 503 in statuses


def test_no_path_of_the_host_is_published(port):
    for path in ("/", "/config"):
        text = get(port, path)[1].decode()
        assert not [place for place in (str(Path.home()) + "/", os.getcwd(), tempfile.gettempdir()) if place in text]


def test_a_picture_starts_a_video(trained, tmp_path):
    picture = tmp_path / "first.png"
    picture.write_bytes(video.png_bytes(np.full((16, 16, 3), (200, 20, 20), np.uint8)))
    (tmp_path / "files").mkdir()
    with served(tmp_path / "files", trained.ensemble) as port, opened(port) as page:
        page.get_by_role("button", name="picture to start from").click()
        page.set_input_files("#picture input", picture)
        page.wait_for_function("document.querySelector('#picture img').naturalWidth == 16")
        page.get_by_label("monolith", exact=True).check()
        ask(page)
        page.wait_for_function("document.querySelectorAll('video.finished').length == 2")
        junk = tmp_path / "junk.png"
        junk.write_text("no picture")
        page.set_input_files("#picture input", junk)
        page.click("#sample")
        assert "choose another" in says(page, "The picture")


def test_addresses_that_cannot_be_listened_at_are_refused(port):
    command = [sys.executable, "-m", "paris_jax", "serve", "--ensemble=bundled:shapes"]
    done = subprocess.run([*command, f"--port={port}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"--host=127.0.0.1 --port={port}: nothing can listen there" in done.stderr
