"""Reports compiled training steps for devices that are not attached: what the program does, against the formula.

    python -m tests.benchmarks.program TARGET [--config=configs/paris2.py] [--presets=base,large,xl,11b]
        [--role=expert] [--clips=2] [--remat=named] [--save=FOLDER]

TARGET is a topology of `paris-jax plan`: v5p:2x2x1, v6e:2x4, h100:8, h200:8. For each preset, with `--clips` a device
and the parameters sharded over all devices, prints per device and step: the FLOPs of matrix products and their ratio
to the formula's (above 1: recomputation), products with a float32 operand, runs of flash attention per block, bytes of
copies and of collectives per block, state and temporary memory. `--save` writes the HLO text.
"""

import argparse
import dataclasses
from pathlib import Path

from etils import epath

from paris_jax.artifacts.run_folder import Role
from paris_jax.config import files
from paris_jax.config.experiment import Experiment
from paris_jax.encoders import codecs, text
from paris_jax.models import flops
from paris_jax.models.router import RouterConfig
from paris_jax.planning.compiled import Planned, compile_step
from paris_jax.planning.topologies import Topology
from paris_jax.training.job import Job, job_of


def job(experiment: Experiment, role: str, preset: str, target: Topology, clips: int, remat: str) -> Job:
    """A role's job with a preset, its parameters sharded over all devices of a target."""
    network = dataclasses.replace(experiment.network, preset=preset, remat=remat)
    changes = {"global_batch_size": clips * target.size, "fsdp": target.size, "grad_accum_steps": 1}
    experiment = dataclasses.replace(
        experiment,
        network=network,
        training=dataclasses.replace(experiment.training, **changes),
        router_training=dataclasses.replace(experiment.router_training, **(changes | {"fsdp": 1})),
    )
    sizes = codecs.latent_shape(experiment), text.widths_of(experiment), experiment.text.max_tokens
    cluster = 0 if role == "expert" else None
    return job_of(experiment, epath.Path("."), Role(role, cluster), *sizes, "bfloat16")


def row(preset: str, planned: Planned) -> str:
    """A line of the table."""
    config, report, sizes = planned.job.config, planned.report, planned.footprint
    if report is None:
        return f"{preset:8s} does not fit: {sizes.peak / 2**30:.1f} GiB"
    blocks = config.blocks if isinstance(config, RouterConfig) else config.double_blocks + config.single_blocks
    products, job = sum(report.flops.values()), planned.job
    attention = 3 * blocks * flops.attention_flops(config, job.latent_shape, job.text_length)
    samples = job.settings.global_batch_size / planned.slice.size
    formula = samples * (job.flops_per_sample - (attention if report.flash else 0))
    kernels = " ".join(f"{way} {count / blocks:.2g}" for way, count in report.flash.items()) or "none"
    return (
        f"{preset:8s} {products / 1e12:9.2f} {products / formula:7.3f} {report.flops.get('f32', 0) / products:9.2%} "
        f"{kernels:24s} {report.copied_bytes / blocks / 1e6:9.1f} {report.collective_bytes / blocks / 1e6:9.1f} "
        f"{sizes.arguments / 2**30:7.2f} {sizes.temporaries / 2**30:7.2f} {planned.seconds:6.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--config", default="configs/paris2.py")
    parser.add_argument("--presets", default="base,large,xl,11b")
    parser.add_argument("--role", default="expert")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--remat", default="named")
    parser.add_argument("--save", default="")
    flags = parser.parse_args()
    target = Topology.parse(flags.target)
    devices = target.devices()
    experiment = Experiment.from_config(files.load(flags.config))
    print(f"{flags.role}, {flags.clips} clips a device of {target}, remat {flags.remat}; per device and step")
    print("preset      TFLOP formula   float32 attention per block       copied MB  moved MB   state    temp      s")
    for preset in flags.presets.split(","):
        save = Path(flags.save) / f"{preset}.txt" if flags.save else None
        planned = compile_step(
            job(experiment, flags.role, preset, target, flags.clips, flags.remat), target, devices, save
        )
        print(row(preset, planned), flush=True)


if __name__ == "__main__":
    main()
