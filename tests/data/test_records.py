"""The latent cache: exact, reproducible to the byte, and never half-written."""

import dataclasses
import json
import operator
import resource

import msgspec
import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import DataManifest, EnsembleManifest, HeldoutManifest
from paris_jax.data import records
from paris_jax.data.records import Record
from paris_jax.errors import UserError


def make(number: int, cluster: int | None = None) -> Record:
    rng = np.random.default_rng(number)
    return Record(
        id=f"clip-{number:03d}",
        latent=rng.normal(size=(2, 3, 3, 4)).astype(np.float16),
        tokens=rng.normal(size=(1 + number % 5, 8)).astype(np.float16),
        pooled=rng.normal(size=8).astype(np.float16),
        feature=rng.normal(size=6).astype(np.float32),
        caption=f"café {number} 動画",
        attributes={"world": "flat", "colour": "red"} if number % 2 else {},
        cluster=cluster,
    )


CONTRACT = {
    "codec": {"name": "pixels", "time": 2, "height": 2, "width": 2},
    "text": {"name": "words", "vocabulary": [], "width": 4, "max_tokens": 8},
    "features": {"name": "statistics"},
    "latent": {"shape": [2, 3, 3, 4], "mean": [0.0], "spread": [1.0]},
    "text_length": 5,
    "fps": 8.0,
    "source": {"name": "test"},
    "cond_images": False,
}


