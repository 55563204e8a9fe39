"""The input of training: the same batches whatever happens around them."""

import itertools
import json

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.schemas import ClusterManifest
from paris_jax.data import loader, records
from paris_jax.data.loader import bucket_lengths, training_batches
from paris_jax.data.records import Record
from paris_jax.errors import UserError

SCALE = {"shape": [1, 2, 2, 3], "mean": [0.5], "spread": [2.0]}


def write_cluster(folder, cluster: int, clips: int, **content) -> None:
    """Clip n of cluster k has the latent 100 k + n everywhere and 1 + n % 3 tokens."""
    made = [
        Record(
            id=f"{cluster}-{n}",
            latent=np.full((1, 2, 2, 3), 100 * cluster + n, np.float16),
            tokens=np.full((1 + n % 3, 4), n + 1, np.float16),
            pooled=np.full(4, n, np.float16),
            feature=np.zeros(2, np.float32),
            caption="",
            attributes={},
            cluster=cluster,
        )
        for n in range(clips)
    ]
    name = records.shard_name("clips", 0, 1)
    records.write_shard(folder / name, made)
    described = {
        "codec": {"name": "pixels", "time": 1, "height": 1, "width": 1},
        "text": {"name": "words", "vocabulary": [], "width": 4, "max_tokens": 8},
        "features": {},
        "latent": SCALE,
        "text_length": 3,
        "fps": 8.0,
        "source": {},
    }
    manifest.write(folder, ClusterManifest, [name], "hash", clips=clips, cluster=cluster, **(described | content))


@pytest.fixture
def folders(tmp_path):
    for cluster, clips in enumerate((10, 7, 4)):
        write_cluster(tmp_path / str(cluster), cluster, clips)
    return [tmp_path / str(cluster) for cluster in range(3)]


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def clips(batches) -> list[int]:
    """The clips in the order they came, as 100 cluster + number."""
    return np.concatenate([batch["latent"][:, 0, 0, 0, 0] for batch in batches]).round().astype(int).tolist()


def assert_same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], strict=True)


def test_a_batch_holds_what_a_step_needs(folders):
    batch = next(training_batches(folders[0], batch=4, seed=0))
    kinds = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert kinds == {
        "latent": ((4, 1, 2, 2, 3), "float16"),
        "tokens": ((4, 3, 4), "float16"),
        "length": ((4,), "int32"),
        "pooled": ((4, 4), "float16"),
        "cluster": ((4,), "int32"),
        "index": ((4,), "int32"),
    }
    for row, clip in enumerate(clips([batch])):
        length = 1 + clip % 3
        assert batch["length"][row] == length
        assert (batch["latent"][row] == clip).all()
        assert (batch["tokens"][row, :length] == clip + 1).all()
        assert (batch["tokens"][row, length:] == 0).all()
        assert (batch["pooled"][row] == clip).all()


def test_every_epoch_has_every_clip_once_in_its_own_order(folders):
    seen = clips(take(training_batches(folders[0], batch=4, seed=0), 15))
    epochs = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6


def test_clusters_come_in_natural_proportion_with_their_label(folders):
    batches = take(training_batches(folders, batch=3, seed=1), 14)
    seen = clips(batches)
    assert sorted(seen[:21]) == [*range(10), *range(100, 107), *range(200, 204)]
    assert np.concatenate([b["cluster"] for b in batches]).tolist() == [clip // 100 for clip in seen]
    assert seen[:10] != sorted(seen[:10])


def test_index_is_the_place_in_the_stream(folders):
    batches = take(training_batches(folders, batch=3, seed=1), 9)
    assert np.concatenate([b["index"] for b in batches]).tolist() == list(range(27))


def test_batches_depend_on_the_seed_and_not_on_threads_or_order_of_folders(folders):
    first = take(training_batches(folders, batch=4, seed=3), 12)
    assert_same(first, take(training_batches(folders, batch=4, seed=3, threads=5, read_ahead=9), 12))
    assert_same(first, take(training_batches(folders[::-1], batch=4, seed=3), 12))
    assert clips(first) != clips(take(training_batches(folders, batch=4, seed=4), 12))


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 11])
def test_an_iterator_goes_on_exactly_where_it_was(folders, stop):
    whole = take(training_batches(folders[0], batch=4, seed=3), 14)
    iterator = training_batches(folders[0], batch=4, seed=3)
    assert_same(take(iterator, stop), whole[:stop])
    state = json.loads(json.dumps(iterator.get_state()))  # a checkpoint holds it as JSON
    resumed = training_batches(folders[0], batch=4, seed=3)
    next(resumed)
    resumed.set_state(state)
    assert_same(take(resumed, 14 - stop), whole[stop:])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batches(folders, count):
    whole = take(training_batches(folders, batch=8, seed=3), 6)
    shares = [take(training_batches(folders, 8, 3, process_index=p, process_count=count), 6) for p in range(count)]
    for step, batch in enumerate(whole):
        joined = {key: np.concatenate([share[step][key] for share in shares]) for key in batch}
        assert_same([joined], [batch])


