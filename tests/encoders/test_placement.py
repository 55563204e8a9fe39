"""Published encoders on several devices, batch by batch, read late and dropped early."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from paris_jax.artifacts.tensors import Tensors
from paris_jax.encoders import codecs, features, placement, published, t5
from paris_jax.ensemble.conditioning import PromptEncoder
from paris_jax.errors import UserError
from paris_jax.weights.reading import Later, Reader, stacked
from tests.conftest import QUICK
from tests.oracles import encoders as oracle

ROOT = Path(__file__).parents[2]
TEXTS = [f"a {size} {colour} circle" for size in ("small", "large", "striped") for colour in ("red", "blue", "grey")]
FOLDERS = {name: str(oracle.FOLDER / name) for name in ("t5", "clip", "dinov2", "hunyuan")}


def both(store=None):
    store = store or published.EncoderStore()
    return published.T5Clip(t5=FOLDERS["t5"], clip=FOLDERS["clip"], max_tokens=96, store=store)


def everything() -> dict[str, np.ndarray]:
    """Nine texts, five clips and three latents through every encoder."""
    rng = np.random.default_rng(0)
    videos = rng.integers(0, 256, (5, 5, 16, 24, 3), np.uint8)
    codec = codecs.codec("hunyuan", time=4, height=8, width=8, weights=FOLDERS["hunyuan"])
    found = {f"tokens {i}": e.tokens for i, e in enumerate(both().encode(TEXTS))}
    found["pooled"] = np.stack([e.pooled for e in both().encode(TEXTS)])
    found["latent"] = codec.encode(videos)
    found["video"] = codec.decode(found["latent"][:3])
    found["feature"] = features.features("dinov2", FOLDERS["dinov2"])(videos)
    return found


ON_FOUR = """
import jax, numpy as np, safetensors.numpy
from paris_jax.encoders import placement, published
from paris_jax.models import sharding_rules
from tests.encoders import test_placement

assert jax.device_count() == 4
sharding_rules.SMALLEST_SPLIT = 64
published.SIDE = 28
safetensors.numpy.save_file(test_placement.everything(), "OUT")
config, params = published.EncoderStore().load("t5", test_placement.FOLDERS["t5"])
mlp, token, scale = params["blocks"]["mlp"]["in"]["weight"], params["tokens"], params["blocks"]["norm1"]["weight"]
for array, whole in ((mlp, False), (token, False), (scale, True)):
    share = array.addressable_shards[0].data.size / array.size
    assert share == (1 if whole else 0.25), (array.shape, share)
