"""`paris-jax prepare`: encodes clips to cached latents, text embeddings and features, shard by shard."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgspec
from etils import epath
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from paris_jax.artifacts import locks, manifest
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import (
    DataManifest,
    FileEntry,
    ShardMarker,
)
from paris_jax.config.experiment import Experiment
from paris_jax.data import dropped, provenance, records
from paris_jax.data.decoding import scenes
from paris_jax.data.encoding import UNIT, describe_encoders, stored, text_encoder, weights_of
from paris_jax.data.parts import Part
from paris_jax.data.shards import (
    STEM,
    Shard,
    Tally,
    decoders_for,
    keep,
    leave_out_near_duplicates,
    renew,
    strictly,
    write_in_process,
)
from paris_jax.data.sources.clip import Dropped
from paris_jax.data.sources.source import Source
from paris_jax.data.sources.table import source
from paris_jax.encoders import codecs
from paris_jax.encoders.published import EncoderStore
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
PUBLISHED = {"hunyuan", "t5+clip", "dinov2"}  # encoders that run on an accelerator if there is one


def prepare(
    experiment: Experiment,
    run: RunFolder,
    processes: int = 1,
    shard_size: int | None = None,
    clips: Source | None = None,
    decoders: int | None = None,
    strict: bool = False,
    part: Part | None = None,
    finish_only: bool = False,
) -> None:
    """Encodes every clip of the experiment into RUN/data; resumes at the first missing shard.

    The files are identical, byte for byte, regardless of interruptions and of the number of processes and workers. A
    clip or file that cannot be used is dropped, and listed with its reason in dropped.jsonl.

    Args:
      experiment: config of the clips and encoders.
      run: run folder to write to.
      processes: number of shards encoded in parallel.
      shard_size: number of the source's items per shard.
      clips: source of the clips, instead of the one that `data.source` names.
      decoders: number of decoding processes; by default one for each CPU core.
      strict: refuse at the first clip or file that cannot be used.
      part: prepare the shards of one of several workers, which may run on any machines and in any order; the last one
        writes the manifest.
      finish_only: prepare nothing, and write the manifest of the shards that all workers prepared.

    Raises:
      UserError: an encoder cannot run, too many clips cannot be used, the disk is full, or the run folder belongs to
        another config.
    """
    decoders = decoders or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    decoders = max(1, decoders // processes)
    run.check_shared_data()
    # A worker of several leaves the partial files of the others alone.
    lock = run.path / "data" if part is None else run.path / f"data-{part.index}-of-{part.count}"
    with locks.only_writer(lock):
        preparation = Preparation(experiment, run, shard_size, clips, strict)
        if not preparation.is_finished():
            if not finish_only:
                preparation.write_shards(processes, decoders, part)
            preparation.finish_all(wait_for=part is None)


class Preparation:
    """All shards of a data folder, those to write, and their manifest.

    Attributes:
      store: encoders that are loaded.
      clips, jobs: the source and its shards; listed when they are first needed.
    """

    def __init__(
        self, experiment: Experiment, run: RunFolder, shard_size: int | None, clips: Source | None, strict: bool
    ):
        self.experiment, self.run, self.strict = experiment, run, strict
        self.store = EncoderStore()
        self.encoders = weights_of(**describe_encoders(experiment, (), self.store))
        self._given, self._shard_size = clips, shard_size

    def is_finished(self) -> bool:
        """Whether the data are complete, and made from the present source and encoders.

        Changes are logged, and prepared again.

        Raises:
          UserError: they are of another config, or networks were trained on data that have changed.
        """
        if not manifest.exists(self.run.data):
            return False
        self.run.claim(self.experiment.to_dict(), self.experiment.hash)
        existing = check_config(self.experiment, self.run.data)
        changes = None if self.run.shared_data.exists() else self._changes()
        if changes is None:
            check_prepared(self.experiment, self.run.data, self.encoders)
        if changes:
            self._check_untrained(changes)
            logger.warning("%s: %s; only this is prepared again", self.run.data, changes)
            for level in ("", "*/", "clusters/*/"):  # of other clips: `cluster` makes them again
                for path in self.run.partition.glob(level + manifest.FILE_NAME):
                    path.unlink()
            (self.run.data / manifest.FILE_NAME).unlink()
            return False
        logger.info("%d clips are prepared already (%s)", existing.clips, self.run.data)
        return True

    def _changes(self) -> provenance.Changes | None:
        """The changes since the shards were written; None where they cannot be known."""
        if not any(self.run.data.glob(f"*{records.ENDING}.json")):  # an earlier version kept no provenance
            return None
        try:
            jobs = self.jobs
        except UserError as error:
            logger.warning("the source of %s is not here, so changes are not noticed: %s", self.run.data, error)
            return None
        paths = sorted(self.run.data.glob(f"*{records.ENDING}.json"))
        changes, known = provenance.Changes(), 0
        if {path.name for path in paths} <= {job.marker.name for job in jobs}:
            for job in jobs[: len(paths)]:
                known += len(job.read_marker().items)
                changes.merge(job.renew_items())
        else:  # another number of shards
            markers = [manifest.read_json(path, ShardMarker) for path in paths]
            items = tuple(item for marker in markers for item in marker.items)
            ends = [marker.origin.get("indices", (0, 0))[-1] for marker in markers]
            then = {**markers[0].origin, "indices": [0, max(ends)]}
            whole, known = msgspec.structs.replace(markers[0], origin=then, items=items), len(items)
            now = {**jobs[0].origin, "indices": [0, len(self.clips)]}
            changes, _ = provenance.compare(whole, now, self.clips, range(len(self.clips)))
        if known and len(changes.gone) > known / 2:
            raise UserError(
                f"{self.run.data}: {changes}; more than half of the source is gone, as if its disk was not there; "
                "bring it back, or prepare the rest with a new --workdir"
            )
        return changes

    def _check_untrained(self, changes: provenance.Changes) -> None:
        trained = provenance.trained_networks(self.run)
        if trained:
            raise UserError(
                f"{self.run.data} differs from its source: {changes}; {', '.join(trained)} learned from the old "
                f"clips; use a new --workdir, or delete {', '.join(trained)} and run the same command again"
            )

    @functools.cached_property
    def clips(self) -> Source:
        if self.experiment.curation.scene_cuts:
            scenes.check_installed()
        clips = self._given if self._given is not None else source(self.experiment.data)
        if not len(clips):
            if clips.dropped:
                dropped.check_share(0, clips.dropped, self.experiment.data.max_dropped_share)
            raise UserError("The data source has no clips; raise data.num_clips or add videos to data.path")
        if self.strict and (faults := [item for item in clips.dropped if item.stage != "curate"]):
            raise strictly(faults[0])
        self.run.claim(self.experiment.to_dict(), self.experiment.hash)  # only after the source has listed its items
        return clips

    @functools.cached_property
    def jobs(self) -> list["Shard"]:
        size = self._shard_size or self.clips.items_per_shard
        count, folder = -(-len(self.clips) // size), str(self.run.data)
        rest = (count, size, self.encoders, self.strict)
        return [Shard(self.experiment, self.clips, folder, number, *rest) for number in range(count)]

    def write_shards(self, processes: int, decoders: int, part: Part | None) -> None:
        """Writes the shards of one worker that are not there yet; by default all."""
        names = self.experiment.codec.name, self.experiment.text.name, self.experiment.features.name
        if processes > 1 and PUBLISHED.intersection(names) and jax.default_backend() != "cpu":
            raise UserError(
                f"--num_workers={processes}: these encoders run on the accelerators, which only one process can use; "
                "use 1"
            )
        own = self.jobs[part.index :: part.count] if part else self.jobs
        missing = [job for job in own if not job.is_done()]
        for job in missing if part else ():
            for path in (*job.files, job.marker):
                locks.delete_partial_files(path)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), Speed(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            total = sum(len(job.indices) for job in own)
            task = progress.add_task("items" if self.clips.isolated else "clips", total=total)
            progress.advance(task, total - sum(len(job.indices) for job in missing))
            if processes == 1:
                beyond = Beyond(self.jobs)
                with decoders_for(self.experiment, self.clips, decoders) as pool:
                    for job in missing:
                        if beyond(job):
                            break
                        renew(job, lambda: progress.advance(task), self.store, pool)
            else:
                # Spawned, because a forked process would inherit locks of JAX's threads.
                context = multiprocessing.get_context("spawn")
                with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
                    started = [pool.submit(write_in_process, job, decoders) for job in missing]
                    for done in concurrent.futures.as_completed(started):
                        progress.advance(task, done.result())

    def finish_all(self, wait_for: bool) -> None:
        """Writes the manifest once every shard is there.

        Args:
          wait_for: whether missing shards are an error; otherwise, other workers prepare them.
        """
        missing = self._missing()
        if missing and not wait_for:
            if not manifest.exists(self.run.data):
                text = "%d of %d shards are not there yet; the worker that writes the last of them finishes the data"
                logger.info(text, len(missing), len(self.jobs))
            return
        if missing:
            numbers = ", ".join(map(str, missing[:10])) + ", ..." * (len(missing) > 10)
            raise UserError(
                f"{self.run.data}: {len(missing)} of {len(self.jobs)} shards are not there ({numbers}); run "
                "'paris-jax prepare --shard=I/N' for the workers that did not end, with the same N"
            )
        with contextlib.nullcontext() if wait_for else locks.only_writer(self.run.data, wait=True):
            if not manifest.exists(self.run.data):  # or another worker was the last, too
                finish(self.experiment, self.run, self.clips, self.jobs, self.store)
        self.store.drop()

    def _missing(self) -> list[int]:
        """Numbers of the shards that are not done, of those that the data set needs."""
        if any(not job.marker.exists() for job in self.jobs if job.most is None):
            return [job.number for job in self.jobs if not job.marker.exists()]
        beyond = Beyond(self.jobs)
        return [job.number for job in self.jobs if not beyond(job) and not job.is_done()]


class Beyond:
    """Tells whether the shards before one hold as many clips as the data set may have; reads each marker once."""

    def __init__(self, jobs: Sequence["Shard"]):
        self.jobs, self.read, self.clips = jobs, 0, 0

    def __call__(self, job: "Shard") -> bool:
        if job.most is None or not job.clips.isolated:
            return False
        while self.read < job.number and self.clips < job.most and self.jobs[self.read].marker.exists():
            self.clips += self.jobs[self.read].read_marker().tally.clips
            self.read += 1
        return self.clips >= job.most


def check_config(experiment: Experiment, folder: epath.Path) -> DataManifest:
    """The manifest of prepared clips; refuses those of another config."""
    found = manifest.read(folder, DataManifest)
    if found.config_hash != experiment.prepared_hash:
        raise UserError(f"{folder} was made with another config; use a new --workdir, or delete {folder}")
    return found


def check_prepared(experiment: Experiment, folder: epath.Path, encoders: Mapping[str, Any]) -> DataManifest:
    """The manifest of prepared clips; refuses those of another config, or of other weights of the encoders."""
    found = check_config(experiment, folder)
    if weights_of(found.codec, found.text, found.features) != encoders:
        raise UserError(f"{folder} was made with other weights of its encoders; use those weights, or a new --workdir")
    return found


def share(experiment: Experiment, run: RunFolder, folder: epath.PathLike) -> None:
    """Takes the prepared clips of another run folder, FOLDER = OTHER/data, for this one.

    Raises:
      UserError: they are not complete, or of another config; this run folder has data of its own, or others.
    """
    folder = epath.Path(folder)
    if (run.path / "data").exists():
        raise UserError(f"--data={folder}: {run.path / 'data'} is there already; use a new --workdir")
    encoders = weights_of(**describe_encoders(experiment, (), EncoderStore()))
    found = check_prepared(experiment, folder, encoders)
    if run.shared_data.exists():
        hashes = [manifest.hash_file(path) for f in (run.data, folder) if (path := f / manifest.FILE_NAME).exists()]
        if len(hashes) < 2 or hashes[0] != hashes[1]:
            raise UserError(f"--data={folder}: {run.path} shares {run.data} already; use a new --workdir")
    run.claim(experiment.to_dict(), experiment.hash)
    run.share_data(folder)
    logger.info("%d clips of %s are the data of %s", found.clips, folder, run.path)


class Speed(ProgressColumn):
    """Clips or items per second over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.3g} {task.description}/s" if task.speed else "", style="progress.data.speed")


