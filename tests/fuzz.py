"""Mutated files of strangers: every reader answers with its result or with a `UserError`.

    python -m tests.fuzz --minutes=10 [--seed=0] [--only=manifest,video]

Seeded: case n of a seed is always the same. Each case runs under a limit of time and is charged the memory that it
takes. Exit code 1 and the cases themselves if one ends in another exception, hangs, or allocates over 1 GB. A decoder
that crashes takes this process with it, and the last line names the case.
"""

import argparse
import collections
import contextlib
import copy
import itertools
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paris_jax.artifacts import ensemble_manifest, exported, manifest, schemas, signatures, weight_files
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.tensors import Tensors
from paris_jax.commands.sample import read_requests
from paris_jax.config.experiment import Experiment
from paris_jax.config.sections import CurationSettings, DataSettings
from paris_jax.data import video
from paris_jax.data.shards import decode
from paris_jax.data.sources.folder import FolderSource
from paris_jax.encoders import clip, dinov2, hunyuan, t5
from paris_jax.ensemble.pipeline import Ensemble
from paris_jax.errors import UserError
from paris_jax.training import metrics
from tests.artifacts.test_signatures import write_keys

CARRIED = ("role", "cluster", "clusters", "timestep_shift", "latent", "codec", "text", "text_length", "fps", "training")
CLAIM = {"loss": 1.0, "split": "test", "data": "0" * 64, "clips": 2, "timesteps": 4, "seed": 0}
SECONDS, GIBIBYTES = 20, 1.0  # that one case may take
PUBLISHED = Path(__file__).parent / "encoders" / "published"
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 255, 2**31, 2**63, 2**64, 10**9, -(10**18), 0.0, -0.0, 0.5, 1e-300, 1e300, -1e9,
    "", "x", "0", "../../../name", "/etc/passwd", "gs://a/b", "\0", "\x1b[31m", "名前", "a" * 5000, "NaN", [], {}, [[]],
    [0], [1, 2], [1] * 5, {"": 0}, {"name": "pixels"}, {"kind": "router"}, ["x"] * 3, [None],
)  # fmt: skip
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 9000 + "]" * 9000, '{"a":' * 900 + "1" + "}" * 900)


class Hang(Exception):
    """A case that took longer than `SECONDS`."""


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of nested JSON data."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutated_json(text: str, rng: random.Random) -> str:
    """JSON with one to three fields exchanged, doubled, removed or replaced, or its text itself damaged."""
    value, marker = json.loads(text), "\ue000"
    raw = ""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(value))
        if not found:
            break
        container, key = rng.choice(found)
        kind = rng.randrange(6)
        if kind == 0:
            del container[key]
        elif kind == 1:
            other, name = rng.choice(found)
            with contextlib.suppress(LookupError):
                container[key] = copy.deepcopy(other[name])
        elif kind == 2 and isinstance(container, dict):
            container[rng.choice(("more", "..", "kind", "__class__", str(key) + "x"))] = container.pop(key)
        elif kind == 3 and isinstance(container[key], int | float):
            container[key] = rng.choice((-1, 2, 0.5, 1000, 1e12)) * container[key]
        elif kind == 4:
            container[key], raw = marker, rng.choice(RAW)
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(value)
    if raw:
        text = text.replace(json.dumps(marker), raw, 1)
    return mutated_bytes(text.encode(), rng).decode("utf-8", "replace") if rng.random() < 0.1 else text


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, doubled or overwritten at a few places, preferably near the beginning."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        end = len(data) if rng.random() < 0.5 else min(len(data), 512)
        at, kind = rng.randrange(max(1, end)), rng.randrange(5)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at : at + rng.choice((1, 4, 64))] = rng.randbytes(rng.choice((1, 4, 64)))
        elif kind == 2:
            data[at:at] = data[at : at + 256]
        elif kind == 3:
            data[at : at + 8] = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
        elif data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data)


