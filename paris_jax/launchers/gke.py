"""GKE: a JobSet with one replicated job for each stage, or one xpk workload for each role."""

import dataclasses
import json
import shlex
from typing import Any

from paris_jax.config.fields import setting
from paris_jax.errors import UserError
from paris_jax.interrupts import ERROR, PREEMPTED
from paris_jax.launchers import accelerators, manifests
from paris_jax.launchers.accelerators import Accelerator
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.stages import DATA_STAGES, FINISH_STAGES, LauncherSettings, Plan, Stage

ACTIONS = {
    "submit": "everything in one JobSet, whose stages wait for each other",
    "data": "prepare and cluster",
    "train": "every role",
    "finish": "assemble and evaluate",
    "status": "prints the JobSets and their pods",
    "logs": "prints the last lines of the pods; --follow with --role follows one",
    "stop": "deletes the JobSets; roles save first",
}
DEFAULT_ACTION = "submit"
PORT = 8476  # of process 0 of a role on several GPU nodes
RETRIES = 3  # of a pod that failed and was not preempted
WAIT = 7 * 24 * 3600  # seconds that assemble waits for the roles
GROUPS = {"data": DATA_STAGES, "finish": FINISH_STAGES}


@dataclasses.dataclass(frozen=True)
class Settings(LauncherSettings):
    """Flags of this launcher."""

    image: str = setting("", "container image, built from launch/Dockerfile.tpu or launch/Dockerfile.gpu")
    accelerator: str = setting("", "devices of each role: v5e:4x4, or h100:8")
    nodes: int = setting(1, "nodes of each role", at_least=1)
    via: str = setting("jobset", "scheduler of the roles", choices=("jobset", "xpk"))
    cluster_name: str = setting("", "GKE cluster, for xpk")
    project: str = setting("", "Google Cloud project")
    zone: str = setting("", "zone of the cluster, for xpk")
    namespace: str = setting("default", "Kubernetes namespace")
    queue: str = setting("", "Kueue's local queue, if the cluster has one")
    service_account: str = setting("", "Kubernetes service account that may write the bucket")
    volume: str = setting("", "CLAIM:/path, a persistent volume claim to mount where --workdir is no bucket")
    spot: bool = setting(False, "slices (or nodes) that may be taken away, at a lower price")


def launch(
    action: str, plan: Plan, settings: Settings, commands: Commands, role: str = "", follow: bool = False
) -> None:
    commands.require("kubectl", "install it and get the cluster's credentials")
    base = ["kubectl", f"--namespace={settings.namespace}"]
    names = [_jobset_name(plan, group) for group in ("", "data", "train", "finish")]
    if action == "status":
        commands.must_run([*base, "get", "jobsets,pods", f"--selector=paris-jax/run={plan.name}"])
        return
    if action == "logs":
        selector = f"--selector=paris-jax/run={plan.name}" + (
            f",paris-jax/stage={plan.only(role).stages[0].slug}" * bool(role)
        )
        shown = ["--follow", "--max-log-requests=64"] if follow else ["--tail=20"]
        commands.must_run([*base, "logs", selector, "--prefix", *shown])
        return
    if action == "stop":
        of_roles = [plan.job_name(stage) for stage in plan.only(role).roles]
        if settings.via == "xpk":
            for stage in plan.only(role).roles:
                commands.must_run(_xpk("delete", plan, stage, settings))
        commands.must_run(
            [*base, "delete", "jobset", "--ignore-not-found", *(of_roles if role else [*names, *of_roles])]
        )
        return
    if not settings.image:
        raise UserError("--image is missing; build one with launch/Dockerfile.tpu or launch/Dockerfile.gpu and push it")
    accelerator = accelerators.parse(settings.accelerator, settings.nodes)
    plan = plan.with_prepare_workers(settings.prepare_workers).only(role)
    if settings.via == "xpk" and action == "submit":
        raise UserError("--via=xpk: workloads cannot wait for each other; start data, train and finish in turn")
    if settings.via == "xpk" and action == "train":
        _start_workloads(plan, settings, accelerator, commands)
        return
    wanted = GROUPS.get(action) or [s.name for s in plan.stages if s.is_role or action == "submit"]
    stages = [stage for stage in plan.stages if stage.name in wanted]
    if not stages:
        raise UserError(f"--role={role}: names a role, and '{action}' starts none")
    name = _jobset_name(plan, "" if action == "submit" else action)
    if role and action == "train":
        name = plan.job_name(stages[0])
    apply(name, jobset(name, plan, stages, settings, accelerator), base, commands)


