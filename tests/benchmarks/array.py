"""Fifty thousand embedded clips prepared by four workers of which two are killed, against one process: the same bytes.

python -m tests.benchmarks.array --clips=50000 --workdir=/tmp/array
"""

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import DataManifest

SIZES = ("num_frames=4", "height=8", "width=8")


def command(workdir: Path, clips: int, *flags: str) -> list[str]:
    data = [f"--config.data.{size}" for size in (f"num_clips={clips}", *SIZES)]
    module = [sys.executable, "-m", "paris_jax", "prepare", "--config=configs/shapes.py:tiny"]
    return [*module, f"--workdir={workdir}", *data, *flags]


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--clips", type=int, default=50_000)
    parser.add_argument("--workdir", default="/tmp/array")
    flags = parser.parse_args()
    root = Path(flags.workdir)
    shutil.rmtree(root, ignore_errors=True)
    one, four = root / "one", root / "four"
    began = time.perf_counter()
    workers = [start(four, flags.clips, f"--shard={index}/4") for index in range(4)]
    while len(list(four.glob("data/*.array_record.json"))) < 24 and workers[0].poll() is None:
        time.sleep(0.1)
    for worker in workers[1:3]:
        worker.send_signal(signal.SIGKILL)
    codes = [worker.wait() for worker in workers]
    done = len(list(four.glob("data/*.array_record.json")))
    print(f"four workers: exit codes {codes}, {done} shards after {time.perf_counter() - began:.0f} s", flush=True)
    again = [start(four, flags.clips, f"--shard={index}/4") for index in (2, 1)]
    print(f"the two once more: {[worker.wait() for worker in again]}, {time.perf_counter() - began:.0f} s", flush=True)
    began = time.perf_counter()
    code = start(one, flags.clips).wait()
    print(f"one process: exit code {code}, {time.perf_counter() - began:.0f} s", flush=True)
    found = [manifest.read(run / "data", DataManifest, verify=True) for run in (one, four)]
    names = [sorted(path.name for path in (run / "data").iterdir()) for run in (one, four)]
    same = all((one / "data" / n).read_bytes() == (four / "data" / n).read_bytes() for n in names[0])
    print(
        f"{found[0].clips} clips, {len(names[0])} files; the same names: {names[0] == names[1]}, the same bytes: {same}"
    )