class Cases:
    """The kinds of cases; each reads mutated files of its kind in a scratch folder."""

    def __init__(self, scratch: Path):
        self.scratch = scratch
        self.bundled = Path(ensemble_manifest.BUNDLED_FOLDER / "shapes")
        shutil.copytree(self.bundled, scratch / "ensemble")
        levels = (3 * np.arange(24)).astype(np.uint8)
        frames = np.broadcast_to(levels[:, None, None, None], (24, 32, 48, 3))
        (scratch / "videos").mkdir()
        self.videos: dict[str, bytes] = {}
        for ending in ("mp4", "webm", "gif"):
            video.write_video(scratch / f"a.{ending}", frames, 8.0, scale=1)
            self.videos[ending] = (scratch / f"a.{ending}").read_bytes()
        self.config = json.dumps(Experiment().to_dict())
        self.kinds: dict[str, Callable[[random.Random], None]] = {
            "manifest": self.manifest,
            "ensemble": self.ensemble,
            "single": self.single,
            "safetensors": self.safetensors,
            "shards": self.shards,
            "signature": self.signature,
            "config": self.from_config,
            "run": self.run_files,
            "encoder": self.encoder,
            "captions": self.captions,
            "prompts": self.prompts,
            "video": self.video,
        }

    def manifest(self, rng: random.Random) -> None:
        """The manifest of an expert or the router, with the hash that the ensemble expects."""
        part = rng.choice(("experts/0", "experts/1", "router"))
        folder, whole = self.scratch / "ensemble", json.loads((self.bundled / manifest.FILE_NAME).read_text())
        path = folder / part / manifest.FILE_NAME
        original = path.read_text()
        try:
            path.write_text(mutated_json(original, rng))
            entry = whole["router"] if part == "router" else whole["experts"][part[-1]]
            entry["manifest_sha256"] = manifest.hash_file(path)
            (folder / manifest.FILE_NAME).write_text(json.dumps(whole))
            ensemble_manifest.read(folder)
        finally:
            path.write_text(original)
            shutil.copy(self.bundled / manifest.FILE_NAME, folder / manifest.FILE_NAME)

    def ensemble(self, rng: random.Random) -> None:
        """The manifest of the ensemble itself."""
        path = self.scratch / "ensemble" / manifest.FILE_NAME
        original = path.read_text()
        try:
            path.write_text(mutated_json(original, rng))
            Ensemble(ensemble_manifest.read(path.parent))
        finally:
            path.write_text(original)

    def single(self, rng: random.Random) -> None:
        """A network on its own, loaded for sampling."""
        path = self.scratch / "ensemble" / "monolith" / manifest.FILE_NAME
        original = path.read_text()
        try:
            path.write_text(mutated_json(original, rng))
            ensemble = Ensemble.load(path.parent)
            ensemble.noise(1)
            ensemble.encode(["a small red circle"])
        finally:
            path.write_text(original)

    def safetensors(self, rng: random.Random) -> None:
        """Weights whose sizes and hashes agree with their manifest."""
        folder = self.scratch / "ensemble" / "router"
        weights, described = folder / weight_files.WEIGHTS, folder / manifest.FILE_NAME
        originals = weights.read_bytes(), described.read_text()
        try:
            weights.write_bytes(mutated_bytes(originals[0], rng))
            value = json.loads(originals[1])
            value["files"][weight_files.WEIGHTS] = {
                "bytes": weights.stat().st_size,
                "sha256": manifest.hash_file(weights),
            }
            described.write_text(json.dumps(value))
            exported.read(folder)
            Tensors(weights)
        finally:
            weights.write_bytes(originals[0])
            described.write_text(originals[1])

    def shards(self, rng: random.Random) -> None:
        """A network in shards, one of them or their index mutated, with sizes and hashes that agree."""
        folder = self.scratch / "sharded"
        if not folder.exists():
            part = exported.read(self.bundled / "router")
            content = {name: getattr(part.manifest, name) for name in CARRIED}
            exported.write(folder, part.config, part.params, "", "bfloat16", shard_bytes=100_000, **content)
        described = folder / manifest.FILE_NAME
        value = json.loads(described.read_text())
        path = folder / rng.choice([*value["files"], *[weight_files.INDEX] * len(value["files"])])
        originals = path.read_bytes(), described.read_text()
        try:
            if path.name == weight_files.INDEX:
                path.write_text(mutated_json(originals[0].decode(), rng))
            else:
                path.write_bytes(mutated_bytes(originals[0], rng))
            value["files"][path.name] = {"bytes": path.stat().st_size, "sha256": manifest.hash_file(path)}
            described.write_text(json.dumps(value))
            exported.read(folder)
        finally:
            path.write_bytes(originals[0])
            described.write_text(originals[1])

    def signature(self, rng: random.Random) -> None:
        """The signature of a network, or its claims and provenance below a signature."""
        folder, keys = self.scratch / "signed", self.scratch / "keys"
        if not folder.exists():
            shutil.copytree(self.bundled / "router", folder)
            keys.mkdir()
            write_keys(keys, "key")
            change = {"heldout": CLAIM, "code": {"version": "1", "revision": "0" * 40}, "experiment": {"name": "x"}}
            described = folder / manifest.FILE_NAME
            described.write_text(json.dumps(json.loads(described.read_text()) | change))
            signatures.sign(folder, keys / "key.pem")
        path = folder / rng.choice((manifest.FILE_NAME, signatures.FILE_NAME))
        original = path.read_text()
        try:
            path.write_text(mutated_json(original, rng))
            with contextlib.suppress(UserError):
                exported.read(folder)
            signatures.verify(folder, [keys / "key.pub.pem"])
            assert json.loads(path.read_text()) == json.loads(original) or path.name == signatures.FILE_NAME
        finally:
            path.write_text(original)

    def from_config(self, rng: random.Random) -> None:
        """A config, as a file or as the run folder's config.json."""
        path = self.scratch / "run" / "config.json"
        path.parent.mkdir(exist_ok=True)
        stored = {"schema": manifest.SCHEMA, "hash": "0" * 64, "config": json.loads(self.config)}
        path.write_text(mutated_json(json.dumps(stored), rng))
        experiment = Experiment.from_config(RunFolder(path.parent).stored_config().config)
        assert experiment.hash and experiment.data_hash

    def run_files(self, rng: random.Random) -> None:
        """Small files of a run folder: markers, results, counts, metrics."""
        sums = {
            "clips": 1,
            "text_length": 2,
            "words": ["a"],
            "numbers": 3,
            "sum": [1.0],
            "squares": [1.0],
            "shape": [1],
        }
        files: tuple[tuple[Any, Any], ...] = (
            (schemas.ShardMarker, {"origin": {"source": {"name": "shapes"}, "indices": [0, 1]}, "tally": sums}),
            (dict[str, int], {"step": 1, "times": 1}),
            (dict[schemas.FileName, schemas.Sha256], {"model.safetensors": "0" * 64}),
        )
        schema, value = rng.choice(files)
        path = self.scratch / "small.json"
        path.write_text(mutated_json(json.dumps(value), rng))
        with contextlib.suppress(UserError):
            manifest.read_json(path, schema)
        path.write_text("\n".join(mutated_json('{"step": 1, "loss": 0.5}', rng) for _ in range(3)) + "\n")
        metrics.read(path)
        metrics.newest(path)

    def encoder(self, rng: random.Random) -> None:
        """config.json or the weights of a published encoder."""
        readers = {"t5": t5.read, "clip": clip.read, "dinov2": dinov2.read, "hunyuan": hunyuan.read}
        name = rng.choice(tuple(readers))
        folder = self.scratch / name
        if not folder.exists():
            shutil.copytree(PUBLISHED / name, folder)
        path = folder / rng.choice(("config.json", "config.json", "model.safetensors"))
        original = path.read_bytes()
        try:
            if path.suffix == ".json":
                path.write_text(mutated_json(original.decode(), rng))
            else:
                path.write_bytes(mutated_bytes(original, rng))
            readers[name](folder)
        finally:
            path.write_bytes(original)

    def captions(self, rng: random.Random) -> None:
        """Tables of captions beside a video."""
        folder = self.scratch / "captions"
        folder.mkdir(exist_ok=True)
        (folder / "a.mp4").write_bytes(self.videos["mp4"])
        table = rng.choice(("captions.jsonl", "captions.csv", "a.txt"))
        rows = {
            "captions.jsonl": '{"file": "a.mp4", "caption": "it grows"}\n{"file": "b/c.mp4", "caption": "two"}\n',
            "captions.csv": 'file,caption\na.mp4,"it, ""grows"""\nb/c.mp4,two\n',
            "a.txt": "it grows",
        }
        text = rows[table]
        if table.endswith("jsonl") and rng.random() < 0.5:
            text = "\n".join(mutated_json(line, rng) for line in text.splitlines())
        path = folder / table
        try:
            path.write_bytes(mutated_bytes(text.encode(), rng) if rng.random() < 0.5 else text.encode())
            _clips(folder)
        finally:
            path.unlink()

    def prompts(self, rng: random.Random) -> None:
        """A file of prompts."""
        line = '{"prompt": "a small red circle", "seed": 3, "negative_prompt": "blue", "image": "a.png"}'
        path = self.scratch / "prompts.jsonl"
        text = "\n".join((mutated_json(line, rng), line, "a plain prompt")).encode("utf-8", "surrogatepass")
        path.write_bytes(mutated_bytes(text, rng) if rng.random() < 0.3 else text)
        read_requests(str(path))

    def video(self, rng: random.Random) -> None:
        """A damaged video."""
        ending = rng.choice(tuple(self.videos))
        folder = self.scratch / "videos"
        path = folder / f"a.{ending}"
        path.write_bytes(mutated_bytes(self.videos[ending], rng))
        (folder / "a.txt").write_text("it grows")
        try:
            _clips(folder)
        finally:
            path.unlink()


