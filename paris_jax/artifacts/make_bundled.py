"""Makes an ensemble or a network that ships with the package: parts of a finished run in bfloat16, and its provenance.

python -m paris_jax.artifacts.make_bundled --workdir=runs/bundled --name=shapes --revision=$(git rev-parse HEAD)

Of a run without an ensemble, it ships the monolith, to start training from (`init_from=bundled:NAME`).
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

# What a shipped part keeps of the manifest it was trained with.
KEPT = ("role", "cluster", "clusters", "timestep_shift", "training", "latent", "codec", "text", "text_length", "fps")


COMMANDS = ("quickstart",)
COMMANDS_OF_ONE = ("prepare", "cluster", "train --role=monolith")  # of a network on its own


def ship(part: ExportedNetwork, folder: epath.PathLike, **more: Any) -> ExportedNetwork:
    """Writes a network in bfloat16 to `folder`, with `more` in its manifest."""
    content = {field: getattr(part.manifest, field) for field in KEPT} | more
    exported.write(folder, part.config, part.params, part.manifest.config_hash, "bfloat16", **content)
    return exported.read(folder)


def make(run: RunFolder, folder: epath.Path, made: dict[str, Any]) -> None:
    """Writes experts/K, router and monolith in bfloat16 to `folder`, and the ensemble's manifest with `made` in it.

    Of a run without an ensemble, it writes the monolith alone.
    """
    monolith = exported.read(run.export(Role("monolith")))
    if not manifest.exists(run.ensemble):
        shutil.rmtree(folder, ignore_errors=True)
        ship(monolith, folder, provenance=made)
        return
    found = ensemble_manifest.read(run.ensemble)
    if found.router is None:
        raise UserError(f"{run.ensemble} has no router")
    shutil.rmtree(folder, ignore_errors=True)
    experts = {k: ship(part, folder / "experts" / str(k)) for k, part in found.experts.items()}
    router = ship(found.router, folder / "router")
    ship(monolith, folder / "monolith")
    ensemble_manifest.write(folder, experts, router, found.sampling, monolith.manifest.config_hash, provenance=made)


def provenance(config: dict[str, Any], sampling: dict[str, Any], revision: str) -> dict[str, Any]:
    """How a run came to be: command, revision, seeds, and the whole config, so that nothing has to be believed.

    `sampling` is what the ensemble was assembled with, which may be other than what the run began with.
    """
    family, _, variant = config["name"].partition("-")
    if family != "shapes" or not variant:
        raise UserError(
            f"config.name={config['name']!r}: only runs of configs/shapes.py, named shapes-VARIANT, are shipped"
        )
    changed = {name: value for name, value in sampling.items() if config["sampling"][name] != value}
    flags = [f"--config.sampling.{name}={value}" for name, value in changed.items()]
    where = (f"--config=configs/shapes.py:{variant}", f"--workdir=runs/{variant}")
    commands = COMMANDS if config["clustering"]["num_clusters"] > 1 else COMMANDS_OF_ONE
    return {
        "command": " && ".join(" ".join(["paris-jax", command, *where, *flags]) for command in commands),
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
    config = run.stored_config().config
    has_ensemble = manifest.exists(run.ensemble)
    sampling = manifest.read(run.ensemble, EnsembleManifest).sampling if has_ensemble else config["sampling"]
    made = provenance(config, sampling, flags.revision)
    folder = ensemble_manifest.BUNDLED_FOLDER / flags.name
    make(run, folder, made)
    print(f"{ensemble_manifest.BUNDLED_PREFIX}{flags.name} is in {folder}")


if __name__ == "__main__":
    main()