(rows,) = placement.rows(np.zeros((9, 2)))
assert rows.shape == (16, 2) and rows.addressable_shards[0].data.shape == (4, 2)
"""


def test_four_devices_share_weights_and_rows_and_find_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "SIDE", 28)
    flags = f"--xla_force_host_platform_device_count=4 {QUICK}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = ON_FOUR.replace("OUT", str(tmp_path / "found"))
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = safetensors.numpy.load_file(tmp_path / "found"), everything()
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # texts are rounded to bfloat16, where the last digit may fall otherwise
        tolerance = {"rtol": 0.02, "atol": 0.02} if name[0] in "tp" else {"rtol": 1e-4, "atol": 1e-4}
        np.testing.assert_allclose(found[name], value, **tolerance, err_msg=name)


def test_texts_are_stored_at_their_true_length_in_bfloat16():
    encoder = both()
    assert encoder.stored == ml_dtypes.bfloat16
    for encoding in encoder.encode(TEXTS[:3]):
        assert len(encoding.tokens) < 20
        for values in (encoding.tokens, encoding.pooled):
            np.testing.assert_array_equal(values.astype(encoder.stored).astype(np.float32), values)


def test_rows_are_filled_up_to_few_numbers():
    assert [len(placement.rows(np.zeros((n, 1)))[0]) for n in (1, 2, 3, 5, 9, 16)] == [1, 2, 4, 8, 16, 16]
    (rows,) = placement.rows(np.arange(3))
    assert rows.tolist() == [0, 1, 2, 2]


def test_arrays_are_read_when_they_are_wanted_and_one_at_a_time():
    read = []

    def later(name: int) -> Later:
        return Later((2, 3), lambda dtype: (read.append(name), np.full((2, 3), name, dtype))[1])

    tree = stacked([{"a": {"w": later(0)}}, {"a": {"w": later(1)}}])
    part = later(2)[1:].transpose(1, 0)
    assert (tree["a"]["w"].shape, part.shape, read) == ((2, 2, 3), (3, 1), [])
    assert tree["a"]["w"].read(np.float16).dtype == np.float16 and read == [0, 1]
    np.testing.assert_array_equal(part.read(np.float32), np.full((3, 1), 2))


def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path):
    safetensors.numpy.save_file({"a.weight": np.array([1, np.nan], np.float32)}, tmp_path / "w.safetensors")
    reader = Reader(Tensors(tmp_path))
    later = reader.take("a.weight", (2,))
    reader.done()
    with pytest.raises(UserError, match=r"a\.weight holds values that are not finite; download it again"):
        later.read(np.float32)


def arrays_of(kind: str) -> int:
    """How many arrays of an encoder live on the devices: those of its largest shape."""
    _, params = published.READERS[kind](FOLDERS[kind])
    largest = max((leaf.shape for leaf in jax.tree.leaves(params)), key=np.prod)
    return sum(array.shape == largest for array in jax.live_arrays())


def test_dropped_encoders_are_gone_and_prompts_are_remembered(monkeypatch):
    before = arrays_of("t5")
    kept = both()
    staying, unloading = PromptEncoder(kept, 40, unload=False), PromptEncoder(both(), 40, unload=True)
    expected = staying(TEXTS[:2])
    assert arrays_of("t5") > before
    kept.unload()
    assert arrays_of("t5") == before
    unloading.prefetch(TEXTS[:2])
    assert arrays_of("t5") == before
    monkeypatch.setattr(published.EncoderStore, "load", lambda self, kind, *_: pytest.fail(f"{kind} is read again"))
    found = unloading(TEXTS[:2])
    for name in ("tokens", "length", "pooled"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert unloading(TEXTS[1:2]).length.tolist() == expected.length.tolist()[1:]


def test_encoders_are_dropped_when_a_prompt_is_refused_too():
    store = published.EncoderStore()
    both(store).encode(TEXTS[:1])
    with pytest.raises(UserError, match="is empty"):
        PromptEncoder(both(store), 40, unload=True)(["a ball", " "])
    assert not store.kinds


def test_what_one_store_drops_stays_in_the_others(monkeypatch):
    mine, yours = both(), both()
    expected = mine.encode(TEXTS[:1])[0].tokens
    yours.encode(TEXTS[:1])
    yours.unload()
    assert mine.store.kinds == ["t5", "clip"] and not yours.store.kinds
    monkeypatch.setattr(published, "READERS", {})  # nothing is read again
    np.testing.assert_array_equal(mine.encode(TEXTS[:1])[0].tokens, expected)


def test_weights_that_change_under_the_same_path_are_noticed(tmp_path):
    folder = shutil.copytree(FOLDERS["t5"], tmp_path / "t5")
    encoder = published.T5Clip(t5=str(folder), clip=FOLDERS["clip"], max_tokens=96)
    encoder.encode(TEXTS[:1])
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    weights["shared.weight"] = weights["shared.weight"] + 1
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"its weights have the hash .* this data was made with"):
        encoder.encode(TEXTS[:1])
    other = published.T5Clip(t5=str(folder), clip=FOLDERS["clip"], max_tokens=96, store=encoder.store)
    assert other.weights["t5"] != encoder.weights["t5"]


def test_many_texts_are_worked_on_a_few_at_a_time(monkeypatch):
    sizes, run = [], t5.encode
    monkeypatch.setattr(
        t5, "encode", lambda config, params, ids, *rest: (sizes.append(len(ids)), run(config, params, ids, *rest))[1]
    )
    made = both().encode(TEXTS * 3)
    assert len(made) == 27 and sizes == [16, 16]  # 11 are filled up
    np.testing.assert_allclose(made[20].tokens, both().encode([TEXTS[2]])[0].tokens, atol=0.02)


def test_only_what_is_asked_for_is_dropped():
    store = published.EncoderStore()
    both(store).encode(TEXTS[:1])
    store.drop("t5")
    assert store.kinds == ["clip"]
    assert list(store.load("clip", FOLDERS["clip"])[1]) == ["text"]  # the vision tower is not loaded
