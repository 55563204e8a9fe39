"""Processes of one job go on from the same checkpoint: the newest that every one of them can read."""

import concurrent.futures
import logging
import multiprocessing
import os
import shutil
from typing import Any, NamedTuple

import numpy as np
import pytest
from etils import epath

from paris_jax.errors import UserError
from tests.conftest import free_address


class State(NamedTuple):
    step: Any
    values: Any


def restored(number: int, address: str, folder: str, damaged: list[str]) -> list[tuple[int | str, Any, str]]:
    """Saves steps 1 to 3 as one of two processes; then what is restored, and logged, after each of `damaged` is."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from paris_jax.training import checkpoints, distributed

    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(number)}
    distributed.join_processes(environment, timeout=60)
    mesh = jax.make_mesh((2,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    shardings = State(NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp")))

    def put(step: int) -> State:
        arrays = State(np.array(step), np.arange(8192.0) * step)
        return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), arrays, shardings)

    saved = checkpoints.Checkpoints(epath.Path(folder), keep=3)
    for step in (1, 2, 3):
        saved.save(step, put(step), {"at": step}, {"trained": step})
    saved.wait()
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    checkpoints.logger.addHandler(handler)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), put(0), shardings)
    results = []
    for name in damaged:
        jax.experimental.multihost_utils.sync_global_devices(f"before {name}")
        if number == 0 and name:
            for path in (epath.Path(folder) / name).glob("d/*"):
                path.write_bytes(b"damaged")
        jax.experimental.multihost_utils.sync_global_devices(f"after {name}")
        try:
            step, state, data, clocks = saved.restore(abstract)
            own = [np.asarray(shard.data)[1] for shard in state.values.addressable_shards]
            results.append((step, (int(state.step), own, data, clocks), " ".join(logged)))
        except UserError as error:
            results.append((str(error), None, " ".join(logged)))
        logged.clear()
    saved.close()
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several") / "checkpoints"
    address = free_address()
    damaged = ["", "3/state/ocdbt.process_1", "2/state/ocdbt.process_0", "1/state/ocdbt.process_1"]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        jobs = [pool.submit(restored, number, address, str(folder), damaged) for number in range(2)]
        yield [job.result(timeout=240) for job in jobs]
    shutil.rmtree(folder)


def test_a_checkpoint_that_all_processes_can_read_is_restored(both):
    for number, results in enumerate(both):
        assert results[0] == (3, (3, [3.0 * (1 + 4096 * number)], {"at": 3}, {"trained": 3}), "")


def test_a_checkpoint_that_one_process_cannot_read_is_restored_by_none(both):
    first, second = ([step for step, _, _ in results] for results in both)
    assert first[:3] == second[:3] == [3, 2, 1]
    assert [results[2][1][1] for results in both] == [[1.0], [4097.0]]
    assert "step 3" in both[0][1][2] and "another process of this job cannot" in both[0][1][2]
    assert "step 3" in both[1][1][2] and "another process" not in both[1][1][2]


def test_processes_refuse_when_no_checkpoint_is_readable_by_all(both):
    for results in both:
        assert "none can be read" in results[3][0]
