"""Times the training step of an experiment's expert on this machine, optionally against the same network in PyTorch.

    python -m tests.benchmarks.engine [--config=configs/shapes.py:tiny] [--tokens=16384] [--seconds=20]
        [--parts=forward,backward,step,input,checkpoint] [--torch] [--give_back] [--config.a.b=value ...]

    forward, backward, step    the network; its gradient; the whole training step (inputs stay on the device)
    input                      a batch read from disk, collated and put on the device
    checkpoint                 saving: blocking time and total time; restoring

`--tokens` sets the number of video tokens per clip (a multiple of 1024, in latents of 64 x 64 x 16). `--torch` also
times the network in PyTorch, eager and with torch.compile, after checking that the velocities agree; both sides then
use AdamW. `--give_back` returns freed memory to the system, as the C library does by default. Times are medians over
calls; the implementations take turns of one second each.
"""

import argparse
import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from paris_jax.artifacts import manifest
from paris_jax.artifacts.run_folder import Role
from paris_jax.artifacts.schemas import DataManifest
from paris_jax.config import files
from paris_jax.config.experiment import Experiment
from paris_jax.data import records
from paris_jax.data.loader import training_batches
from paris_jax.encoders import codecs, text
from paris_jax.local_jobs.devices import keep_freed_memory
from paris_jax.models import flops, functional
from paris_jax.training import sharding
from paris_jax.training.checkpoints import Checkpoints
from paris_jax.training.job import Job, compute_dtype, job_of
from paris_jax.training.step import ShardedStep

TEXT_TOKENS = 14  # text tokens per clip, as in the captions of the shapes
PARTS = ("forward", "backward", "step", "input", "checkpoint")


def measure(part, calls, seconds):
    """Prints the median time of each implementation and returns it in seconds.

    The implementations take turns, so that a slow moment of the machine affects all of them.
    """
    times, faults = {name: [] for name in calls}, dict.fromkeys(calls, 0)
    for call in calls.values():
        call()
    for _ in range(max(1, round(seconds))):
        for name, call in calls.items():
            call()  # warms the caches after the turn of another implementation
            faults_before, deadline = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter() + 1
            while True:
                start = time.perf_counter()
                call()
                end = time.perf_counter()
                times[name].append(end - start)
                if end > deadline:
                    break
            faults[name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before
    for name, samples in times.items():
        low, middle, high = np.percentile(samples, [5, 50, 95]) * 1e3
        spread = (
            f"5 to 95 %: {low:.1f} to {high:.1f}, {len(samples)} calls, {faults[name] / len(samples):.0f} page faults"
        )
        print(f"{part:9s} {name:14s} {middle:9.1f} ms  ({spread})", flush=True)
    return {name: float(np.median(samples)) for name, samples in times.items()}


def clip(job: Job, number: int) -> records.Record:
    """A random clip of the job's sizes."""
    rng = np.random.default_rng(number)
    return records.Record(
        id=f"clip-{number}",
        latent=rng.normal(size=job.latent_shape).astype(np.float16),
        tokens=rng.normal(size=(TEXT_TOKENS, job.config.text_width)).astype(np.float16),
        pooled=rng.normal(size=job.config.pooled_width).astype(np.float16),
        feature=np.zeros(2, np.float32),
        caption="",
        attributes={},
    )


def write_clips(job: Job, folder: Path) -> None:
    """Writes a data folder with two batches of clips."""
    count, C = 2 * job.settings.global_batch_size, job.latent_shape[-1]
    name = records.shard_name("clips", 0, 1)
    records.write_shard(folder / name, (clip(job, n) for n in range(count)))
    latent = {"shape": list(job.latent_shape), "mean": [0.0] * C, "spread": [1.0] * C}
    content = {
        "codec": {"name": "pixels", "time": 1, "height": 1, "width": 1},
        "text": {"name": "words", "vocabulary": [], "width": 8, "max_tokens": TEXT_TOKENS},
        "features": {},
        "text_length": TEXT_TOKENS,
        "fps": 8.0,
        "source": {},
    }
    manifest.write(folder, DataManifest, [name], "hash", clips=count, latent=latent, **content)


class JaxTraining:
    """The compiled functions of this package, on the local devices."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.program, self.folder = job, ShardedStep(job), folder
        write_clips(job, folder / "data")
        self.rows = training_batches(
            folder / "data", job.settings.global_batch_size, 0, text_length=job.padded_text_length
        )
        self.batch = sharding.place_batch(next(self.rows), self.program.mesh)
        self.t_B = jnp.linspace(0.1, 0.9, job.settings.global_batch_size)
        state = self.program.first_state()
        # A fresh network outputs zeros, which would make the comparison with PyTorch trivial.
        keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(state.params)))
        keys = jax.tree.unflatten(jax.tree.structure(state.params), list(keys))
        noisy = jax.jit(lambda p: jax.tree.map(lambda x, k: x + 0.02 * jax.random.normal(k, x.shape), p, keys))
        self.state = dataclasses.replace(state, params=noisy(state.params))

    def velocity(self, params):
        text = (self.batch[name] for name in ("tokens", "length", "pooled"))
        return functional.apply(self.job.config, params, self.batch["latent"], self.t_B, *text)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Returns the functions to time, by part."""
        forward = jax.jit(self.velocity)
        gradient = jax.jit(jax.grad(lambda params: jnp.square(self.velocity(params)).mean()))
        return {
            "forward": lambda: jax.block_until_ready(forward(self.state.params)),
            "backward": lambda: jax.block_until_ready(gradient(self.state.params)),
            "step": self.step,
            "input": lambda: jax.block_until_ready(sharding.place_batch(next(self.rows), self.program.mesh)),
        }

    def step(self) -> None:
        self.state = jax.block_until_ready(self.program.step(self.state, self.batch)[0])

    def time_checkpoints(self) -> None:
        checkpoints = Checkpoints(epath.Path(self.folder / "checkpoints"), keep=2)
        for number in range(3):  # the first save starts the writer threads
            state = dataclasses.replace(self.state, step=jnp.asarray(number, jnp.int32))
            start = time.perf_counter()
            checkpoints.save(number, state, {}, {})
            blocked = time.perf_counter() - start
            checkpoints.wait()
            total = time.perf_counter() - start
        start = time.perf_counter()
        jax.block_until_ready(checkpoints.restore(self.program.state)[1])
        restored = time.perf_counter() - start
        checkpoints.close()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) / 1e6
        print(
            f"checkpoint of {size:.0f} MB: blocks for {blocked * 1e3:.0f} ms, saved after "
            f"{total * 1e3:.0f} ms; restored in {restored * 1e3:.0f} ms"
        )


