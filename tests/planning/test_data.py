"""`plan --data`: the time of `prepare` from measured rates."""

import json

import pytest

from paris_jax import cli
from paris_jax.config.experiment import Experiment
from paris_jax.data.sources.clip import Dropped
from paris_jax.data.sources.shapes import ShapesSource
from paris_jax.data.sources.source import Source
from paris_jax.errors import UserError
from paris_jax.planning.data import Rates, _spread, measure


@pytest.fixture
def experiment(micro):
    values = micro.to_dict()
    values["data"]["num_clips"] = 500
    return Experiment.from_config(values)


class Videos(Source):
    """Items of `clips_per_item` shapes each; every `broken`th is a broken file."""

    isolated = False

    def __init__(self, experiment, items=60, clips_per_item=3, broken=2):
        data = experiment.data
        sizes = data.num_frames, data.height, data.width, data.fps
        self.shapes = ShapesSource(0, items * clips_per_item, *sizes)
        self.items, self.clips_per_item, self.broken, self.visited = items, clips_per_item, broken, []

    def __len__(self):
        return self.items

    def videos(self, index):
        self.visited.append(index)
        if index % self.broken == 0:
            yield Dropped(str(index), "read", "is broken")
            return
        for part in range(self.clips_per_item):
            yield from self.shapes.videos(self.clips_per_item * index + part)

    def item(self, index):
        return self.shapes.item(index)

    def describe(self):
        return {}


def test_the_slower_of_decoding_and_encoding_decides_and_workers_divide():
    rates = Rates(clips=7200, decode=2.0, encode=10.0, dropped=0.0)
    assert rates.seconds(1, 1) == 3600 and rates.seconds(1, 4) == 900
    assert rates.seconds(1, 8) == 720 and rates.seconds(4, 8) == 180


def test_clips_and_losses_are_extrapolated_from_a_sample_of_all_items(experiment):
    source = Videos(experiment)
    found = measure(experiment, seconds=0.0, clips=source)
    assert len(source.visited) < 60 and max(source.visited) > 40  # a part, from all over the source
    assert found.clips == pytest.approx(90, abs=15) and found.dropped == pytest.approx(0.25, abs=0.06)
    assert found.decode > 0 and found.encode > 0


@pytest.mark.parametrize("items", [1, 2, 7, 60, 97])
def test_every_item_is_visited_once(items, experiment):
    taken = []
    list(_spread(Videos(experiment, items), taken))
    assert sorted(taken) == list(range(items))


def test_a_source_without_a_usable_clip_is_refused(experiment):
    with pytest.raises(UserError, match="No clip of 60 items of the source can be used"):
        measure(experiment, seconds=0.0, clips=Videos(experiment, broken=1))


def test_the_command_prints_a_time(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "__defaults__", (0.0, None))
    config = tmp_path / "config.py"
    body = f"def get_config():\n    return ConfigDict({experiment.to_dict()!r})\n"
    config.write_text(f"from ml_collections import ConfigDict\n\n\n{body}")
    assert cli.run(["plan", f"--config={config}", "--data", "--decode_workers=2"]) == 0
    assert "500 clips" in capsys.readouterr().out
    assert cli.run(["plan", f"--config={config}", "--data", "--prepare_workers=4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["clips"] == 500 and shown["workers"] == 4 and shown["hours"] > 0
    assert cli.run(["plan", f"--config={config}", "--data", "--prepare_workers=0"]) == 1
