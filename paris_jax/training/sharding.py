"""How a job's slice is used: a mesh (data, fsdp), batches split over both, parameters over fsdp."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paris_jax.errors import Refused

BATCH_AXES = ("data", "fsdp")
STACKED = ("double_blocks", "single_blocks", "blocks")  # their leading axis is the layer, which is never split
SMALLEST_SPLIT = 2**14  # elements; below it, splitting costs more than it saves


def make_mesh(fsdp: int, batch: int) -> Mesh:
    """All devices of this job as (data, fsdp); refuses a split that does not divide."""
    devices = jax.device_count()
    if devices % fsdp:
        raise Refused(
            f"training.fsdp={fsdp} does not divide the {devices} devices of this job; choose a divisor of {devices}"
        )
    if batch % devices:
        raise Refused(
            f"training.batch={batch} does not divide over the {devices} devices of this job; "
            f"choose a multiple of {devices}, for example {max(devices, batch // devices * devices)}"
        )
    return jax.make_mesh((devices // fsdp, fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def parameter_spec(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
    """Splits the largest divisible axis of a large array over fsdp; small arrays are copied to every device."""
    first = 1 if any(part in STACKED for part in name.split(".")) else 0
    candidates = [axis for axis in range(first, len(shape)) if shape[axis] % fsdp == 0]
    if fsdp == 1 or not candidates or np.prod(shape) < SMALLEST_SPLIT:
        return PartitionSpec()
    axis = max(candidates, key=lambda a: (shape[a], a))
    return PartitionSpec(*("fsdp" if a == axis else None for a in range(axis + 1)))


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a training state: moments and EMA lie where their parameter lies."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = ".".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
        return NamedSharding(mesh, parameter_spec(name, leaf.shape, mesh.shape["fsdp"]))

    return jax.tree_util.tree_map_with_path(of, abstract_state)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of the global batch on its devices."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
