"""`paris-jax plan`: memory, work, time and cost of a run on devices that are not attached."""

import dataclasses
import json
import logging
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath
from rich.console import Console

from paris_jax.artifacts.run_folder import Role
from paris_jax.config.experiment import Experiment
from paris_jax.encoders import codecs, text
from paris_jax.errors import UserError
from paris_jax.models import functional
from paris_jax.models.flops import chip_named
from paris_jax.planning.compiled import Compiler, Planned, attention_kernel, memory_of
from paris_jax.planning.search import TRIES, suggestions
from paris_jax.planning.topologies import Topology
from paris_jax.training.job import Job, compute_dtype, job_of

logger = logging.getLogger(__name__)
# Expected MFU of networks up to so many parameters, where --mfu is not given: upper bounds by the TPU compiler's cycles
# of configs of each size on v5p (docs/benchmarks.md).
EXPECTED_MFU = ((0.25e9, 0.14), (1e9, 0.19), (4e9, 0.30), (float("inf"), 0.36))
KERNELS = {"cudnn": "cuDNN's flash kernel", "pallas": "the Pallas flash kernel", "xla": "plain matrix products"}
SMALLEST_SHARE = 1e-3  # of all products; rarer dtypes are not shown


@dataclasses.dataclass(frozen=True)
class Cost:
    """Time and cost of all jobs of a role.

    Attributes:
      jobs: jobs of the role.
      mfu: model FLOPs utilization that is assumed.
      roofline_seconds, step_seconds: of one step, at the chips' peak and as expected; None for unknown chips.
      hours: of one job.
      chip_hours: of all jobs.
      cost: of all jobs, in the currency of the price; None without a price.
    """

    jobs: int
    mfu: float
    roofline_seconds: float | None = None
    step_seconds: float | None = None
    hours: float | None = None
    chip_hours: float | None = None
    cost: float | None = None


def plan(
    experiment: Experiment,
    target: Topology,
    roles: Sequence[str],
    mfu: float | None,
    price: float | None,
    search: bool,
    as_json: bool = False,
) -> dict[str, Planned]:
    """Compiles the training step of each role for `target`; prints memory, work, time and cost as they are known.

    Args:
      experiment: config of the networks, batch size, mesh (the data axis takes the devices that fsdp, tensor and
        sequence leave) and steps.
      target: devices of each role's job.
      roles: any of "expert", "monolith" and "router".
      mfu: expected model FLOPs utilization, a fraction of the chips' peak; None: by the size of the network.
      price: price of one chip for one hour, in any currency; None prints no costs.
      search: also compiles other configurations, to find the largest batch and the smallest slice that fit or, if the
        job does not fit, changes that make it fit.
      as_json: print one JSON object at the end instead.

    Returns:
      The compiled job of each role.
    """
    console = Console(highlight=False, soft_wrap=True, quiet=as_json)
    devices, compile_job = target.devices(), Compiler()
    jobs = {role: _planned_job(experiment, target, role) for role in roles}
    for job in jobs.values():
        _check_target(job, target)
    planned: dict[str, Planned] = {}
    costs: dict[str, Cost] = {}
    for role, job in jobs.items():
        planned[role] = compile_job(job, target, devices)
        costs[role] = _cost(experiment, planned[role], role, mfu, price)
        for line in _lines(role, planned[role], costs[role]):
            console.print(line)
    total = [cost.chip_hours for cost in costs.values() if cost.chip_hours is not None]
    if total:
        bill = "" if price is None else f", cost {_brief(sum(total) * price)}"
        console.print(f"all         {_brief(sum(total))} chip-hours{bill}")
    notes = list(_notes(experiment, target, mfu))
    for line in notes:
        console.print(line)
    found: dict[str, list[str]] = {}
    if search:
        seconds = sum(p.seconds for p in planned.values()) / len(planned)
        logger.info("searching: up to %d compilations of about %.0f s for each role; --nosearch: none", TRIES, seconds)
        for role, each in planned.items():
            if role == "monolith" and "expert" in planned:
                continue
            found[role] = []
            for line in suggestions(each, devices, compile_job):
                found[role].append(line)
                console.print(f"{role}: {line}")
    if as_json:
        print(json.dumps(_document(target, planned, costs, notes, found)))
    return planned


def _planned_job(experiment: Experiment, target: Topology, role: str) -> Job:
    settings = experiment.settings_of(role)
    dtype = compute_dtype(settings.compute_dtype, target.platform)
    cluster = 0 if role == "expert" else None
    sizes = codecs.latent_shape(experiment), text.widths_of(experiment), experiment.text.max_tokens
    return job_of(experiment, epath.Path("."), Role(role, cluster), *sizes, dtype)


def _check_target(job: Job, target: Topology) -> None:
    if job.config.remat == "offload" and target.platform == "gpu":
        raise UserError(
            f"network.remat=offload cannot be planned for {target}: without a GPU, XLA ignores the host's memory; "
            "use named or full"
        )


