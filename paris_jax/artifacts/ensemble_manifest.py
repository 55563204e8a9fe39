"""The ensemble manifest: the validated networks, and their compatibility."""

import contextlib
import dataclasses
import os
from typing import Any

import msgspec
from etils import epath

from paris_jax.artifacts import exported, manifest, safe_files
from paris_jax.artifacts.exported import ExportedNetwork
from paris_jax.artifacts.run_folder import RunFolder
from paris_jax.artifacts.schemas import EnsembleManifest, NetworkEntry, NetworkManifest
from paris_jax.config.sampling import SamplingSettings
from paris_jax.errors import UserError
from paris_jax.models.dit import DiTConfig
from paris_jax.models.router import RouterConfig

# Fields that all networks of an ensemble share: latent space, text encoder and clusters. Prediction types may differ.
SHARED = ("latent", "codec", "text", "text_length", "conventions", "clusters", "fps", "timestep_shift", "partition")
BUNDLED_PREFIX = "bundled:"
BUNDLED_FOLDER = epath.Path(__file__).parent / "bundled"


@dataclasses.dataclass(frozen=True)
class ExportedEnsemble:
    """Validated experts by cluster, and the router (None where one expert needs none)."""

    experts: dict[int, ExportedNetwork]
    router: ExportedNetwork | None
    sampling: SamplingSettings

    @property
    def shared(self) -> NetworkManifest:
        """The manifest of any of the networks, for the entries that all of them share."""
        return next(iter(self.experts.values())).manifest


def resolve(path: epath.PathLike) -> epath.Path:
    """The folder of an ensemble or a network: a path, or `bundled:NAME` for one that ships with the package."""
    name = os.fspath(path)
    if not name.startswith(BUNDLED_PREFIX):
        return epath.Path(path)
    folder = BUNDLED_FOLDER / name.removeprefix(BUNDLED_PREFIX)
    if not manifest.exists(folder):
        known = (
            sorted(BUNDLED_PREFIX + p.name for p in BUNDLED_FOLDER.iterdir() if manifest.exists(p))
            if BUNDLED_FOLDER.exists()
            else []
        )
        raise UserError(f"There is no {name!r} in this package; it ships {', '.join(known) or 'none'}")
    return folder


def check_together(experts: dict[int, ExportedNetwork], router: ExportedNetwork | None) -> None:
    """Raises UserError for networks of another latent space, text encoder, partition or role, by name and field."""
    first = next(iter(experts.values()))
    everyone = [*experts.values(), *([router] if router else [])]
    for part in everyone:
        for field in SHARED:
            own, others = _shared(part, field), _shared(first, field)
            if own != others:
                raise UserError(
                    f"{part.folder} does not belong with {first.folder}: its {field} is {own!r} instead of {others!r}; "
                    "assemble parts that were trained on one partition"
                )
    for cluster, part in experts.items():
        if part.manifest.role != "monolith" and part.manifest.cluster != cluster:
            raise UserError(f"{part.folder} is the expert of cluster {part.manifest.cluster}, not of cluster {cluster}")
        if part.manifest.role == "router" or not isinstance(part.config, DiTConfig):
            raise UserError(f"{part.folder} is a router, not an expert")
    if router is None and len(experts) > 1:
        raise UserError("An ensemble of several experts needs a router; train it with 'paris-jax train --role=router'")
    if router and (router.manifest.role != "router" or not isinstance(router.config, RouterConfig)):
        raise UserError(f"{router.folder} is not a router")


def _shared(part: ExportedNetwork, field: str) -> Any:
    value = getattr(part.manifest, field)
    return msgspec.structs.replace(value, prediction="") if field == "conventions" else value


def write(
    folder: epath.Path,
    experts: dict[int, ExportedNetwork],
    router: ExportedNetwork,
    sampling: SamplingSettings,
    config_hash: str,
    **content: Any,
) -> None:
    """Writes the ensemble's manifest, naming each network by its relative path and the hash of its manifest."""
    check_together(experts, router)

    def entry(part: ExportedNetwork) -> dict[str, str]:
        path, here = os.fspath(part.folder), os.fspath(folder)
        if path.rpartition("://")[0] == here.rpartition("://")[0]:  # both on this machine, or both in buckets
            path = os.path.relpath(path, here)
        return {"path": path, "manifest_sha256": manifest.hash_file(part.folder / manifest.FILE_NAME)}

    manifest.write(
        folder,
        EnsembleManifest,
        [],
        config_hash,
        experts={str(k): entry(part) for k, part in sorted(experts.items())},
        router=entry(router),
        sampling=dataclasses.asdict(sampling),
        clusters=router.manifest.clusters,
        **content,
    )


