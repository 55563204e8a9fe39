"""The clips of a data folder as clustering reads them: hashes of their ids, splits, features."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable

import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.safe_files import is_local
from paris_jax.clustering.heldout import TEST, TRAIN, split
from paris_jax.clustering.rows import FeatureFile
from paris_jax.config.experiment import Experiment
from paris_jax.data import index
from paris_jax.data.index import Block, ClipIndex
from paris_jax.data.sources.clip import video_of
from paris_jax.errors import UserError

EXACT_BYTES = 2 << 30  # the most that all features may take in memory
REMEDY = "delete it and prepare the data again"


@dataclasses.dataclass(frozen=True)
class Clips:
    """The N clips of a data folder, by the number of their record.

    Attributes:
      index: their text.
      order: (N,) int64, the clips in the order of hashes of their ids: the clustering depends on no other order.
      digests: (N, 2) uint64, these hashes, by number.
      splits: (N,) uint8, `heldout.TRAIN`, VALIDATION or TEST, by number.
      features: (N, F) float32 by number, in memory or on disk.
    """

    index: ClipIndex
    order: np.ndarray
    digests: np.ndarray
    splits: np.ndarray
    features: np.ndarray | FeatureFile

    def of_split(self, split: int) -> np.ndarray:
        """The numbers of the clips of a split, in canonical order."""
        return self.order[self.splits[self.order] == split]


def read(
    experiment: Experiment,
    folder: epath.Path,
    files: dict[str, object],
    scratch: epath.Path | None,
    done: Callable[[int], None],
) -> Clips:
    """Reads the index of a data folder in one pass.

    Args:
      experiment: seeds and fractions of the held-out split.
      folder, files: of the data, and the names in its manifest.
      scratch: a local file for the features, which then do not stay in memory; None keeps them there.
      done: called with the number of clips of each block.

    Raises:
      UserError: repeated ids, features that are not finite, features too large for memory.
    """
    data, found = experiment.data, ClipIndex(folder, files)
    digests, splits, features, width = [], [], [], 0
    try:
        with contextlib.ExitStack() as stack:
            file = None if scratch is None else stack.enter_context(open(scratch, "wb"))
            for block in found.blocks():
                _check_finite(folder, block)
                ids = (entry.id for entry in block.entries())
                splits.append(split(ids, data.heldout_fraction, data.validation_share, data.seed))
                digests.append(block.digests)
                width = block.features.shape[1]
                if file is not None:
                    file.write(np.ascontiguousarray(block.features).tobytes())
                else:
                    features.append(block.features)
                    _check_memory(folder, (block.start + len(block)) * width * 4)
                done(len(block))
    except OSError as error:
        raise UserError(
            f"Cannot write {scratch} ({error.strerror or error}); free some space, then run the same command again"
        ) from error
    hashes = np.concatenate(digests)
    order = index.order(hashes)
    _check_unique(folder, found, hashes, order)
    rows = np.concatenate(features) if scratch is None else FeatureFile(scratch, (len(hashes), width))
    return Clips(found, order, hashes, np.concatenate(splits), rows)


def _check_finite(folder: epath.Path, block: Block) -> None:
    finite = np.isfinite(block.features).all(axis=1)
    if not finite.all():
        clip = block.entry(int(finite.argmin())).id
        raise UserError(f"{folder}: the feature of clip {clip!r} is not finite; {REMEDY}")


def _check_memory(folder: epath.Path, size: int) -> None:
    if size > EXACT_BYTES:
        raise UserError(
            f"{folder}: the features take more than {EXACT_BYTES >> 30} GiB, which exact k-means would hold in memory; "
            "set config.clustering.batch_size, for example to 8192, with a new --workdir"
        )


def scratch_file(folder: epath.Path) -> epath.Path:
    """A local file for features, beside a local partition; `locks.only_writer` deletes what a killed process left."""
    place = folder if is_local(folder) else epath.Path(tempfile.gettempdir())
    return manifest.partial_path(place / "features")


def _check_unique(folder: epath.Path, found: ClipIndex, digests: np.ndarray, order: np.ndarray) -> None:
    same = np.flatnonzero((digests[order[1:]] == digests[order[:-1]]).all(axis=1))
    if len(same):
        clip = found.entry(int(order[same[0]])).id
        raise UserError(f"{folder} holds two clips called {clip!r}; {REMEDY}")


def check_splits(experiment: Experiment, clips: Clips) -> str:
    """Refuses a held-out fraction that holds out nothing for the test; returns a warning where validation is empty."""
    fraction, share = experiment.data.heldout_fraction, experiment.data.validation_share
    counts = np.bincount(clips.splits, minlength=3)
    if fraction and not counts[TEST]:
        videos = len({video_of(entry.id) for block in clips.index.blocks() for entry in block.entries()})
        raise UserError(
            f"config.data.heldout_fraction={fraction}: none of the {videos} videos ({len(clips.order)} clips) falls "
            "into the test split, so nothing could be evaluated; raise it, add videos, or set it to 0 to go without "
            "evaluation, with a new --workdir"
        )
    if fraction and share and counts.sum() == counts[TRAIN] + counts[TEST]:
        return (
            f"no video falls into the validation split (config.data.heldout_fraction={fraction:g}, "
            f"validation_share={share:g}): 'evaluate --vary' has nothing to tune settings on; raise one of them, or "
            "add videos"
        )
    return ""
