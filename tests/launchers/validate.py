"""Validates manifests with the schedulers' own code; runs in the environment that launch/schedulers.txt describes.

    .venv-schedulers/bin/python tests/launchers/validate.py jobset|skypilot|xpk <LIST_OF_MANIFESTS

Prints a JSON list with the faults of each manifest. All go through one process, because imports take seconds.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from typing import Any


def dropped(given: Any, kept: Any, where: str) -> Iterator[str]:
    """Fields that a model does not know, and values that it changes."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name in kept:
                yield from dropped(value, kept[name], f"{where}.{name}")
            else:
                yield f"{where}.{name} is unknown"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for k, (one, other) in enumerate(zip(given, kept)):
            yield from dropped(one, other, f"{where}[{k}]")
    elif given != kept:
        yield f"{where}: {given!r} became {kept!r}"


def jobset(manifest: dict[str, Any]) -> Iterator[str]:
    """The models of JobSet and Kubernetes that Kubeflow's trainer generates from their published OpenAPI schemas."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    yield from dropped(manifest, JobsetV1alpha2JobSet.from_dict(manifest).to_dict(), "jobset")


def skypilot(documents: list[dict[str, Any]]) -> Iterator[str]:
    """SkyPilot's parser of managed jobs."""
    import yaml
    from sky.utils import dag_utils

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump_all(documents, file)
        file.flush()
        dag = dag_utils.load_chain_dag_from_yaml(file.name)
    wanted = len([d for d in documents if "run" in d])
    if len(dag.tasks) != wanted:
        yield f"{len(dag.tasks)} tasks were read and {wanted} written"


def xpk(arguments: list[str]) -> Iterator[str]:
    """xpk's parser of its command line, and its list of device types."""
    from xpk.core.system_characteristics import UserFacingNameToSystemCharacteristics
    from xpk.parser.core import set_parser

    parser = argparse.ArgumentParser("xpk")
    set_parser(parser)
    parsed = parser.parse_args(arguments)
    kind = getattr(parsed, "tpu_type", None) or getattr(parsed, "device_type", None)
    if kind not in UserFacingNameToSystemCharacteristics:
        yield f"{kind} is no device type of xpk"


def faults(kind: str, given: Any) -> list[str]:
    try:
        return list({"jobset": jobset, "skypilot": skypilot, "xpk": xpk}[kind](given))
    except (Exception, SystemExit) as error:  # whatever a parser raises
        return [f"{type(error).__name__}: {error}"]


if __name__ == "__main__":
    found = [faults(sys.argv[1], given) for given in json.load(sys.stdin)]
    print(json.dumps(found))
