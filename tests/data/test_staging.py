"""Copies of a bucket's shards stay within a bound: what nobody uses makes room, what is in use is kept."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath

from paris_jax.data import staging
from paris_jax.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(staging.CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv(staging.BOUND, str(2500 / 1e9))
    monkeypatch.setattr(staging, "_held", {})
    return tmp_path / "cache"


def bucket(tmp_path, name: str, version: str = "") -> tuple[epath.Path, dict[str, int]]:
    folder = epath.Path(tmp_path / name)
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(f"{{}}{version}")
    for n in range(2):
        (folder / f"{n}.array_record").write_bytes(f"{name}{version}{n}".encode().ljust(500))
    return folder, {f"{n}.array_record": 500 for n in range(2)}


def copies(cache) -> set[bytes]:
    return {path.read_bytes().strip() for path in cache.glob("*/*.array_record")}


def forget() -> None:
    """As if the processes that read the copies had ended."""
    for file in staging._held.values():
        file.close()
    staging._held.clear()


def test_files_are_copied_once_and_again_when_the_folder_is_another(tmp_path, cache):
    folder, files = bucket(tmp_path, "a")
    first = staging.stage(folder, files)
    times = [os.stat(path).st_mtime_ns for path in first]
    assert staging.stage(folder, files) == first and [os.stat(path).st_mtime_ns for path in first] == times
    assert copies(cache) == {b"a0", b"a1"}
    changed = staging.stage(*bucket(tmp_path, "a", " "))
    assert Path(changed[0]).read_bytes().strip() == b"a 0"


def test_the_oldest_copy_that_nobody_uses_makes_room(tmp_path, cache):
    for name in ("a", "b"):
        staging.stage(*bucket(tmp_path, name))
        time.sleep(0.02)
    forget()
    staging.stage(*bucket(tmp_path, "a"))  # used again
    forget()
    staging.stage(*bucket(tmp_path, "c"))
    assert copies(cache) == {b"a0", b"a1", b"c0", b"c1"}


def test_copies_in_use_are_kept_and_too_much_is_refused(tmp_path, cache):
    for name in ("a", "b"):
        staging.stage(*bucket(tmp_path, name))
    with pytest.raises(UserError, match=r"set PARIS_JAX_CACHE to a folder of a larger disk or PARIS_JAX_CACHE_GB"):
        staging.stage(*bucket(tmp_path, "c"))
    assert copies(cache) == {b"a0", b"a1", b"b0", b"b1"}


HOLD = """
import sys, time
from etils import epath
from paris_jax.data import staging
staging.stage(epath.Path(sys.argv[1]), {"0.array_record": 500, "1.array_record": 500})
print("held", flush=True)
time.sleep(60)
"""


def test_copies_that_another_process_uses_are_kept(tmp_path, cache):
    folder, _ = bucket(tmp_path, "a")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], env=environment, stdout=subprocess.PIPE)
    try:
        assert other.stdout and other.stdout.readline() == b"held\n"
        staging.stage(*bucket(tmp_path, "b"))
        forget()
        staging.stage(*bucket(tmp_path, "c"))  # b makes room, although a is older
        assert copies(cache) == {b"a0", b"a1", b"c0", b"c1"}
    finally:
        other.kill()
        other.wait()


def test_without_a_bound_the_free_disk_is_one(tmp_path, cache, monkeypatch):
    monkeypatch.delenv(staging.BOUND)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"takes 0\.0 GB here"):
        staging.stage(*bucket(tmp_path, "a"))
    monkeypatch.setenv(staging.BOUND, "much")
    with pytest.raises(UserError, match="must be a number of gigabytes"):
        staging.stage(*bucket(tmp_path, "a"))
