"""What notebooks share: runtime, sources of ensembles, pages, downloads. Captions of strangers stay text."""

import json
import re
import shutil
import zipfile

import numpy as np
import pytest

from paris_jax.artifacts import ensemble_manifest
from paris_jax.artifacts.run_folder import Role
from paris_jax.config.sampling import SamplingParams
from paris_jax.ensemble.samples import Samples, compare
from paris_jax.errors import UserError
from paris_jax.local_jobs.devices import Devices
from paris_jax.models import precision
from paris_jax.notebooks import download, runtime, show, sources, training
from tests.evaluation.browser import browse, needs_browser

HOSTILE = "<script>document.documentElement.dataset.hurt=1</script><img src=x onerror=document.title='hurt'> $\\frac$"


@pytest.mark.parametrize(
    ("device", "kind", "dtype", "said"),
    [
        (("cpu", ""), "CPU", "float32", "published networks and larger videos need a GPU or TPU"),
        (("gpu", "7.5"), "GPU", "float32", "compute_dtype='float16'"),
        (("gpu", "8.0"), "GPU", "bfloat16", "The first call of each shape"),
        (("tpu", ""), "TPU", "bfloat16", "The first call of each shape"),
    ],
)
def test_a_runtime_says_its_dtype_its_attention_and_what_is_slow(monkeypatch, device, kind, dtype, said):
    monkeypatch.setattr(precision, "current_device", lambda: device)
    found = runtime.describe()
    assert (found.kind, found.dtype) == (kind, dtype)
    assert said in found.slow
    assert (found.attention == "flash attention") == (device in [("gpu", "8.0"), ("tpu", "")])
    assert ("needs compute capability 8.0" in found.attention) == (device == ("gpu", "7.5"))
    for text in (repr(found), found._repr_html_()):
        assert f"{kind} runtime" in text and dtype in text


def test_a_runtime_names_the_memory_of_this_machine():
    found = runtime.describe()
    assert found.memory > 2**29
    assert f"{found.memory / 2**30:.1f} GiB" in repr(found)


def test_a_runtime_that_leaves_its_accelerator_idle_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "find_devices", lambda _: Devices("gpu", ("0",)))
    with pytest.raises(UserError, match=r"This machine has a GPU, and JAX \S+ does not see it"):
        runtime.describe()


def test_ensembles_are_found_where_they_are(tmp_path):
    shutil.copytree(ensemble_manifest.BUNDLED_FOLDER / "shapes", tmp_path / "mine")
    assert sources.find_ensemble("bundled", "shapes") == "bundled:shapes"
    assert sources.find_ensemble("local", str(tmp_path / "mine")) == str(tmp_path / "mine")


def test_an_ensemble_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached, commit = tmp_path / "models--owner--shapes", "0" * 40
    shutil.copytree(ensemble_manifest.BUNDLED_FOLDER / "shapes", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert sources.find_ensemble("hub", "owner/shapes") == str(cached / "snapshots" / commit)
    with pytest.raises(UserError, match=r"owner/other cannot be downloaded from the hub"):
        sources.find_ensemble("hub", "owner/other")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("bundled", "shape", r"There is no 'bundled:shape' in this package; it ships bundled:shapes"),
        ("bundle", "shapes", r"kind='bundle': must be one of bundled, local, bucket, hub \(did you mean 'bundled'"),
        ("local", "nowhere", r"There is no ensemble at 'nowhere'"),
        ("local", "gs://bucket/x", r"is not a local folder; choose kind 'bucket'"),
        ("bucket", "bucket/x", r"is not a bucket; name it as gs://"),
        ("hub", "shapes", r"'shapes' is no folder of the hub; name it as OWNER/NAME"),
    ],
)
def test_an_ensemble_that_is_not_there_is_refused_with_advice(kind, name, message):
    with pytest.raises(UserError, match=message):
        sources.find_ensemble(kind, name)


class Fake:
    """An ensemble as far as its settings go."""

    params = SamplingParams()


