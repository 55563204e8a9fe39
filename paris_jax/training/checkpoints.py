"""Orbax checkpoints of everything that an exact resume needs: state, data position and clocks."""

import errno
import logging
import re
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from paris_jax.errors import REMEDIES, UserError, errno_of, first_line
from paris_jax.training import distributed

logger = logging.getLogger(__name__)
PAUSES = 2, 10  # seconds before another attempt at a checkpoint that the system could not read


class Checkpoints:
    """The checkpoints of one training job, saved without blocking the next step."""

    def __init__(self, folder: epath.PathLike, keep: int, keep_period: int = 0):
        """Keeps the newest `keep`, and all whose step is a multiple of `keep_period` (0: none)."""
        self.folder = epath.Path(folder)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_period or None, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.folder.resolve(), options=options)

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data: dict[str, Any], clocks: dict[str, Any]) -> None:
        """Starts saving; errors of an earlier save surface here or in `close`."""
        self._check_room(step, state)
        items = {"state": ocp.args.StandardSave(state), "data": ocp.args.JsonSave(data)}
        try:
            self._manager.save(step, args=ocp.args.Composite(**items, clocks=ocp.args.JsonSave(clocks)))
        except (OSError, ValueError) as error:
            raise error if distributed.is_device_lost(error) else _cannot_save(self.folder, step, error) from error

    def _check_room(self, step: int, state: Any) -> None:
        """Refuses to start a save that the disk has no room for; buckets are not checked."""
        if "://" in str(self.folder):
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise _cannot_save(
                self.folder, step, OSError(errno.ENOSPC, f"it takes {needed} bytes and the disk has {free} left")
            )

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint that every process can read, as (step, state, data, clocks); None where there is none.

        Args:
          abstract_state: shapes, dtypes and shardings on the current mesh; the checkpoint may come from another.

        Raises:
          UserError: checkpoints exist and none can be read; training never starts over in silence.
        """
        failures = []
        steps = self.steps()
        while (step := distributed.minimum_over_processes(max(steps, default=-1))) >= 0:
            steps = [s for s in steps if s < step]
            found, reason = self._read(step, abstract_state)
            if distributed.minimum_over_processes(found is not None):
                if found is None or _is_finite(found[1]):
                    return found
                reason = "it holds values that are not finite"
            del found  # two states do not fit on a device
            failures.append(f"step {step}: {reason}")
            logger.warning(
                "checkpoint of step %d in %s cannot be read (%s); trying an older one", step, self.folder, reason
            )
        leftovers = [p.name for p in self.folder.iterdir() if p.name.isdigit()] if self.folder.exists() else []
        if failures or leftovers:
            raise UserError(
                f"{self.folder} holds checkpoints and none can be read "
                f"({'; '.join(failures) or ', '.join(leftovers)}); "
                "restore one from a copy, or delete the folder to train from the start"
            )
        return None

    def _read(self, step: int, abstract_state: Any) -> tuple[tuple[int, Any, Any, Any] | None, str]:
        """The checkpoint of a step, or None and the reason why this process cannot read it; waits for no other "
        "process."""
        items = {"state": ocp.args.StandardRestore(abstract_state), "data": ocp.args.JsonRestore()}
        handler = ocp.CompositeCheckpointHandler()
        reason = ""
        for pause in (*PAUSES, None):
            try:
                args = ocp.args.Composite(**items, clocks=ocp.args.JsonRestore())
                found = handler.restore(self.folder.resolve() / str(step), args=args)
                if int(found["state"].step) != step:
                    raise ValueError(f"it holds step {int(found['state'].step)}")
                return (step, found["state"], found["data"], found["clocks"]), "another process of this job cannot"
            except Exception as error:  # a damaged file may raise anything
                if distributed.is_device_lost(error) or "RESOURCE_EXHAUSTED" in str(error):
                    raise  # not the checkpoint's fault
                reason = first_line(error)[:200]
                if pause is None or not _may_pass(error):
                    break
            logger.warning("checkpoint of step %d could not be read (%s); again in %g seconds", step, reason, pause)
            time.sleep(pause)
        return None, reason

    def delete_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step`: they are unreadable, and block saving these steps again."""
        for newer in [s for s in self.steps() if s > step]:
            self._manager.delete(newer)

    def wait(self) -> None:
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise error if distributed.is_device_lost(error) else _cannot_save(self.folder, None, error) from error

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _is_finite(state: Any) -> bool:
    """Whether all floating-point arrays are finite; all processes of a job call it together."""
    return bool(_all_finite([leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _may_pass(error: Exception) -> bool:
    """Whether an error may pass: the operating system failed to read, as network disks do, and the file is not "
    "damaged."""
    missing = isinstance(error, FileNotFoundError) or "ENOENT" in str(error)
    return not missing and (isinstance(error, OSError) or "os_error_code" in str(error))


def _cannot_save(folder: epath.Path, step: int | None, error: Exception) -> UserError:
    which = "a checkpoint" if step is None else f"the checkpoint of step {step}"
    system = re.search(r"([^:]+) \[os_error_code", str(error))  # the operating system's message
    said = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
    reason = system.group(1).strip() if system else said
    remedy = REMEDIES.get(errno_of(error) or 0, "remove the cause, then run the same command again")
    return UserError(
        f"Cannot save {which} in {folder} ({reason}); earlier ones are kept: " + remedy.format(place="a larger disk")
    )
