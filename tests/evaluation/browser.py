"""A real browser that opens a page without a screen and without a network."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
from playwright import sync_api

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--autoplay-policy=no-user-gesture-required",
]
PATIENCE = 90.0  # seconds of the real clock, which the decoders of videos follow

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH (apt-get install chromium)")


@dataclasses.dataclass
class Visit:
    """What came of opening a page."""

    data: dict[str, str]  # data-* attributes of the root element
    logged: list[str]  # messages of the console and uncaught errors
    asked: list[str]  # addresses that the page wanted from a network


def browse(path: Path, until: str = "html[data-settled]") -> Visit:
    """Opens a page and waits for what a CSS selector names; the caller sees by the attributes what never came."""
    visit = Visit({}, [], [])
    with sync_api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page()
        page.on("console", lambda message: visit.logged.append(message.text))
        page.on("pageerror", lambda error: visit.logged.append(str(error)))
        page.on("request", lambda request: visit.asked.append(request.url))
        page.on("requestfailed", lambda request: request.failure == "csp" and visit.asked.remove(request.url))
        page.goto(path.as_uri())
        with contextlib.suppress(sync_api.TimeoutError):
            page.wait_for_selector(until, state="attached", timeout=PATIENCE * 1000)
        visit.data = page.evaluate("({...document.documentElement.dataset})")
        browser.close()
    visit.asked = [address for address in visit.asked if not address.startswith(("data:", "file:", "blob:"))]
    return visit


def run_scripts(
    path: Path, width: int, height: int, *scripts: str, scheme: Literal["light", "dark"] = "light"
) -> list[Any]:
    """What functions of JavaScript return on a page in a window of this size."""
    with sync_api.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(path.as_uri())
        found = [page.evaluate(script) for script in scripts]
        browser.close()
    return found
