"""Times a training step of an experiment's network on this machine: forward, forward and backward, the whole step.

    python -m tests.benchmarks.step --config=configs/shapes.py:tiny [--seconds=20] [--give_back] [--config.a.b=value]

Inputs are random and stay on the device, so that nothing but the network and the optimizer is measured. `--give_back`
leaves freed memory to the system, as a process does that no one told otherwise.
"""

import argparse
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np

from paris_jax import config_file
from paris_jax.experiment import Experiment
from paris_jax.models import functional, presets
from paris_jax.stages.devices import keep_freed_memory
from paris_jax.stages.train import compute_dtype, sampling_shift
from paris_jax.training import chips, flops
from paris_jax.training import state as states
from paris_jax.training.step import TimeLaw, make_step

WORDS = 14  # text tokens a clip, as the shapes' captions have


def measure(name, function, seconds, *, carry=None):
    """Prints the median time of a compiled call; `carry` is handed from call to call."""
    carry = jax.block_until_ready(function(carry))
    times, faults, until = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter() + seconds
    while time.perf_counter() < until:
        begun = time.perf_counter()
        carry = jax.block_until_ready(function(carry))
        times.append(time.perf_counter() - begun)
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) / len(times)
    low, middle, high = np.percentile(times, [5, 50, 95]) * 1e3
    spread = f"5 to 95 %: {low:.1f} to {high:.1f}, {len(times)} calls, {faults:.0f} page faults a call"
    print(f"{name:20s} {middle:8.1f} ms  ({spread})")
    return middle / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/shapes.py:tiny")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--give_back", action="store_true")
    given, rest = parser.parse_known_args()
    if not given.give_back:
        keep_freed_memory()
    config = config_file.load(given.config)
    config_file.change(config, [change.removeprefix("--config.") for change in rest])
    experiment = Experiment.from_config(config)
    settings, shape = experiment.training, experiment.latent_shape
    encoder = dict(zip(("text_width", "pooled_width"), experiment.text_widths, strict=True))
    dtype = compute_dtype(settings.compute_dtype, jax.default_backend())
    network = presets.network_config(experiment.network, channels=shape[-1], dtype=dtype, **encoder)

    keys = jax.random.split(jax.random.key(0), 4)
    batch = {
        "latent": jax.random.normal(keys[0], (settings.batch, *shape)),
        "tokens": jax.random.normal(keys[1], (settings.batch, WORDS, encoder["text_width"])),
        "length": jnp.full(settings.batch, WORDS, jnp.int32),
        "pooled": jax.random.normal(keys[2], (settings.batch, encoder["pooled_width"])),
        "index": jnp.arange(settings.batch, dtype=jnp.int32),
    }
    state = states.create(network, settings, settings.steps, keys[3])
    t_B = jnp.linspace(0.1, 0.9, settings.batch)
    text_inputs = batch["tokens"], batch["length"], batch["pooled"]

    def loss(params):
        return jnp.square(functional.apply(network, params, batch["latent"], t_B, *text_inputs)).mean()

    forward, gradient = jax.jit(loss), jax.jit(jax.grad(loss))
    law = TimeLaw("logit_normal", 0.0, 1.0, sampling_shift(experiment, shape))
    step = jax.jit(make_step(network, settings, settings.steps, law), donate_argnums=0)
    device = jax.devices()[0]
    print(
        f"{given.config}: {functional.count(network) / 1e6:.2f}M parameters, {settings.batch} clips of "
        f"{np.prod(shape[:3]) // 4} + {WORDS} tokens, {settings.optimizer}, {dtype}, jax {jax.__version__} on "
        f"{device.device_kind}, freed memory is {'given back' if given.give_back else 'kept'}"
    )
    measure("forward", lambda _: forward(state.params), given.seconds)
    measure("forward, backward", lambda _: gradient(state.params), given.seconds)
    seconds = measure("step", lambda s: step(s, batch)[0], given.seconds, carry=state)
    work = flops.training_step(network, shape, WORDS) * settings.batch
    chip = chips.of(device)
    share = f", {work / seconds / chip.peak:.1%} of peak" if chip else ""
    print(f"{work / 1e9:.1f} GFLOP a step: {work / seconds / 1e9:.0f} GFLOP/s{share}")


if __name__ == "__main__":
    main()