def _clips(folder: Path) -> None:
    source = FolderSource.open(DataSettings(source="folder", path=str(folder), num_frames=8, height=16, width=16))
    videos = (video for number in range(min(len(source), 2)) for video in source.videos(number))
    list(itertools.islice(decode(videos, CurationSettings()), 8))


@contextlib.contextmanager
def limit_of_time() -> Iterator[None]:
    def hang(*_: Any) -> None:
        raise Hang(f"took more than {SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def peak_gibibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def try_case(case: Callable[[random.Random], None], rng: random.Random) -> tuple[str, str]:
    """The outcome ("read", "refused" or "FAULT") of a case, and what went wrong."""
    before = peak_gibibytes()
    try:
        with limit_of_time():
            case(rng)
        outcome, why = "read", ""
    except UserError:
        outcome, why = "refused", ""
    except Exception:
        outcome, why = "FAULT", traceback.format_exc(limit=-4)
    if (taken := peak_gibibytes() - before) > GIBIBYTES:
        outcome, why = "FAULT", f"allocated {taken:.1f} GiB\n{why}"
    return outcome, why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--cases", type=int, default=0, help="stop after so many, instead of after --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", default="", help="kinds, separated by commas")
    flags = parser.parse_args()
    logging.disable(logging.WARNING)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    until, number = time.monotonic() + 60 * flags.minutes, flags.first
    with tempfile.TemporaryDirectory() as scratch:
        cases = Cases(Path(scratch))
        only = [name for name in flags.only.split(",") if name] or list(cases.kinds)
        while number < flags.first + flags.cases if flags.cases else time.monotonic() < until:
            name = only[number % len(only)]
            outcome, why = try_case(cases.kinds[name], random.Random(f"{flags.seed} {number}"))
            counts[name, outcome] += 1
            if outcome == "FAULT":
                print(f"case {number} of seed {flags.seed}, {name}: {why}", flush=True)
            number += 1
    for name in only:
        print(f"{name:<12}" + "".join(f"{counts[name, o]:>8} {o}" for o in ("read", "refused", "FAULT")))
    faults = sum(count for (_, outcome), count in counts.items() if outcome == "FAULT")
    print(f"{sum(counts.values())} cases, {faults} faults, peak {peak_gibibytes():.1f} GiB")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
