"""`paris-jax plan --data`: how long `prepare` takes, from clips of the source that are decoded and encoded here."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Iterator

import jax
from rich.console import Console

from paris_jax.config.experiment import Experiment
from paris_jax.data.encoding import BATCH, encode
from paris_jax.data.shards import decode
from paris_jax.data.sources.clip import Clip, Dropped, Video
from paris_jax.data.sources.source import Source
from paris_jax.data.sources.table import source
from paris_jax.encoders.published import EncoderStore
from paris_jax.errors import UserError

SECONDS = 20.0  # of decoding, and of encoding, that are measured
LEAST = 2 * BATCH  # clips that are measured at least; the first batch compiles and does not count


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured speed of one machine.

    Attributes:
      clips: clips of the whole source, as many for each item as in the sample.
      decode: clips per second of one core.
      encode: clips per second of all encoders on this machine's device.
      dropped: share of the sample that cannot be used.
    """

    clips: int
    decode: float
    encode: float
    dropped: float

    def seconds(self, workers: int, cores: int) -> float:
        """Of `prepare` by so many machines with so many decoding cores each, which decode while they encode."""
        return self.clips / (workers * min(self.decode * cores, self.encode))


def measure(experiment: Experiment, seconds: float = SECONDS, clips: Source | None = None) -> Rates:
    """Decodes and encodes clips from all over the source, in this process, for about `seconds` each.

    Raises:
      UserError: a source without a clip that can be used, or an encoder that cannot run here.
    """
    clips = clips or source(experiment.data)
    items, lost = list[int](), 0
    sample, began, spent = list[Clip](), time.perf_counter(), 0.0
    for found in decode(_spread(clips, items), experiment.curation):
        spent = time.perf_counter() - began
        if isinstance(found, Dropped):
            lost += 1
        else:
            sample.append(found)
        if spent > seconds and len(sample) >= LEAST:
            break
    if not sample:
        raise UserError(f"No clip of {len(items)} items of the source can be used; see 'paris-jax prepare --strict'")
    per_item = len(sample) / len(items)
    count = round(len(clips) * per_item)
    if experiment.data.num_clips:
        count = min(count, experiment.data.num_clips)
    rate = _encoding_rate(experiment, sample, seconds)
    return Rates(count, len(sample) / max(spent, 1e-9), rate, lost / (lost + len(sample)))


def _spread(clips: Source, taken: list[int]) -> Iterator[Video | Dropped]:
    """The videos of items from all over the source, noting each item that was taken."""
    total = len(clips)
    step = max(1, round(total * 0.618))
    while math.gcd(step, total) != 1:  # so that every item is visited once
        step -= 1
    for number in range(total):
        taken.append(number * step % total)
        yield from clips.videos(taken[-1])


def _encoding_rate(experiment: Experiment, sample: list[Clip], seconds: float) -> float:
    """Clips per second after the first batch."""
    records = encode(experiment, itertools.cycle(sample), EncoderStore(), lambda item: None)
    list(itertools.islice(records, BATCH))
    began, count = time.perf_counter(), 0
    while not count or time.perf_counter() - began < seconds:
        count += len(list(itertools.islice(records, BATCH)))
    return count / (time.perf_counter() - began)


def plan_data(experiment: Experiment, workers: int, cores: int, as_json: bool = False) -> None:
    """Prints the time of `prepare` for `workers` machines like this one, with `cores` decoding cores each."""
    if workers < 1 or cores < 1:
        raise UserError(f"--prepare_workers={workers}, --decode_workers={cores}: must be at least 1")
    found = measure(experiment)
    hours = found.seconds(workers, cores) / 3600
    device = jax.devices()[0].device_kind
    if as_json:
        print(json.dumps(dataclasses.asdict(found) | {"workers": workers, "cores": cores, "hours": hours}))
        return
    bound = "decoding" if found.decode * cores < found.encode else "the encoders"
    Console(highlight=False).print(
        f"{found.clips:,} clips, {found.dropped:.1%} of the sample cannot be used\n"
        f"decode   {found.decode:,.1f} clips/s of one core, {found.decode * cores:,.1f} of {cores}\n"
        f"encode   {found.encode:,.1f} clips/s ({device})\n"
        f"prepare  {_duration(hours * 3600)} on {workers} such machine(s), bound by {bound}",
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
