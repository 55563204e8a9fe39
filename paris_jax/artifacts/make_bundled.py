"""Makes an ensemble that ships with the package: the parts of a finished run in bfloat16, and how they came to be.

python -m paris_jax.artifacts.make_bundled --workdir=runs/bundled --name=shapes --revision=$(git rev-parse HEAD)
"""

import argparse
import shutil
from collections.abc import Sequence
from typing import Any

from etils import epath

from paris_jax.artifacts import ensemble_manifest, exported, manifest
from paris_jax.artifacts.exported import ExportedNetwork
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.schemas import EnsembleManifest
from paris_jax.errors import UserError

# Fields that a shipped part keeps of the manifest it was trained with.
KEPT = ("role", "cluster", "clusters", "timestep_shift", "training", "latent", "codec", "text", "text_length", "fps")


def make(run: RunFolder, folder: epath.Path, made: dict[str, Any]) -> None:
    """Writes experts/K, router and monolith in bfloat16 to `folder`, and the ensemble's manifest with `made` in it."""
    found = ensemble_manifest.read(run.ensemble)
    monolith = exported.read(run.export(Role("monolith")))
    shutil.rmtree(folder, ignore_errors=True)

    def ship(part: ExportedNetwork, name: str) -> ExportedNetwork:
        content = {field: getattr(part.manifest, field) for field in KEPT}
        exported.write(folder / name, part.config, part.params, part.manifest.config_hash, "bfloat16", **content)
        return exported.read(folder / name)

    experts = {k: ship(part, f"experts/{k}") for k, part in found.experts.items()}
    if found.router is None:
        raise UserError(f"{run.ensemble} has no router")
    router = ship(found.router, "router")
    ship(monolith, "monolith")
    ensemble_manifest.write(folder, experts, router, found.sampling, monolith.manifest.config_hash, provenance=made)


def provenance(config: dict[str, Any], sampling: dict[str, Any], revision: str) -> dict[str, Any]:
    """How a run came to be: command, revision, seeds, and the whole config, so that nothing has to be believed.

    `sampling` holds the parameters the ensemble was assembled with, which may differ from those the run began with.
    """
    family, _, variant = config["name"].partition("-")
    if family != "shapes" or not variant:
        raise UserError(
            f"config.name={config['name']!r}: only runs of configs/shapes.py, named shapes-VARIANT, are shipped"
        )
    changed = {name: value for name, value in sampling.items() if config["sampling"][name] != value}
    flags = [f"--config.sampling.{name}={value}" for name, value in changed.items()]
    command = ["paris-jax quickstart", f"--config=configs/shapes.py:{variant}", f"--workdir=runs/{variant}", *flags]
    return {
        "command": " ".join(command),
        "revision": revision,
        "seeds": {section: values["seed"] for section, values in config.items() if "seed" in (values or {})},
        "config": config | {"sampling": config["sampling"] | changed},
        "licence": "Apache-2.0",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="finished run folder")
    parser.add_argument("--name", required=True, help="it becomes bundled:NAME")
    parser.add_argument("--revision", required=True, help="revision of this project that trained it")
    flags = parser.parse_args(arguments)
    run = RunFolder(flags.workdir)
    sampling = manifest.read(run.ensemble, EnsembleManifest).sampling
    made = provenance(run.stored_config().config, sampling, flags.revision)
    folder = ensemble_manifest.BUNDLED_FOLDER / flags.name
    make(run, folder, made)
    print(f"{ensemble_manifest.BUNDLED_PREFIX}{flags.name} is in {folder}")


if __name__ == "__main__":
    main()