def _cost(experiment: Experiment, p: Planned, role: str, mfu: float | None, price: float | None) -> Cost:
    jobs = experiment.clustering.num_clusters if role == "expert" else 1
    parameters, chip = functional.count(p.job.config), chip_named(p.slice.generation)
    mfu = mfu or next(share for most, share in EXPECTED_MFU if parameters <= most)
    if chip is None:
        return Cost(jobs, mfu)
    seconds = p.flops / (mfu * chip.peak * p.slice.size)
    hours = seconds * p.job.steps / 3600
    work = hours * p.slice.size * jobs
    return Cost(jobs, mfu, p.roofline(chip), seconds, hours, work, None if price is None else work * price)


def _lines(role: str, p: Planned, cost: Cost) -> Iterator[str]:
    """A role in a few lines of at most 80 columns."""
    job, f, report, settings = p.job, p.footprint, p.report, p.job.settings
    axes = [f"{name} {n}" for name in ("fsdp", "tensor", "sequence") if (n := getattr(settings, name)) > 1]
    parts = f" in {settings.grad_accum_steps} parts" if settings.grad_accum_steps > 1 else ""
    batch = ", ".join([f"batch {settings.global_batch_size}{parts}", *axes, job.config.dtype])
    yield f"{role:<11} {functional.count(job.config) / 1e6:,.1f}M parameters, {batch}, remat {job.config.remat}"
    sizes = [_bytes(size) for size in (f.arguments, f.temporaries, f.peak)]
    verdict = "" if f.memory is None else f" of {_bytes(f.memory)}: {'fits' if f.fits else 'does not fit'}"
    yield f"  memory    {sizes[0]} state and batch + {sizes[1]} temporary = {sizes[2]}{verdict}"
    yield f"  attention {KERNELS[attention_kernel(job, p.slice)]}"
    if report:
        least = SMALLEST_SHARE * sum(report.flops.values())
        products = [f"{_flop(n)} in {dtype}" for dtype, n in sorted(report.flops.items()) if n >= least]
        yield f"  products  {', '.join(products)} a device and step"
        moved = [f"{kind} {_bytes(size)}" for kind, (_, size) in report.collectives.items()]
        yield from textwrap.wrap(f"  network   {', '.join(moved) or 'nothing'}", 80, subsequent_indent=" " * 12)
    if cost.step_seconds is None or cost.roofline_seconds is None:
        yield f"  step      {_flop(p.flops)}; time unknown"
        yield f"  run       {cost.jobs} x {job.steps:,} steps"
        return
    yield (
        f"  step      {_flop(p.flops)}: {_brief(cost.roofline_seconds)} s at the peak, "
        f"{_brief(cost.step_seconds)} s at {cost.mfu:.0%} MFU"
    )
    bill = "" if cost.cost is None else f", cost {_brief(cost.cost)}"
    yield (
        f"  run       {cost.jobs} x {job.steps:,} steps: {_brief(cost.hours or 0)} hours, "
        f"{_brief(cost.chip_hours or 0)} chip-hours{bill}"
    )


def _bytes(size: float) -> str:
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB"))


def _flop(number: float) -> str:
    return _scaled(number, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _scaled(number: float, base: int, units: tuple[str, ...]) -> str:
    """A number with the largest of its units that leaves at least 1."""
    power = min(int(math.log(number, base)) if number >= 1 else 0, len(units) - 1)
    return f"{_brief(number / base**power)} {units[power]}"


def _brief(number: float) -> str:
    """Formats with three significant digits: 0.00147, 12.3, 42,972."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _notes(experiment: Experiment, target: Topology, mfu: float | None) -> Iterator[str]:
    yield f"Text is counted at its maximum of {experiment.text.max_tokens} tokens; jobs of one role run in parallel."
    if mfu is None:
        yield "MFU is assumed by the size of the network; pass your own measurement as --mfu."
    if target.platform == "gpu":
        yield (
            "Compiled without a GPU: nothing is autotuned, and cuDNN's workspace (usually below 1 GiB) is not counted."
        )


def _document(
    target: Topology,
    planned: dict[str, Planned],
    costs: dict[str, Cost],
    notes: list[str],
    found: dict[str, list[str]],
) -> dict[str, Any]:
    """The plan as JSON data: sizes in bytes, times in seconds unless their names say hours."""
    roles = {
        role: {
            "parameters": functional.count(p.job.config),
            "global_batch_size": p.job.settings.global_batch_size,
            "steps": p.job.steps,
            "attention": attention_kernel(p.job, target),
            "memory": dataclasses.asdict(p.footprint) | {"fits": p.footprint.fits},
            "model_flops": p.flops,
            "program": dataclasses.asdict(p.report) if p.report else None,
            "compile_seconds": p.seconds,
            **dataclasses.asdict(costs[role]),
        }
        for role, p in planned.items()
    }
    return {
        "target": str(target),
        "devices": target.size,
        "memory": memory_of(target),
        "roles": roles,
        "notes": notes,
        "suggestions": found,
    }


def check_arguments(mfu: float | None, price: float | None) -> None:
    """Raises UserError if the MFU or the price is out of range."""
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu={mfu}: must be above 0 and at most 1, such as 0.4")
    if price is not None and price < 0:
        raise UserError(f"--price={price}: must be at least 0, for one chip and one hour")