def apply(name: str, manifest: dict[str, Any], base: list[str], commands: Commands) -> None:
    """Creates a JobSet; where one of the run has a stage of it and has not ended, nothing is created."""
    run = manifest["metadata"]["labels"]["paris-jax/run"]
    listing = commands.read([*base, "get", "jobsets", f"--selector=paris-jax/run={run}", "--output=json"])
    if listing is None:
        raise UserError("kubectl cannot read the cluster's JobSets; get its credentials, and install JobSet there")
    wanted = {job["name"] for job in manifest["spec"]["replicatedJobs"]}
    for other in json.loads(listing or '{"items": []}')["items"]:
        has_ended = bool(other.get("status", {}).get("terminalState"))
        both = wanted & {job["name"] for job in other["spec"]["replicatedJobs"]}
        if both and not has_ended:
            commands.say(f"{', '.join(sorted(both))} is queued or running already, in {other['metadata']['name']}")
            return
        if other["metadata"]["name"] == name:
            commands.must_run([*base, "delete", "jobset", name])
    commands.must_run([*base, "create", "--filename=-"], manifests.to_yaml([manifest]))


def _jobset_name(plan: Plan, group: str) -> str:
    return f"{plan.name}-{group}" if group else plan.name


def jobset(name: str, plan: Plan, stages: list[Stage], settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """The manifest of a JobSet: one replicated job for each stage, started once the stages before it are done."""
    labels = {"paris-jax/run": plan.name}
    if settings.queue:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    slugs = {stage.name: stage.slug for stage in stages}
    jobs = []
    for stage in stages:
        job = {"name": stage.slug, "replicas": 1, "template": _job(name, plan, stage, stages, settings, accelerator)}
        # Older JobSets take one dependency only, so assemble starts with the roles and waits for their exports itself.
        before = "cluster" if stage.name == "assemble" else next(iter(stage.after), None)
        if before in slugs:
            job["dependsOn"] = [{"name": slugs[before], "status": "Complete"}]
        jobs.append(job)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "namespace": settings.namespace, "labels": labels},
        # A refused stage ends the set: the other roles get SIGTERM and save, as on one machine.
        "spec": {"failurePolicy": {"maxRestarts": 0}, "network": {"enableDNSHostnames": True}, "replicatedJobs": jobs},
    }


def _job(
    name: str, plan: Plan, stage: Stage, stages: list[Stage], settings: Settings, accelerator: Accelerator
) -> dict[str, Any]:
    """The job of one stage, one pod for each host."""
    hosts = accelerator.hosts if stage.is_role else stage.workers
    labels = {"paris-jax/run": plan.name, "paris-jax/stage": stage.slug}
    return {
        "metadata": {"labels": labels},
        "spec": {
            "completionMode": "Indexed",
            "parallelism": hosts,
            "completions": hosts,
            "backoffLimit": RETRIES * hosts,
            "podFailurePolicy": {
                "rules": [
                    # A refusal would be repeated; a preemption does not count; memory and other losses do.
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [ERROR]}},
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [PREEMPTED]}},
                ]
            },
            "template": {"metadata": {"labels": labels}, "spec": _pod(name, stage, stages, settings, accelerator)},
        },
    }


