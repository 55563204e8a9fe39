"""A run folder belongs to one config, also when several processes claim it at the same time."""

import threading

import pytest

from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import StoredConfig
from paris_jax.errors import UserError


def test_concurrent_claims_of_a_folder_all_succeed(tmp_path):
    for attempt in range(20):
        run = RunFolder(tmp_path / str(attempt))
        barrier, errors = threading.Barrier(8), []

        def claim(run=run, barrier=barrier, errors=errors):
            barrier.wait()
            try:
                run.claim({"seed": 1}, "hash")
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=claim) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert run.stored_config().hash == "hash"
        assert [path.name for path in run.path.iterdir()] == ["config.json"]  # no partial file is left


def test_a_folder_of_another_config_is_refused_and_the_differing_fields_are_named(tmp_path):
    run = RunFolder(tmp_path)
    run.claim({"seed": 1, "training": {"batch": 8, "steps": 10}}, "one")
    run.data.mkdir()
    (run.data / "shard").write_text("made under the first config")
    with pytest.raises(UserError, match=r"different: training\.batch, training\.ema\)"):
        run.claim({"seed": 1, "training": {"batch": 4, "steps": 10, "ema": 0.9}}, "other")
    assert run.stored_config().hash == "one"


def test_a_folder_without_results_can_be_claimed_by_another_config(tmp_path):
    run = RunFolder(tmp_path)
    run.claim({"frames": 400}, "one")
    run.data.mkdir()
    run.claim({"frames": 8}, "other")
    assert run.stored_config() == StoredConfig("paris_jax/1", "other", {"frames": 8})