def read(path: epath.PathLike) -> ExportedEnsemble:
    """Reads and validates an ensemble and all its networks; an exported network alone is an ensemble of one."""
    folder = resolve(path)
    if not manifest.exists(folder):
        raise UserError(
            f"There is no ensemble at {folder}; make it with 'paris-jax assemble --workdir=RUN', or name one that "
            "ships, such as bundled:shapes"
        )
    kind = manifest.read_kind(folder)
    if kind == "network":
        return read_single(folder)
    if kind == "weights":
        raise UserError(
            f"{folder} holds a network's weights and not how it is used; train with it (training.init_from), or import "
            "Open-Sora's again with --config=configs/paris2.py:opensora2"
        )
    return join(folder, {name: exported.read(where) for name, where in folders(folder).items()})


def folders(folder: epath.Path) -> dict[str, epath.Path]:
    """The folder of each network that an ensemble names: "expert 0", ..., "router"; checks the ensemble's manifest."""
    found, root = manifest.read(folder, EnsembleManifest), _root(folder)
    _sampling(found.sampling, folder)
    return {name: safe_files.inside(folder, entry.path, root) for name, entry in _entries(found).items()}


def join(folder: epath.Path, networks: dict[str, ExportedNetwork]) -> ExportedEnsemble:
    """The ensemble of networks that were read from its `folders`.

    Raises:
      UserError: a network that is not the one that the ensemble's manifest names, or networks that do not fit together.
    """
    found = manifest.read(folder, EnsembleManifest)
    for name, entry in _entries(found).items():
        where = networks[name].folder
        if manifest.hash_file(where / manifest.FILE_NAME) != entry.manifest_sha256:
            raise UserError(f"{where} is not the network that {folder} names; run 'paris-jax assemble' again")
    experts, router = {int(k): networks[f"expert {k}"] for k in found.experts}, networks["router"]
    check_together(experts, router)
    return ExportedEnsemble(experts, router, _sampling(found.sampling, folder))


def _entries(found: EnsembleManifest) -> dict[str, NetworkEntry]:
    return {f"expert {k}": entry for k, entry in found.experts.items()} | {"router": found.router}


def _root(folder: epath.Path) -> epath.Path | None:
    """The folder that names in an ensemble manifest may reach besides its own: the run folder, of a RUN/ensemble."""
    run = RunFolder(folder.parent)
    if run.ensemble != folder or not run.config.exists():
        return None
    with contextlib.suppress(UserError):  # other people's config.json
        run.stored_config()
        return run.path
    return None


def _sampling(values: dict[str, Any], folder: epath.Path) -> SamplingSettings:
    """The sampling settings of a manifest, checked."""
    try:
        return SamplingSettings.from_dict(values)
    except ValueError as error:
        raise UserError(f"{folder / manifest.FILE_NAME}: sampling: {error}; {manifest.REMEDY}") from None


def expert_manifests(folder: epath.Path) -> dict[int, NetworkManifest]:
    """The manifest of each expert that an ensemble names, by its cluster."""
    entries, root = manifest.read(folder, EnsembleManifest).experts, _root(folder)
    return {
        int(k): manifest.read(safe_files.inside(folder, entry.path, root), NetworkManifest)
        for k, entry in sorted(entries.items())
    }


def read_single(folder: epath.PathLike, sampling: SamplingSettings | None = None) -> ExportedEnsemble:
    """One trained network on its own, such as the monolith, used through the same sampler.

    `sampling` are its sampling settings, by default those that it was exported with.
    """
    part = exported.read(folder)
    experts = {part.manifest.cluster or 0: part}
    check_together(experts, None)
    return ExportedEnsemble(experts, None, sampling or _sampling(part.manifest.sampling, part.folder))
