"""SkyPilot: managed jobs on any cloud, one for each role; SkyPilot brings preempted ones back."""

import dataclasses
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paris_jax.config.fields import setting
from paris_jax.errors import UserError
from paris_jax.interrupts import PREEMPTED
from paris_jax.launchers import accelerators, manifests
from paris_jax.launchers.accelerators import GPUS, TPUS, Accelerator
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.stages import DATA_STAGES, FINISH_STAGES, LauncherSettings, Plan, Stage

ACTIONS = {
    "data": "prepare and cluster, one after the other",
    "train": "every role that is not queued yet",
    "finish": "assemble and evaluate, one after the other",
    "status": "prints the managed jobs",
    "logs": "prints the log of one role (--role)",
    "stop": "cancels the jobs; roles save first",
}
DEFAULT_ACTION = ""
PORT = 8476
RETRIES = 3
GROUPS = {"data": DATA_STAGES, "finish": FINISH_STAGES}


@dataclasses.dataclass(frozen=True)
class Settings(LauncherSettings):
    """Flags of this launcher."""

    accelerator: str = setting("", "devices of each role: v5e:4x4, or h100:8")
    nodes: int = setting(1, "nodes of each role", at_least=1)
    infra: str = setting("", "where: gcp, aws/us-east-1, k8s ...; by default the cheapest that SkyPilot finds")
    image: str = setting("", "container image, built from launch/Dockerfile.tpu or launch/Dockerfile.gpu")
    spot: bool = setting(False, "slices (or nodes) that may be taken away, at a lower price")


def launch(
    action: str, plan: Plan, settings: Settings, commands: Commands, role: str = "", follow: bool = False
) -> None:
    commands.require("sky", "pip install skypilot, with the extra of your cloud")
    if action == "status":
        commands.must_run(["sky", "jobs", "queue", "--refresh"])
        return
    if action == "logs":
        if not role:
            raise UserError("--role is missing; SkyPilot shows the log of one job")
        commands.must_run(
            [
                "sky",
                "jobs",
                "logs",
                f"--name={plan.job_name(plan.only(role).stages[0])}",
                *(() if follow else ("--no-follow",)),
            ]
        )
        return
    if action == "stop":
        of_roles = [plan.job_name(stage) for stage in plan.only(role).roles]
        for name in of_roles if role else [f"{plan.name}-data", *of_roles, f"{plan.name}-finish"]:
            commands.run(["sky", "jobs", "cancel", "--yes", f"--name={name}"])
        return
    accelerator = accelerators.parse(settings.accelerator, settings.nodes)
    if role and action != "train":
        raise UserError(f"--role={role}: names a role, and '{action}' starts none")
    queued, plan = _queued_names(commands), plan.with_prepare_workers(settings.prepare_workers).only(role)
    if action == "train":
        jobs = {plan.job_name(stage): [task(stage, plan, settings, accelerator)] for stage in plan.roles}
    else:
        stages = [plan.stage(name) for name in GROUPS[action] if name in {stage.name for stage in plan.stages}]
        jobs = {
            f"{plan.name}-{action}": [
                {"name": f"{plan.name}-{action}"},
                *(task(s, plan, settings, accelerator) for s in stages),
            ]
        }
    for name, documents in jobs.items():
        if name in queued:
            commands.say(f"{name} is queued or running already")
        else:
            _submit(name, documents, commands)


def _queued_names(commands: Commands) -> set[str]:
    """Names of the managed jobs that have not ended."""
    listing = commands.read(["sky", "jobs", "queue", "--skip-finished", "--all", "--output=json"])
    if listing is None:
        raise UserError("'sky jobs queue' failed; run it to see why")
    # Warnings of the client may stand around the JSON.
    return set(re.findall(r'"job_name": "([^"]*)"', listing))


def _submit(name: str, documents: Sequence[dict[str, Any]], commands: Commands) -> None:
    text = manifests.to_yaml(documents)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        command = ["sky", "jobs", "launch", "--yes", "--detach-run", f"--name={name}"]
        if commands.dry_run:
            commands.say(f"{shlex.join([*command, file.name])} # with {file.name}:\n{text}")
            return
        file.write_text(text)
        commands.must_run([*command, os.fspath(file)])


def task(stage: Stage, plan: Plan, settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """The task of one stage. Stages beside the roles take one node, with one GPU where they use one."""
    nodes, devices = stage.workers, "cpu"
    resources: dict[str, Any] = {"infra": settings.infra} if settings.infra else {}
    if settings.image:
        resources["image_id"] = f"docker:{settings.image}"
    if stage.is_role:
        nodes, devices = accelerator.hosts if accelerator.kind == "gpu" else 1, accelerator.devices
        resources |= _resources(accelerator, settings.spot)
    elif stage.needs_accelerator and accelerator.kind == "gpu":
        devices = "gpu:1"
        resources["accelerators"] = {GPUS[accelerator.name][2]: 1}
    else:
        resources |= {"cpus": "4+", "memory": "16+"}
    # Exit code 75 does not count as an error; others do, memory among them.
    resources["job_recovery"] = {
        "max_restarts_on_errors": RETRIES if stage.is_role else 0,
        "recover_on_exit_codes": [PREEMPTED],
    }
    made: dict[str, Any] = {"name": plan.job_name(stage), "resources": resources, "num_nodes": nodes}
    if not settings.image:
        made |= {"workdir": ".", "setup": f"./launch/install.sh {_extras(devices, plan.workdir)} evaluation"}
    made["run"] = _run(stage, devices, nodes, accelerator.hosts, bool(settings.image))
    return made


def _resources(accelerator: Accelerator, spot: bool) -> dict[str, Any]:
    spotted = {"use_spot": True} if spot else {}
    if accelerator.kind == "gpu":
        return {"accelerators": {GPUS[accelerator.name][2]: accelerator.per_host}, **spotted}
    runtime = TPUS[accelerator.name].runtime
    args = {"runtime_version": runtime}
    return {"infra": "gcp", "accelerators": f"tpu-{accelerator.tpu_type}:1", "accelerator_args": args, **spotted}


def _extras(devices: str, workdir: str) -> str:
    """The extras to install: for the devices, and for buckets."""
    extras = {"gpu": "cuda12", "tpu": "tpu"}.get(devices.partition(":")[0], "")
    return f"{extras} gcs".strip() if workdir.startswith("gs://") else extras


def _run(stage: Stage, devices: str, nodes: int, hosts: int, in_image: bool) -> str:
    lines = ["cd /paris_jax"] if in_image else []
    if nodes > 1 and stage.is_role:
        lines += [
            f'export JAX_COORDINATOR_ADDRESS="$(echo "$SKYPILOT_NODE_IPS" | head -n 1):{PORT}"',
            'export JAX_NUM_PROCESSES="$SKYPILOT_NUM_NODES" JAX_PROCESS_ID="$SKYPILOT_NODE_RANK"',
        ]
    elif hosts > 1 and stage.is_role:  # a slice of several hosts, each of which runs this
        lines.append("export PARIS_JAX_JOIN_HOSTS=1")
    return "\n".join([*lines, shlex.join(["launch/job.sh", devices, "exit", *stage.arguments])]) + "\n"
