"""Fields are declared once: docs, flags and checks follow, and the names of choices are those that the code knows."""

import dataclasses
from typing import get_args

import pytest

from paris_jax import cli
from paris_jax.config import network, sampling, sections, training
from paris_jax.config.experiment import Experiment
from paris_jax.config.fields import describe_range
from paris_jax.config.reference import PAGE, markdown
from paris_jax.config.sampling import SamplingParams

SECTIONS = {
    field.name: getattr(Experiment(), field.name)
    for field in dataclasses.fields(Experiment)
    if dataclasses.is_dataclass(getattr(Experiment(), field.name))
}


def test_the_page_of_all_fields_is_up_to_date():
    """Otherwise: python -m paris_jax.config.reference."""
    assert PAGE.read_text() == markdown()


@pytest.mark.parametrize("section", [*SECTIONS.values(), SamplingParams()], ids=lambda s: type(s).__name__)
def test_every_field_has_a_help_and_a_default_inside_its_range(section):
    for field in dataclasses.fields(section):
        assert field.metadata["help"], field.name
        if choices := field.metadata["choices"]:
            assert field.default in choices, field.name
        assert describe_range(field) or field.type not in (int, float) or not field.metadata["bounds"]
    assert not list(section.problems())


def test_the_names_of_choices_are_those_that_the_code_knows():
    from paris_jax.diffusion.predictions import PREDICTIONS
    from paris_jax.diffusion.solvers import SOLVERS
    from paris_jax.encoders.text import NAMES
    from paris_jax.ensemble.routing import RULES
    from paris_jax.models.blocks import REMAT

    assert get_args(sampling.Solver) == tuple(SOLVERS)
    assert {*get_args(sampling.RoutingRule), "fixed"} == set(RULES)
    assert get_args(training.PredictionType) == tuple(PREDICTIONS)
    assert get_args(network.Remat) == tuple(REMAT)
    assert get_args(sections.TextEncoderName) == NAMES


def test_print_config_prints_every_field_and_writes_no_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(cli.__file__.rpartition("/paris_jax/")[0])
    changed = ["--config=configs/shapes.py:tiny", "--config.training.steps=77", f"--workdir={tmp_path}/run"]
    assert cli.run(["train", *changed, "--print_config"]) == 0
    out = capsys.readouterr().out
    assert "training.steps = 77 " in out
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            assert f"{name}.{field.name} = " in out
    assert not (tmp_path / "run").exists()
    assert cli.run(["train", *changed, "--config.training.stepz=1", "--print_config"]) == 1
