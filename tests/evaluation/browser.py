"""A real browser that opens a page without a screen and without a network."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=8000",
    "--enable-logging=stderr",
)

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH (apt-get install chromium)")


def browse(path: Path, folder: Path) -> tuple[str, str, list[str]]:
    """Opens a page; returns its DOM, what the browser logged, and every address that the page asked for."""
    log = folder / "net.json"
    arguments = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", "--dump-dom", path.as_uri()]
    done = subprocess.run([BROWSER, *FLAGS, *arguments], capture_output=True, text=True, timeout=120)
    asked = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # What the browser asks for on its own account (and does not get: no name resolves) has no origin.
    asked = [p["url"] for p in asked if "url" in p and p.get("initiator", "not an origin") != "not an origin"]
    return done.stdout, done.stderr, [url for url in asked if not url.startswith(("data:", "file:", "blob:"))]
