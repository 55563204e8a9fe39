"""A run folder belongs to one config, however many processes come to it at once."""

import threading

import pytest

from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import StoredConfig
from paris_jax.errors import UserError


def test_processes_that_claim_a_folder_together_all_get_it(tmp_path):
    for attempt in range(20):
        run = RunFolder(tmp_path / str(attempt))
        together, failed = threading.Barrier(8), []

        def claims(run=run, together=together, failed=failed):
            together.wait()
            try:
                run.claim({"seed": 1}, "hash")
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=claims) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert run.stored_config().hash == "hash"
        assert [path.name for path in run.path.iterdir()] == ["config.json"]  # nothing unfinished is left


def test_a_folder_of_another_config_is_refused_by_the_fields_that_differ(tmp_path):
    run = RunFolder(tmp_path)
    run.claim({"seed": 1, "training": {"batch": 8, "steps": 10}}, "one")
    run.data.mkdir()
    (run.data / "shard").write_text("made under the first config")
    with pytest.raises(UserError, match=r"different: training\.batch, training\.ema\)"):
        run.claim({"seed": 1, "training": {"batch": 4, "steps": 10, "ema": 0.9}}, "other")
    assert run.stored_config().hash == "one"


def test_a_config_under_which_nothing_was_made_stands_in_nobodys_way(tmp_path):
    run = RunFolder(tmp_path)
    run.claim({"frames": 400}, "one")
    run.data.mkdir()
    run.claim({"frames": 8}, "other")
    assert run.stored_config() == StoredConfig("paris_jax/1", "other", {"frames": 8})