def test_fewer_clips_than_a_batch_is_refused(folders):
    with pytest.raises(
        UserError, match=r"Cluster 2 .* has 4 clips, fewer than one batch of 5; lower training\.global_batch_size"
    ):
        training_batches(folders[2], batch=5, seed=0)
    with pytest.raises(UserError, match="has 21 clips, fewer than one batch of 22"):
        training_batches(folders, batch=22, seed=0)
    assert clips(take(training_batches(folders[2], batch=4, seed=0), 1)) != []


def test_a_batch_that_processes_cannot_share_is_refused(folders):
    with pytest.raises(UserError, match=r"training\.global_batch_size=4: must be a multiple of the 3 processes"):
        training_batches(folders, batch=4, seed=0, process_count=3)


def test_folders_of_two_data_sets_are_refused(folders, tmp_path):
    write_cluster(tmp_path / "other", 3, 5, text_length=7)
    with pytest.raises(UserError, match="differ in text_length"):
        training_batches([*folders, tmp_path / "other"], batch=4, seed=0)


def test_a_folder_alone_is_enough(folders, tmp_path):
    import shutil

    expected = take(training_batches(folders[1], batch=4, seed=0), 5)
    shutil.move(folders[1], tmp_path / "elsewhere")
    for folder in (folders[0], folders[2]):
        shutil.rmtree(folder)
    assert_same(take(training_batches(tmp_path / "elsewhere", batch=4, seed=0), 5), expected)


def test_a_batch_holds_the_arrays_that_the_role_reads_and_no_others(folders):
    fields = ("latent", "pooled", "cluster", "index")
    whole, part = (next(training_batches(folders, batch=4, seed=0, **f)) for f in ({}, {"fields": fields}))
    assert list(part) == list(fields)
    for name in fields:
        np.testing.assert_array_equal(part[name], whole[name])


def copied(tmp_path, lengths) -> str:
    """A cluster folder, as `cluster` writes it, of clips with texts of these lengths; clip n has the latent n."""
    made = [
        Record(f"c-{n}", np.full((1, 2, 2, 3), n, np.float16), np.full((length, 4), n + 1, np.float16),
               np.full(4, n, np.float16), np.zeros(2, np.float32), "", {})
        for n, length in enumerate(lengths)
    ]  # fmt: skip
    write_cluster(tmp_path / "data", 0, 1)
    records.write_shard(tmp_path / "data" / records.shard_name("clips", 0, 1), made)
    described = manifest.read(tmp_path / "data", ClusterManifest)
    content = records.data_contract(described) | {"text_length": max(lengths), "clips": len(made), "cluster": 0}
    manifest.write(tmp_path / "data", ClusterManifest, [records.shard_name("clips", 0, 1)], "hash", **content)
    names = records.copy_records(
        tmp_path / "data", np.arange(len(made)), np.zeros(len(made), int), tmp_path / "copy", 7
    )
    manifest.write(tmp_path / "copy", ClusterManifest, names, "hash", **content)
    return tmp_path / "copy"


LENGTHS = [{4: 5, 11: 8, 19: 7}.get(n, 1 + n % 2) for n in range(23)]


def test_texts_are_padded_to_the_shortest_bucket_that_holds_the_batch(tmp_path):
    folder = copied(tmp_path, LENGTHS)
    whole = take(training_batches(folder, batch=3, seed=1), 40)
    batches = take(training_batches(folder, batch=3, seed=1, text_lengths=(2, 5, 8)), 40)
    assert {batch["tokens"].shape[1] for batch in batches} == {2, 5, 8}
    for batch, full in zip(batches, whole):
        width, longest = batch["tokens"].shape[1], batch["length"].max()
        assert width == min(bucket for bucket in (2, 5, 8) if bucket >= longest)
        np.testing.assert_array_equal(batch["tokens"], full["tokens"][:, :width])
        assert not full["tokens"][:, width:].any()
        assert_same(
            [{k: v for k, v in batch.items() if k != "tokens"}], [{k: v for k, v in full.items() if k != "tokens"}]
        )


