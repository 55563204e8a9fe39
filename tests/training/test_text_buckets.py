"""Texts padded to few lengths: the same training up to rounding, one compilation for each length, resumable."""

import dataclasses
import json

import jax
import numpy as np

from paris_jax.artifacts import exported
from paris_jax.artifacts.run_folder import Role
from paris_jax.commands.train import train
from paris_jax.training.step import ShardedStep

MONOLITH = Role("monolith")  # its captions have 11 to 14 tokens


def losses(run) -> list[float]:
    lines = [json.loads(line) for line in run.metrics(MONOLITH).read_text().splitlines()]
    return [line["loss"] for line in lines]


def test_buckets_change_neither_clips_nor_noise_and_compile_once_each(micro, run, trained, monkeypatch):
    made_for = dataclasses.replace(micro, training=dataclasses.replace(micro.training, text_buckets=14))
    assert made_for.hash == micro.hash  # a job may go on with another number
    compiled = []
    lower = ShardedStep.lower

    def counted(program, state=None, batch=None):
        if batch is not None:
            compiled.append(batch["tokens"].shape[1])
        return lower(program, state, batch)

    monkeypatch.setattr(ShardedStep, "lower", counted)
    train(made_for, run, MONOLITH)
    assert len(compiled) == len(set(compiled)) <= 4 and len(compiled) > 1
    np.testing.assert_allclose(losses(run), losses(trained), rtol=1e-4)
    found, expected = (jax.tree.leaves(exported.read(each.export(MONOLITH)).params) for each in (run, trained))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
