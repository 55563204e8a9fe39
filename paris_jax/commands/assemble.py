"""`paris-jax assemble`: checks every expert and the router, and admits them to RUN/ensemble."""

import logging
import time
from collections.abc import Mapping, Sequence

from etils import epath

from paris_jax.artifacts import ensemble_manifest, exported, locks, manifest
from paris_jax.artifacts.run_folder import Role, RunFolder
from paris_jax.artifacts.validation import Validation
from paris_jax.commands.validate import check_network, show
from paris_jax.config import hashing
from paris_jax.config.experiment import Experiment
from paris_jax.errors import UserError

logger = logging.getLogger(__name__)
POLL = 10.0  # seconds between looks for networks that are not trained yet


def assemble(
    experiment: Experiment,
    run: RunFolder,
    allow_missing: bool = False,
    elsewhere: Mapping[int, epath.PathLike] | None = None,
    wait: float = 0.0,
    keys: Sequence[epath.PathLike] = (),
) -> None:
    """Admits the experts and the router of a run, each checked file by file and array by array.

    Args:
      allow_missing: admit the experts that are there; at least one, and the router, must be.
      elsewhere: of clusters, the export folder of an expert to copy instead of this run's: one of another size or
        objective, say, trained by another team, on the same clusters.
      wait: seconds to wait for networks of this run that are not trained yet.
      keys: PEM files of public keys, one of which must have signed each network.
    """
    _wait_for_roles(experiment, run, elsewhere or {}, wait)
    with locks.only_writer(run.ensemble):
        _assemble(experiment, run, allow_missing, elsewhere, keys)


def _assemble(
    experiment: Experiment,
    run: RunFolder,
    allow_missing: bool,
    elsewhere: Mapping[int, epath.PathLike] | None,
    keys: Sequence[epath.PathLike],
) -> None:
    run.claim(experiment.to_dict(), experiment.hash)
    elsewhere, clusters = dict(elsewhere or {}), range(experiment.clustering.num_clusters)
    beyond = sorted(elsewhere.keys() - set(clusters))
    if beyond:
        raise UserError(f"--expert={beyond[0]}:...: this experiment has clusters 0 to {len(clusters) - 1}")
    folders = {k: epath.Path(elsewhere.get(k, run.export(Role("expert", k)))) for k in clusters}
    absent = [k for k, folder in folders.items() if k not in elsewhere and not manifest.exists(folder)]
    if absent and (not allow_missing or len(absent) == len(clusters)):
        which = ", ".join(map(str, absent))
        raise UserError(
            f"Expert {which} is not trained: run 'paris-jax train --workdir={run} --role=expert --cluster={absent[0]}' "
            "first, or assemble without with --allow_missing"
        )
    if not manifest.exists(run.export(Role("router"))):
        raise UserError(f"The router is not trained: run 'paris-jax train --workdir={run} --role=router' first")
    validation = Validation()
    try:
        experts = {
            k: check_network(validation, folder, f"expert {k}", keys, None, run)
            for k, folder in folders.items()
            if k not in absent
        }
        router = check_network(validation, run.export(Role("router")), "router", keys, None, run)
        validation.peers(experts)
    finally:
        show(str(run.ensemble), validation)
    for part in [router, *(expert for k, expert in experts.items() if k not in elsewhere)]:
        if part.manifest.config_hash != experiment.hash:
            raise UserError(f"{part.folder} was trained with another config than {run.config}; train it again here")
    _check_kinds(experiment, experts, {k: part for k, part in experts.items() if k not in elsewhere})
    before = _text(run)
    experts = {k: _own_copy(part, run, k) if k in elsewhere else part for k, part in experts.items()}
    ensemble_manifest.write(run.ensemble, experts, router, experiment.sampling, experiment.hash)
    missing = f", without expert {', '.join(map(str, absent))}" if absent else ""
    from_elsewhere = f", {len(elsewhere)} of them from elsewhere" if elsewhere else ""
    holds = "holds" if _text(run) != before else "was assembled already and holds"
    logger.info("%s %s %d experts and the router%s%s", run.ensemble, holds, len(experts), from_elsewhere, missing)


def _wait_for_roles(
    experiment: Experiment, run: RunFolder, elsewhere: Mapping[int, epath.PathLike], wait: float
) -> None:
    """Waits until all experts and the router are exported, or for `wait` seconds."""
    experts = [Role("expert", k) for k in range(experiment.clustering.num_clusters) if k not in elsewhere]
    until, said = time.monotonic() + wait, ""
    while absent := [role.name for role in (*experts, Role("router")) if not manifest.exists(run.export(role))]:
        left = until - time.monotonic()
        if left <= 0:
            break
        if said != (said := ", ".join(absent)):
            logger.info("waiting for %s, for %.0f s at most", said, left)
        time.sleep(min(POLL, left))


def _check_kinds(
    experiment: Experiment, experts: Mapping[int, exported.ExportedNetwork], own: Mapping[int, exported.ExportedNetwork]
) -> None:
    """Refuses an expert that cannot be given frames in a run that gives some, and own ones of different beginnings."""
    for part in experts.values():
        if experiment.masks.kinds and not part.config.cond_frames:
            raise UserError(
                f"{part.folder} was trained without config.masks and cannot be given frames, as this run does"
            )
    starts = {k: part.manifest.training and part.manifest.training.init_from for k, part in own.items()}
    if len({hashing.canonical_json(start) for start in starts.values()}) > 1:
        raise UserError(
            f"The experts {', '.join(map(str, starts))} did not start from the same weights (training.init_from); "
            "train "
            "them again from the same"
        )


def _own_copy(part: exported.ExportedNetwork, run: RunFolder, cluster: int) -> exported.ExportedNetwork:
    """A copy of an expert from elsewhere in RUN/ensemble: an ensemble names no folder outside of its run folder."""
    folder = run.ensemble / "experts" / str(cluster)
    name = manifest.FILE_NAME
    if manifest.exists(folder) and (folder / name).read_bytes() == (part.folder / name).read_bytes():
        return exported.read(folder)
    return exported.copy(part, folder)


def _text(run: RunFolder) -> str:
    return (run.ensemble / manifest.FILE_NAME).read_text() if manifest.exists(run.ensemble) else ""