def finish(experiment: Experiment, run: RunFolder, clips: Source, jobs: Sequence[Shard], store: EncoderStore) -> None:
    """Writes the list of dropped clips and the manifest of all shards, from the shards' markers."""
    total, lost, kept, known = Tally(), list(clips.dropped), list[Shard](), dict[str, FileEntry]()
    leave_out_near_duplicates(jobs, experiment.curation)
    for job in jobs:
        if job.most is not None and total.clips >= job.most:
            break
        marker = job.read_marker()
        lost += [Dropped(item.id, item.stage, item.reason, item.detail) for item in marker.dropped]
        if job.most is not None and total.clips + marker.tally.clips > job.most:
            marker = keep(job, range(job.most - total.clips))
        total.merge(marker.tally)
        known |= marker.files
        kept.append(job)
    listed = [dropped.write(run.data, lost)] if lost else []  # first: a refusal sends people to it
    dropped.print_table(total.clips, lost, Console())
    dropped.check_share(total.clips, lost, experiment.data.max_dropped_share)
    codec = codecs.codec(**dataclasses.asdict(experiment.codec), store=store)
    encoder = text_encoder(experiment, total.words, store)
    null = stored(encoder.null(), encoder.stored)
    manifest.write(
        run.data,
        DataManifest,
        [
            *(path.name for job in kept for path in job.files),
            *records.write_null(run.data, *null),
            *listed,
        ],
        experiment.prepared_hash,
        known,
        **describe_encoders(experiment, sorted(total.words), store),
        latent=total.latent(shared=codec.one_scale) | (UNIT if codec.scaled else {}),
        text_length=total.text_length,
        clips=total.clips,
        fps=experiment.data.fps,
        source=clips.describe(),
        cond_images=experiment.data.cond_images,
        dropped=dropped.counts(lost),
    )
    if not lost:
        (run.data / dropped.FILE_NAME).unlink(missing_ok=True)
    names = {name for job in kept for name in (*(path.name for path in job.files), job.marker.name)}
    for path in run.data.glob(f"{STEM}-*-of-*"):  # of another number of shards, or behind the last that is wanted
        if path.name not in names:
            path.unlink(missing_ok=True)
    logger.info("%d clips are prepared: %s", total.clips, run.data)
