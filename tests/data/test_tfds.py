"""TensorFlow Datasets as a source: a builder of our own, and the data that tfds itself mocks; without TensorFlow."""

import sys
from pathlib import Path

import numpy as np
import pytest

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.config.experiment import Experiment
from paris_jax.config.sections import DataSettings
from paris_jax.data import records
from paris_jax.data.preparation import prepare
from paris_jax.data.shards import decode
from paris_jax.data.sources import tfds as module
from paris_jax.data.sources.clip import Clip, Dropped
from paris_jax.data.sources.tfds import TfdsSource
from paris_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")
ROWS, COLUMNS = 20, 24


def example(number: int) -> dict:
    frames = np.full((18 if number else 5, ROWS, COLUMNS, 3), 10 * number, np.uint8)
    return {"video": frames, "text": f"number {number}", "label": number % 2, "other": {"gray": frames[:8, ..., :1]}}


class Numbers(tfds.core.GeneratorBasedBuilder):
    """Videos of one gray level each; the first is too short."""

    VERSION = tfds.core.Version("1.0.0")

    @classmethod
    def _get_pkg_dir_path(cls):
        return Path(__file__).parent

    def _info(self):
        features = {
            "video": tfds.features.Tensor(shape=(None, ROWS, COLUMNS, 3), dtype=np.uint8),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["even_number", "odd"]),
            "other": {"gray": tfds.features.Tensor(shape=(None, ROWS, COLUMNS, 1), dtype=np.uint8)},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(6):
            yield number, example(number)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    builder = Numbers(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def settings(path: str, **data) -> DataSettings:
    return DataSettings(source="tfds", path=path, height=16, width=16, num_clips=0, **data)


def read(source: TfdsSource) -> list[Clip | Dropped]:
    return list(decode(video for index in range(len(source)) for video in source.videos(index)))


def test_a_builder_is_prepared_as_any_other_source(built, tmp_path):
    data = {"source": "tfds", "path": built, "num_clips": 0, "max_dropped_share": 0.2}
    run = RunFolder(tmp_path / "run")
    prepare(Experiment.from_config({"data": data}), run, decoders=2, shard_size=4)
    found = manifest.read(run.data, DataManifest, verify=True)
    assert found.clips == 10  # two clips of 8 frames from 18, five times
    assert found.source == {"name": "tfds", "builder": "numbers-1.0.0", "split": "train", "examples": 6}
    assert [(kind.reason, kind.count) for kind in found.dropped] == [("is shorter than one clip", 1)]
    stored = list(records.read_records(run.data))
    assert {record.caption for record in stored} == {f"number {number}" for number in range(1, 6)}
    assert {record.attributes["label"] for record in stored} == {"even_number", "odd"}
    assert len({record.id for record in stored}) == 10


def test_clips_are_consecutive_frames_scaled_to_size(built):
    clips = [item for item in read(TfdsSource.open(settings(built))) if isinstance(item, Clip)]
    assert all(clip.video.shape == (8, 16, 16, 3) for clip in clips)
    for clip in clips:
        assert (clip.video == 10 * int(clip.caption.split()[1])).all()


def test_a_caption_may_come_from_classes_by_template(built):
    source = TfdsSource.open(settings(built, caption_template="a video of an {label}, {text}"))
    captions = {item.caption for item in read(source) if isinstance(item, Clip)}
    assert "a video of an even number, number 2" in captions and "a video of an odd, number 3" in captions
    source = TfdsSource.open(settings(built, caption_column="label", video_column="other.gray"))
    items = [item for item in read(source) if isinstance(item, Clip)]
    assert {item.caption for item in items} == {"even number", "odd"}
    assert all(item.video.shape == (8, 16, 16, 3) for item in items)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"video_column": "none"}, r"data\.video_column='none': .* has no such feature; it has .*other\.gray"),
        ({"caption_column": "none"}, r"data\.caption_column='none': .* has no such feature"),
        ({"caption_template": "{none}"}, r"has no feature 'none'; it has label, other.gray, text, video"),
        ({"split": "validation"}, r"data\.split='validation': cannot be read .*tfds build"),
    ],
)
def test_features_that_are_not_there_are_refused_by_name(built, data, message):
    with pytest.raises(UserError, match=message):
        TfdsSource.open(settings(built, **data))


def test_unknown_and_unprepared_builders_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="knows no such builder"):
        TfdsSource.open(settings("no_such_builder"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"tfds build bair_robot_pushing_small --file_format=array_record"):
        TfdsSource.open(settings("bair_robot_pushing_small"))


def test_a_builder_that_needs_tensorflow_says_which_extra(monkeypatch):
    if "tensorflow" in sys.modules or __import__("importlib").util.find_spec("tensorflow"):
        pytest.skip("TensorFlow is installed")
    with pytest.raises(UserError, match=r"needs a package that is missing .*paris-jax\[tfds\]"):
        TfdsSource.open(settings("ucf101"))


def test_the_robot_videos_that_tfds_mocks_are_read():
    module._examples.cache_clear()
    with tfds.testing.mock_data(num_examples=3):
        with pytest.raises(UserError, match=r"several features \(image_aux1, image_main\) may be the video"):
            TfdsSource.open(settings("bair_robot_pushing_small", caption_template="a robot arm pushes things"))
        features = {"video_column": "image_main", "caption_template": "a robot arm pushes things"}
        source = TfdsSource.open(settings("bair_robot_pushing_small", **features))
        items = read(source)
    module._examples.cache_clear()
    assert len(items) == 9  # three clips of 8 frames from 30, three times
    for item in items:
        assert isinstance(item, Clip) and item.caption == "a robot arm pushes things"
        assert item.video.shape == (8, 16, 16, 3) and item.video.std() > 10
