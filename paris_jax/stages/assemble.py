"""`paris-jax assemble`: checks every expert and the router, and admits them to RUN/ensemble."""

import dataclasses
import logging

from paris_jax import manifest
from paris_jax.ensemble import bundle, parts
from paris_jax.errors import Refused
from paris_jax.experiment import Experiment
from paris_jax.run_folder import Role, RunFolder

logger = logging.getLogger(__name__)


def assemble(experiment: Experiment, run: RunFolder, allow_missing: bool = False) -> None:
    """Admits the experts and the router of a run, each checked file by file and array by array.

    Args:
      allow_missing: admit the experts that are there; at least one, and the router, must be.
    """
    run.claim(experiment.to_dict(), experiment.hash)
    clusters = range(experiment.partition.num_clusters)
    absent = [k for k in clusters if not manifest.exists(run.export(Role("expert", k)))]
    if absent and (not allow_missing or len(absent) == len(clusters)):
        which = ", ".join(map(str, absent))
        raise Refused(
            f"Expert {which} is not trained: run 'paris-jax train --workdir={run} --role=expert --cluster={absent[0]}' "
            "first, or assemble without with --allow_missing"
        )
    if not manifest.exists(run.export(Role("router"))):
        raise Refused(f"The router is not trained: run 'paris-jax train --workdir={run} --role=router' first")
    experts = {k: parts.read(run.export(Role("expert", k))) for k in clusters if k not in absent}
    router = parts.read(run.export(Role("router")))
    for part in [*experts.values(), router]:
        if part.manifest["config_hash"] != experiment.hash:
            raise Refused(f"{part.folder} was trained with another config than {run.config}; train it again here")
    before = _text(run)
    bundle.write(run.ensemble, experts, router, dataclasses.asdict(experiment.sampling), experiment.hash)
    missing = f", without expert {', '.join(map(str, absent))}" if absent else ""
    holds = "holds" if _text(run) != before else "was assembled already and holds"
    logger.info("%s %s %d experts and the router%s", run.ensemble, holds, len(experts), missing)


def _text(run: RunFolder) -> str:
    return (run.ensemble / manifest.FILE_NAME).read_text() if manifest.exists(run.ensemble) else ""