def _pod(name: str, stage: Stage, stages: list[Stage], settings: Settings, accelerator: Accelerator) -> dict[str, Any]:
    """The pod of one host; stages beside the roles take one, on the accelerator's nodes only where they use it."""
    devices, limits, selector = "cpu", {}, {}
    if stage.is_role or (stage.needs_accelerator and accelerator.kind == "gpu"):
        count = accelerator.per_host if stage.is_role else 1
        devices = accelerator.devices if stage.is_role else "gpu:1"
        resource = "google.com/tpu" if accelerator.kind == "tpu" else "nvidia.com/gpu"
        limits = {resource: str(count)}
        selector = node_selector(accelerator, settings.spot)
    arguments = list(stage.arguments)
    if stage.name == "assemble" and any(each.is_role for each in stages):
        arguments.append(f"--wait={WAIT}")
    container: dict[str, Any] = {
        "name": "paris-jax",
        "image": settings.image,
        "command": ["launch/job.sh", devices, "exit", *arguments],
        "resources": {"limits": limits} if limits else {"requests": {"cpu": "2", "memory": "8Gi"}},
    }
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 120, "containers": [container]}
    if stage.is_role and accelerator.kind == "gpu" and accelerator.hosts > 1:
        container["env"] = _rendezvous(name, stage, accelerator.hosts)
    if selector:
        pod["nodeSelector"] = selector
    if limits and accelerator.kind == "gpu":
        pod["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]  # NCCL's
        container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
    if settings.volume:
        claim, _, path = settings.volume.partition(":")
        if not path.startswith("/"):
            raise UserError(f"--volume={settings.volume}: must be CLAIM:/path")
        pod.setdefault("volumes", []).append({"name": "run", "persistentVolumeClaim": {"claimName": claim}})
        container.setdefault("volumeMounts", []).append({"name": "run", "mountPath": path})
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    return pod


def _rendezvous(name: str, stage: Stage, hosts: int) -> list[dict[str, Any]]:
    """The variables by which JAX joins the pods of a role on GPU nodes; on TPUs, GKE sets its own."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{stage.slug}-0-0.{name}:{PORT}"},
        {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
        {"name": "JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def node_selector(accelerator: Accelerator, spot: bool) -> dict[str, str]:
    if accelerator.kind == "tpu":
        label = accelerators.TPUS[accelerator.name].label
        labels = {
            "cloud.google.com/gke-tpu-accelerator": label,
            "cloud.google.com/gke-tpu-topology": accelerator.topology,
        }
    else:
        labels = {"cloud.google.com/gke-accelerator": accelerators.GPUS[accelerator.name][0]}
    return labels | ({"cloud.google.com/gke-spot": "true"} if spot else {})


def _start_workloads(plan: Plan, settings: Settings, accelerator: Accelerator, commands: Commands) -> None:
    """Creates one xpk workload for each role that has none."""
    commands.require("xpk", "pip install xpk")
    for stage in plan.roles:
        get = ["kubectl", "get", "jobset", plan.job_name(stage), "--ignore-not-found", "--output=name"]
        if commands.read(get):
            commands.say(f"{plan.job_name(stage)} is queued or running already; delete it first to start it again")
            continue
        commands.must_run(_xpk("create", plan, stage, settings, accelerator))


def _xpk(verb: str, plan: Plan, stage: Stage, settings: Settings, accelerator: Accelerator | None = None) -> list[str]:
    if not settings.cluster_name:
        raise UserError("--cluster_name is missing; xpk needs the name of the GKE cluster")
    place = [f"--cluster={settings.cluster_name}"]
    place += [f"--{name}={value}" for name in ("project", "zone") if (value := getattr(settings, name))]
    command = ["xpk", "workload", verb, f"--workload={plan.job_name(stage)}", *place]
    if accelerator is None:
        return [*command, "--force"]
    if accelerator.kind == "tpu":
        device = [f"--tpu-type={accelerator.tpu_type}", "--num-slices=1"]
    else:
        kind = accelerators.GPUS[accelerator.name][1]
        device = [f"--device-type={kind}-{accelerator.per_host}", f"--num-nodes={accelerator.hosts}"]
    inside = shlex.join(["launch/job.sh", accelerator.devices, "exit", *stage.arguments])
    restart = [
        f"--restart-on-exit-codes={PREEMPTED}",
        f"--max-restarts={RETRIES}",
        "--termination-grace-period-seconds=120",
    ]
    return [*command, *device, f"--docker-image={settings.image}", *restart, f"--command=cd /paris_jax && {inside}"]