def write_folder(folder, numbers, shard_size=4, schema=DataManifest, **content):
    """A folder of made records with a manifest; for the other tests of this room too."""
    made = [make(n) for n in numbers]
    shards = [made[i : i + shard_size] for i in range(0, len(made), shard_size)]
    names = [records.shard_name("data", i, len(shards)) for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        records.write_shard(folder / name, shard)
    return manifest.write(folder, schema, names, "hash", clips=len(made), **(CONTRACT | content))


def assert_equal(a: Record, b: Record) -> None:
    for field in dataclasses.fields(Record):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y


def test_a_record_comes_back_as_it_was():
    for number in range(4):
        for cluster in (None, 0, 7):
            record = make(number, cluster)
            assert_equal(records.decode_record(records.encode_record(record)), record)


def test_equal_records_and_shards_are_equal_to_the_byte(tmp_path):
    assert records.encode_record(make(1)) == records.encode_record(make(1))
    for name in ("a", "b"):
        records.write_shard(tmp_path / name, map(make, range(9)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_folders_are_read_by_number_in_any_order(tmp_path, elsewhere):
    write_folder(tmp_path / "a", range(10))
    write_folder(tmp_path / "b", range(10, 13))
    both = records.read_records([tmp_path / "a", tmp_path / "b"])
    assert len(both) == 13
    for number in (12, 0, 9, 10, 4):
        assert_equal(both[number], make(number))
    assert_equal(both[-1], make(12))
    assert [record.id for record in both[8:11]] == ["clip-008", "clip-009", "clip-010"]
    assert [record.id for record in both] == [f"clip-{n:03d}" for n in range(13)]
    with pytest.raises(IndexError):
        both[13]
    assert_equal(elsewhere(operator.getitem, records.read_records(str(tmp_path / "a")), 3), make(3))


def test_copies_are_the_chosen_records_with_their_cluster(tmp_path):
    written = write_folder(tmp_path / "data", range(12))
    names = records.copy_records(tmp_path / "data", [7, 1, 10, 4, 2], [1, 0, 1, 0, 0], tmp_path / "out", shard_size=2)
    assert names == [*(f"clips-0000{i}-of-00003.array_record" for i in range(3)), records.TEXT_LENGTHS]
    content = records.data_contract(written)
    assert json.loads(msgspec.json.encode(content)) == CONTRACT
    manifest.write(tmp_path / "out", HeldoutManifest, names, "hash", clips=5, sizes=[3, 2], **content)
    copied = records.read_records(tmp_path / "out")
    for record, number, cluster in zip(copied, (7, 1, 10, 4, 2), (1, 0, 1, 0, 0), strict=True):
        assert_equal(record, make(number, cluster))
    assert records.read_text_lengths(tmp_path / "out").tolist() == [len(record.tokens) for record in copied]
    with pytest.raises(ValueError, match="the numbers must be equal"):
        records.copy_records(tmp_path / "data", [1, 2], [0], tmp_path / "out")


def test_nothing_chosen_makes_one_empty_shard(tmp_path):
    write_folder(tmp_path / "data", range(3))
    names = records.copy_records(tmp_path / "data", [], [], tmp_path / "out")
    manifest.write(tmp_path / "out", HeldoutManifest, names, "hash", clips=0, sizes=[], **CONTRACT)
    assert len(records.read_records(tmp_path / "out")) == 0


def test_only_finished_folders_of_records_are_read(tmp_path):
    records.write_shard(tmp_path / "data-00000-of-00001.array_record", map(make, range(3)))
    with pytest.raises(UserError, match=r"manifest\.json does not exist"):
        records.read_records(tmp_path)
    folder = {"path": "a", "manifest_sha256": "0" * 64}
    networks = {"experts": {"0": folder}, "router": folder | {"path": "b"}}
    manifest.write(tmp_path, EnsembleManifest, [], "hash", sampling={}, clusters=1, **networks)
    with pytest.raises(UserError, match="describes a 'ensemble', where one of data, cluster, heldout"):
        records.read_records(tmp_path)


def test_a_missing_or_cut_shard_is_refused_by_name(tmp_path):
    write_folder(tmp_path, range(8))
    shard = tmp_path / "data-00001-of-00002.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data-00001-of-00002\.array_record has \d+ bytes"):
        records.read_records(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.array_record is missing"):
        records.read_records(tmp_path)


def test_a_disk_that_takes_no_more_leaves_no_shard(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"Cannot write .*shard.*free some space"):
            records.write_shard(tmp_path / "shard", map(make, range(3000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_a_failing_record_is_told_as_it_is_and_leaves_no_shard(tmp_path):
    def failing():
        yield make(0)
        raise ValueError("not about the disk")

    with pytest.raises(ValueError, match="not about the disk"):
        records.write_shard(tmp_path / "shard", failing())
    assert not list(tmp_path.iterdir())


def test_a_flipped_byte_in_a_shard_is_told_with_its_file(tmp_path):
    write_folder(tmp_path, range(8))
    shard = tmp_path / "data-00001-of-00002.array_record"
    whole, refusals = shard.read_bytes(), []
    for at in range(40, len(whole), len(whole) // 60):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            found = list(records.read_records(tmp_path))
        except UserError as error:
            refusals.append(str(error))
        else:  # a byte that nothing reads
            for number, record in enumerate(found):
                assert_equal(record, make(number))
    assert refusals and all("data-00001-of-00002.array_record" in refusal for refusal in refusals)


@pytest.mark.parametrize(
    "text", ["a ball", '"cluster":null,"id":"x', 'a \\",\\"cluster\\":null,\\"id\\":\\" b', "日本\u2028 "]
)
@pytest.mark.parametrize("cluster", [None, 2])
def test_a_record_gets_its_cluster_as_if_it_were_encoded_anew(text, cluster):
    for change in ({"caption": text}, {"id": text}, {"attributes": {text: text}}):
        made = dataclasses.replace(make(0), cluster=cluster, **change)
        for k in (0, 7, 1023):
            expected = records.encode_record(dataclasses.replace(made, cluster=k))
            assert records.with_cluster(records.encode_record(made), k) == expected


def test_large_copies_have_few_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD_SIZE", 2)
    monkeypatch.setattr(records, "MOST_SHARDS", 3)
    clips = [make(n) for n in range(13)]
    records.write_shard(tmp_path / "in" / records.shard_name("data", 0, 1), clips)
    manifest.write(tmp_path / "in", DataManifest, [records.shard_name("data", 0, 1)], "hash", clips=13, **CONTRACT)
    *names, _ = records.copy_records(tmp_path / "in", np.arange(13)[::-1], np.zeros(13, int), tmp_path / "out")
    assert len(names) == 3
    copied = [r for name in names for r in records.read_shard(tmp_path / "out" / name)]
    assert [r.id for r in copied] == [r.id for r in clips[::-1]]


def test_more_shards_than_open_files_are_allowed_for_or_refused(monkeypatch):
    limits, asked = (100, 5000), []
    monkeypatch.setattr(records.resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(records.resource, "setrlimit", lambda which, pair: asked.append(pair))
    records._allow_open_files(1000)
    assert asked == [(1000 + records.SPARE_FILES, 5000)]
    with pytest.raises(UserError, match=r"9000 shards are more than the 5000 files .* raise the limit"):
        records._allow_open_files(9000)
