"""What ends a job before its time, in one sentence that says what is kept and what to do."""

import dataclasses
import errno
import re
import types

import jax
import pytest

from paris_jax.artifacts.run_folder import Role
from paris_jax.commands import train as stage
from paris_jax.config.network import NetworkSettings
from paris_jax.errors import DeviceLost, DeviceLostAgain, UserError
from paris_jax.training import distributed, failures, train
from paris_jax.training.checkpoints import Checkpoints
from tests.training.test_train import reclaimed

EXPERT = Role("expert", 0)
FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.\nmore")
FULL_TOO = jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory")
GONE = jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS: ...")


def test_a_network_larger_than_the_memory_is_refused_before_it_is_made(micro, run):
    """The published 11.89B network on this machine: parameters, their average and two moments of float32 each."""
    experiment = dataclasses.replace(micro, network=NetworkSettings(preset="11b"))
    reclaimed(run, experiment)
    with pytest.raises(
        UserError, match=r"expert 0 does not fit: its state and batch take 1[67]\d\.\d\d GiB of each cpu "
    ):
        stage.train(experiment, run, EXPERT)
    assert not run.checkpoints(EXPERT).exists()


@pytest.mark.parametrize(
    "error, sentence",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            r"\(No space left on device\); .* kept: make room or choose",
        ),
        (
            ValueError("tensorstore: Permission denied [os_error_code='13']"),
            r"\(Permission denied\); .*: allow writing",
        ),
        (ValueError("zero-sized array"), r"\(zero-sized array\); earlier ones are kept: remove the cause, then run"),
    ],
    ids=["full", "reported as text", "another"],
)
def test_a_checkpoint_that_cannot_be_written_has_the_remedy_of_its_cause(error, sentence, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    saved = Checkpoints(tmp_path / "checkpoints", keep=1)
    monkeypatch.setattr(saved._manager, "save", fails)
    with pytest.raises(UserError, match=r"^Cannot save the checkpoint of step 7 in .*/checkpoints " + sentence):
        saved.save(7, {}, {}, {})
    saved.close()


@pytest.mark.parametrize(
    "error, kind, sentence",
    [
        (FULL, UserError, r"expert 0 does not fit \(RESOURCE_EXHAUSTED: Out of memory .* 99 bytes\.\); the checkpoint "
         r"of step 4 is kept: lower training.global_batch_size=4, raise training.grad_accum_steps=1, set "
         r"network.remat=full, or share"),
        (FULL_TOO, UserError, r"expert 0 does not fit \(INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: .*\); the checkpoint of "),
        (GONE, DeviceLost, r"expert 0 lost a device .* \(INTERNAL: CUDA_ERROR.*\); its finished checkpoints are kept$"),
    ],
    ids=["memory", "driver's memory", "device"],
)  # fmt: skip
def test_a_device_error_becomes_a_sentence_and_the_job_resumes(error, kind, sentence, micro, run, trained, monkeypatch):
    real, seen = train.sharding.place_batch, []

    def fails_at_the_seventh_step(batch, mesh):
        seen.append(batch)
        if len(seen) == 7:
            raise error
        return real(batch, mesh)

    monkeypatch.setattr(train.sharding, "place_batch", fails_at_the_seventh_step)
    with pytest.raises(kind, match=sentence):
        stage.train(micro, run, EXPERT)
    monkeypatch.undo()
    stage.train(micro, run, EXPERT)
    exports = [(r.export(EXPERT) / "model.safetensors").read_bytes() for r in (run, trained)]
    assert exports[0] == exports[1]


def test_a_device_lost_again_and_again_at_one_place_is_no_accident(micro, run, monkeypatch):
    def fails(batch, mesh):
        raise GONE

    monkeypatch.setattr(train.sharding, "place_batch", fails)
    kinds = []
    for _ in range(4):
        with pytest.raises(DeviceLost) as lost:
            stage.train(micro, run, EXPERT)
        kinds.append(lost.type)
        if lost.type is DeviceLostAgain:
            assert "lost its device 3 times without a new checkpoint in between (INTERNAL: CUDA_ERROR" in str(
                lost.value
            )
            assert "run the same command again" in str(lost.value)
    assert kinds == [DeviceLost, DeviceLost, DeviceLostAgain, DeviceLost]  # then somebody has looked at it
    (run.role(EXPERT) / "lost.json").write_text("damaged")
    with pytest.raises(DeviceLost):
        stage.train(micro, run, EXPERT)


def test_an_unexpected_error_names_its_step_and_clips(micro, run, monkeypatch):
    real, seen = train.sharding.place_batch, []

    def fails_at_the_third_step(batch, mesh):
        seen.append(batch)
        if len(seen) == 3:
            raise RuntimeError("no one knows why")
        return real(batch, mesh)

    monkeypatch.setattr(train.sharding, "place_batch", fails_at_the_third_step)
    with pytest.raises(RuntimeError, match="no one knows why") as error:
        stage.train(micro, run, EXPERT)
    (note,) = error.value.__notes__
    assert re.fullmatch(r"expert 0 ended in, or next to, step 2, whose clips are \S+, \S+, \S+, \S+", note)


GLOO = "UNKNOWN: Gloo AllGather failed: ... Connection reset by peer"


@pytest.mark.parametrize(
    "error, alone, together",
    [
        (GONE, True, True),
        (FULL_TOO, False, False),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: the TPU worker is gone"), True, True),
        (jax.errors.JaxRuntimeError(GLOO), False, True),
        (ValueError(GLOO), False, True),
        (TimeoutError("Timed out while waiting for async_write_complete barrier."), False, True),
        (jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel"), False, False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes differ"), False, False),
        (FileNotFoundError(2, "No such file", "/data/barrier_reef"), False, False),
        (OSError(28, "No space left on device"), False, False),
    ],
)
def test_lost_devices_are_distinguished_from_mistakes(error, alone, together, monkeypatch):
    assert distributed.is_device_lost(error) is alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert distributed.is_device_lost(error) is together


def test_the_memory_limit_is_read_from_the_device():
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 2**30}, device_kind="GPU")
    program = types.SimpleNamespace(
        mesh=types.SimpleNamespace(local_devices=[device]), job=types.SimpleNamespace(name="router")
    )
    for needed in (2**30, 2**31):
        program.argument_bytes = lambda needed=needed: needed
        if needed > 2**30:
            with pytest.raises(
                UserError, match=r"router does not fit: .* 2\.00 GiB of each GPU and there are 1\.00 GiB"
            ):
                failures.check_memory(program)
        else:
            failures.check_memory(program)