def torch_calls(ours: JaxTraining) -> dict[str, dict[str, Callable[[], Any]]]:
    """Returns the same functions in PyTorch, eager and compiled, on the same inputs and parameters."""
    import torch

    from tests.benchmarks import torch_twin

    job, device = ours.job, "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job.config.dtype)
    x_0, tokens, pooled, t_B = (
        torch.tensor(np.asarray(a)).to(device)
        for a in (*(ours.batch[n] for n in ("latent", "tokens", "pooled")), ours.t_B)
    )
    expected = np.asarray(jax.jit(ours.velocity)(ours.state.params))

    def wait(value):
        if device == "cuda":
            torch.cuda.synchronize()
        return value.detach().numpy(force=True) if value.numel() > 1 else None

    def implementation(name: str, compiled: bool) -> dict[str, Callable[[], Any]]:
        twin = torch_twin.Twin(job.config, job.latent_shape, tokens.shape[1])
        torch_twin.load(twin, ours.state.params)
        step = torch_twin.Step(twin.to(device), compiled, dtype, job.settings.learning_rate, job.timestep_sampler.shift)
        network, data = torch.compile(twin) if compiled else twin, (x_0, tokens, pooled)

        def forward():
            with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                return wait(network(x_0, t_B, tokens, pooled))

        difference = np.abs(forward() - expected).max() / np.abs(expected).max()
        print(f"{name} differs from ours by {difference:.1e} of the largest velocity")
        assert difference < (1e-4 if dtype == torch.float32 else 0.05)
        return {"forward": forward, "backward": lambda: wait(step.gradient(data)), "step": lambda: wait(step(data))}

    return {name: implementation(name, name != "PyTorch") for name in ("PyTorch", "torch.compile")}


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shapes.py:tiny")
    parser.add_argument("--tokens", type=int, help="video tokens per clip; by default those of the config")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--give_back", action="store_true")
    flags, rest = parser.parse_known_args()
    flags.changes = [change.removeprefix("--config.") for change in rest]
    if flags.torch:
        flags.changes.append("training.optimizer=adamw")
    if unknown := set(flags.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(unknown)} is not one of {', '.join(PARTS)}")
    if flags.tokens and flags.tokens % 1024:
        parser.error(f"--tokens={flags.tokens}: must be a multiple of 1024")
    return flags


def main():
    flags = read_arguments()
    if not flags.give_back:
        keep_freed_memory()
    config = files.load(flags.config)
    files.change(config, flags.changes)
    experiment = Experiment.from_config(config)
    shape = (flags.tokens // 1024, 64, 64, 16) if flags.tokens else codecs.latent_shape(experiment)
    dtype = compute_dtype(experiment.training.compute_dtype, jax.default_backend())
    with tempfile.TemporaryDirectory() as folder:
        role = Role("expert", 0)
        job = job_of(experiment, epath.Path(folder), role, shape, text.widths_of(experiment), TEXT_TOKENS, dtype)
        device, settings = jax.devices()[0], job.settings
        print(
            f"{flags.config} {' '.join(flags.changes)}: {functional.count(job.config) / 1e6:.2f}M parameters, "
            f"{settings.global_batch_size} clips of {np.prod(shape[:3]) // 4} + {TEXT_TOKENS} tokens, "
            f"{settings.optimizer}, {dtype}, jax "
            f"{jax.__version__} on {jax.device_count()} {device.device_kind}, freed memory is "
            f"{'given back' if flags.give_back else 'kept'}"
        )
        ours, parts = JaxTraining(job, Path(folder)), flags.parts.split(",")
        implementations = {"paris_jax": ours.calls(), **(torch_calls(ours) if flags.torch else {})}
        took = {}
        with jax.set_mesh(ours.program.mesh):
            if "checkpoint" in parts:
                ours.time_checkpoints()
            for part in ("input", "forward", "backward", "step"):
                if part in parts:
                    took[part] = measure(
                        part, {n: calls[part] for n, calls in implementations.items() if part in calls}, flags.seconds
                    )
    if "step" in took:
        work, seconds = job.flops_per_sample * settings.global_batch_size, took["step"]["paris_jax"]
        chip = flops.chip_of(device)
        share = f", {work / seconds / chip.peak / jax.device_count():.1%} of peak" if chip else ""
        print(f"{work / 1e9:.1f} GFLOP a step: {work / seconds / 1e9:.0f} GFLOP/s{share}")
    for name in list(implementations)[1:]:
        ratios = (f"{part} {times['paris_jax'] / times[name]:.2f}" for part, times in took.items() if name in times)
        print(f"our time over that of {name}: {', '.join(ratios)}")


if __name__ == "__main__":
    main()