def samples(prompts):
    return Samples(np.zeros((len(prompts), 4, 8, 8, 3), np.float32), prompts, 8.0, np.ones((3, len(prompts), 1)), [0])


def test_a_download_names_no_folder_and_keeps_pictures_and_all_parameters(tmp_path):
    shutil.copytree(ensemble_manifest.BUNDLED_FOLDER / "shapes", tmp_path / "home" / "mine")
    picture = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    source = str(tmp_path / "home" / "mine")
    packed = download.pack(
        tmp_path / "out.zip", Fake(), source, samples([HOSTILE]), {"seed": 7, "top_k": 2, "image": picture}
    )
    with zipfile.ZipFile(packed) as archive:
        assert "image.png" in archive.namelist()
        text = archive.read("settings.json").decode()
    made = json.loads(text)
    assert str(tmp_path) not in text
    assert made["ensemble"] == "mine" and re.fullmatch(r"[0-9a-f]{64}", made["manifest_sha256"])
    assert made["prompts"] == [HOSTILE]
    assert made["params"].keys() == SamplingParams.__dataclass_fields__.keys()
    assert (made["params"]["seed"], made["params"]["top_k"], made["params"]["image"]) == (7, 2, "image.png")


def test_what_cannot_be_kept_is_refused_before_writing(tmp_path):
    with pytest.raises(UserError, match=r"out\.tar has the ending '\.tar'"):
        download.pack(tmp_path / "out.tar", Fake(), "bundled:shapes", samples(["a"]), {})
    with pytest.raises(UserError, match=r"video cannot be kept in settings\.json"):
        download.pack(tmp_path / "out.zip", Fake(), "bundled:shapes", samples(["a"]), {"video": np.zeros((4, 8, 8, 3))})
    with pytest.raises(UserError, match="image must be one picture"):
        download.pack(tmp_path / "out.zip", Fake(), "bundled:shapes", samples(["a"]), {"image": "/etc/passwd"})
    assert not list(tmp_path.iterdir())


def test_losses_are_drawn_while_there_are_none_and_once_there_are(micro):
    roles = [Role("expert", 0), Role("expert", 1)]
    lines = [{"step": 4, "loss": 1.0, "seconds_per_step": 0.1}, {"step": 12, "loss": 0.5, "seconds_per_step": 0.1}]
    for found in ([[], []], [lines[:1], []], [lines, lines[:1]]):
        assert training.figure(micro, roles, found).startswith(b"\x89PNG")
    assert training._state([], 12) == "waiting, or compiling"
    assert training._state(lines[:1], 12) == "step 4 of 12, loss 1.000, 1 s left"
    assert training._state(lines, 12) == "done, loss 0.500"


def test_a_page_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="There is no page at"):
        show.page(tmp_path / "report.html")


@needs_browser
@pytest.mark.slow
def test_captions_with_script_stay_text_in_notebooks(tmp_path):
    """Every kind of output of the notebooks, in one page, as a notebook puts them into its own."""
    hostile = samples([HOSTILE])
    inner = tmp_path / "report.html"
    inner.write_text("<script>parent.document.documentElement.dataset.hurt=2</script><p>a page of a run</p>")
    outputs = [
        hostile._repr_html_(),
        compare({HOSTILE: hostile})._repr_html_(),
        show.gallery(hostile.pixels(), [HOSTILE], 8.0)._repr_html_(),
        show.page(inner)._repr_html_(),
    ]
    settled = "<script>setTimeout(() => document.documentElement.dataset.settled = 1, 1500)</script>"
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<html><title>fine</title><body>{''.join(outputs)}{settled}</body></html>")
    visit = browse(notebook)
    assert visit.data == {"settled": "1"}
    assert not [address for address in visit.asked if address.endswith("/x")]
    assert hostile.plot_routing().get_axes()[0].get_title().startswith("<script>")  # drawn, not parsed as a formula
    hostile.plot_routing().savefig(tmp_path / "routing.png")
