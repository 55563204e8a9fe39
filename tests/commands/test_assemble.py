"""`paris-jax assemble` waits for roles that are still training, and not for ever."""

import logging
import shutil
import threading
import time

import pytest

from paris_jax.artifacts.run_folder import Role
from paris_jax.commands import assemble as module
from paris_jax.commands.assemble import assemble
from paris_jax.errors import UserError


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.05)


def test_it_waits_until_the_last_role_is_exported(micro, finished, caplog):
    export = finished.export(Role("expert", 1))
    shutil.rmtree(finished.ensemble)
    shutil.move(export, finished.path / "later")
    threading.Timer(0.5, lambda: shutil.move(finished.path / "later", export)).start()
    with caplog.at_level(logging.INFO):
        assemble(micro, finished, wait=60)
    assert "waiting for expert 1, for 60 s at most" in caplog.text
    assert "holds 3 experts and the router" in caplog.text


def test_after_the_time_out_it_goes_on_without_an_expert_if_it_may(micro, finished, caplog):
    shutil.rmtree(finished.export(Role("expert", 1)))
    began = time.monotonic()
    with pytest.raises(UserError, match="Expert 1 is not trained"):
        assemble(micro, finished, wait=0.3)
    assert time.monotonic() - began >= 0.3
    with caplog.at_level(logging.INFO):
        assemble(micro, finished, allow_missing=True, wait=0.3)
    assert "holds 2 experts and the router, without expert 1" in caplog.text


def test_nothing_is_waited_for_where_all_are_there(micro, finished):
    began = time.monotonic()
    assemble(micro, finished, wait=3600)
    assert time.monotonic() - began < 60


def test_an_expert_from_elsewhere_is_not_waited_for(micro, finished, trained):
    shutil.rmtree(finished.export(Role("expert", 2)))
    assemble(micro, finished, elsewhere={2: trained.export(Role("expert", 2))}, wait=3600)