def test_processes_choose_the_same_bucket_without_talking_and_after_a_restart(tmp_path):
    folder = copied(tmp_path, LENGTHS)
    whole = take(training_batches(folder, batch=4, seed=1, text_lengths=(2, 5, 8)), 30)
    shares = [
        take(training_batches(folder, 4, 1, process_index=p, process_count=2, text_lengths=(2, 5, 8)), 30)
        for p in range(2)
    ]
    for step, batch in enumerate(whole):
        assert_same([{k: np.concatenate([share[step][k] for share in shares]) for k in batch}], [batch])
    iterator = training_batches(folder, batch=4, seed=1, text_lengths=(2, 5, 8))
    take(iterator, 7)
    resumed = training_batches(folder, batch=4, seed=1, text_lengths=(2, 5, 8))
    resumed.set_state(json.loads(json.dumps(iterator.get_state())))
    assert_same(take(resumed, 23), whole[7:])


def test_bucket_lengths_are_few_and_hold_every_text():
    assert bucket_lengths(512, 4) == (128, 256, 384, 512)
    assert bucket_lengths(77, 1) == (77,)
    assert bucket_lengths(10, 3, multiple=4) == (4, 8, 12)
    assert bucket_lengths(2, 8) == (1, 2)
    assert bucket_lengths(512, 4, shortest=200) == (256, 384, 512)  # the null text has to fit, too


def test_folders_that_do_not_say_how_long_their_texts_are_go_without_buckets(folders):
    assert next(training_batches(folders[0], batch=4, seed=0, text_lengths=(3,)))["tokens"].shape[1] == 3
    with pytest.raises(UserError, match=r"an earlier version wrote it; .*config\.training\.text_buckets=1"):
        training_batches(folders[0], batch=4, seed=0, text_lengths=(2, 3))


def test_worker_processes_give_the_same_batches(folders):
    expected = take(training_batches(folders, batch=4, seed=3), 4)
    iterator = training_batches(folders, batch=4, seed=3, workers=2)
    assert_same(take(iterator, 4), expected)
    iterator.close()


def test_batches_keep_the_sixteen_bits_of_the_records_until_they_are_on_the_device(folders):
    import jax

    from paris_jax.config.training import TrainingSettings
    from paris_jax.training import sharding

    batch = next(training_batches(folders[0], batch=4, seed=0))
    placed = sharding.place_batch(batch, sharding.make_mesh(TrainingSettings(), jax.devices()[:1]))
    assert {name: placed[name].dtype.itemsize for name in ("latent", "tokens", "pooled")} == dict.fromkeys(
        ("latent", "tokens", "pooled"), 2
    )


def test_records_that_all_fit_are_decoded_once_and_others_each_time(folders, monkeypatch):
    decoded = []
    monkeypatch.setattr(
        records, "decode_record", lambda data, real=records.decode_record: decoded.append(1) or real(data)
    )
    kept = loader.KeptRecords(records.Records(folders))
    one = len(decoded)  # whose size decides
    for _ in range(3):
        assert [record.id for record in kept] == [record.id for record in records.Records(folders)]
    assert len(decoded) == one + len(kept) + 3 * len(kept)  # once by the first, each time by the other
    assert kept.__getstate__()["_kept"] == {}  # worker processes get a fresh one
    monkeypatch.setattr(loader, "KEPT_BYTES", 100)
    none = loader.KeptRecords(records.Records(folders))
    decoded.clear()
    assert none[0].id == none[0].id and len(decoded) == 2


def test_records_that_turn_out_longer_than_the_first_are_no_longer_kept(folders, monkeypatch):
    """Record 0 has one token, the others have up to three."""
    source = records.Records(folders)
    monkeypatch.setattr(loader, "KEPT_BYTES", loader._bytes_of(source[0]) * len(source))
    kept = loader.KeptRecords(source)
    assert kept._keeps and kept[0] is kept[0]
    assert [record.id for record in kept] == [record.id for record in source]
    assert not kept._keeps and not kept._kept
