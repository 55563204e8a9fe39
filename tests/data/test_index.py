"""Index and previews beside each shard hold what its records hold, without the latents."""

import hashlib

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.data import index, previews, records
from paris_jax.data.preparation import prepare
from paris_jax.data.sources.table import source
from paris_jax.errors import UserError


def test_previews_are_small_and_belong_to_clips_of_their_shard(micro, tmp_path):
    run = RunFolder(tmp_path / "run")
    prepare(micro, run, shard_size=25)
    clips = {clip.id: clip for clip in source(micro.data)}
    shards = [name for name in manifest.read(run.data, DataManifest).files if name.endswith(records.ENDING)]
    assert len(shards) == 3
    ids_of_all = [record.id for record in records.read_records(run.data)]
    for number, shard in enumerate(sorted(shards)):
        ids = ids_of_all[25 * number : 25 * (number + 1)]
        found = previews.read(run.data / previews.file_of(shard))
        assert len(found) == min(previews.PER_SHARD, len(ids))
        for row, video in found.items():
            np.testing.assert_array_equal(video, previews.small(clips[ids[row]].video))


def test_the_index_holds_what_the_records_hold(micro, tmp_path):
    run = RunFolder(tmp_path / "run")
    prepare(micro, run, shard_size=25)
    found = index.ClipIndex(run.data, manifest.read(run.data, DataManifest).files)
    made = list(records.read_records(run.data))
    blocks = list(found.blocks())
    assert [block.start for block in blocks] == [0, 25, 50]
    np.testing.assert_array_equal(np.concatenate([b.features for b in blocks]), np.stack([r.feature for r in made]))
    entries = [index.Entry(r.id, r.caption, r.attributes) for r in made]
    assert [entry for block in blocks for entry in block.entries()] == entries
    assert found.entry(37) == entries[37]
    digests = np.concatenate([b.digests for b in blocks])
    np.testing.assert_array_equal(digests, index.digests(r.id for r in made))
    hashes = [hashlib.blake2b(made[i].id.encode(), digest_size=16).digest() for i in index.order(digests)]
    assert hashes == sorted(hashes)
    (run.data / found.files[1]).write_bytes(b"rubbish")
    with pytest.raises(UserError, match=r"index\.safetensors cannot be read .*prepare the clips again"):
        list(found.blocks())


@pytest.mark.parametrize(("frames", "height", "width", "shape"), [
    (33, 256, 256, (8, 64, 64, 3)), (8, 720, 1280, (8, 36, 64, 3)), (1, 100, 50, (1, 64, 32, 3)),
    (4, 8, 8, (4, 8, 8, 3)),
])  # fmt: skip
def test_a_preview_keeps_the_shape_of_its_clip(frames, height, width, shape):
    assert previews.small(np.zeros((frames, height, width, 3), np.uint8)).shape == shape
