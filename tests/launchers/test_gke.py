"""GKE: JobSets that the published models of JobSet and Kubernetes accept, and xpk workloads that xpk's parser does."""

import copy
import json
import shlex

import pytest
import yaml

from paris_jax.errors import UserError
from paris_jax.launchers import accelerators, gke
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.gke import Settings

TPU = Settings(image="registry/paris:1", accelerator="v5e:4x4", queue="team", service_account="writer", spot=True)
GPU = Settings(image="registry/paris:1", accelerator="h100:8", nodes=2, volume="runs:/runs")


def manifest(plan, settings, action="submit", role=""):
    accelerator = accelerators.parse(settings.accelerator, settings.nodes)
    plan = plan.only(role)
    wanted = gke.GROUPS.get(action) or [stage.name for stage in plan.stages]
    return gke.jobset("shapes", plan, [stage for stage in plan.stages if stage.name in wanted], settings, accelerator)


def jobs(made):
    return {job["name"]: job["template"]["spec"] for job in made["spec"]["replicatedJobs"]}


def container(job):
    (only,) = job["template"]["spec"]["containers"]
    return only


def test_jobsets_are_valid_and_a_misspelt_field_would_be_found(plan, faults):
    made = [manifest(plan, settings, action) for settings in (TPU, GPU) for action in ("submit", "data", "finish")]
    made[1] = manifest(plan.with_prepare_workers(16), TPU, "data")
    wrong = copy.deepcopy(made[0])
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolice"] = {}
    *found, of_wrong = faults("jobset", [*made, wrong])
    assert found == [[]] * 6
    assert of_wrong == ["jobset.spec.replicatedJobs[0].template.spec.podFailurePolice is unknown"]


def test_each_stage_is_a_replicated_job_that_depends_on_its_inputs(plan):
    made = manifest(plan, TPU)
    assert list(jobs(made)) == [stage.slug for stage in plan.stages]
    before = {job["name"]: [d["name"] for d in job.get("dependsOn", [])] for job in made["spec"]["replicatedJobs"]}
    assert before["prepare"] == [] and before["cluster"] == ["prepare"] and before["router"] == ["cluster"]
    # JobSets up to 0.10 take one dependency, so assemble waits for the roles by itself.
    assert before["assemble"] == ["cluster"] and before["evaluate"] == ["assemble"]
    assert container(jobs(made)["assemble"])["command"][-1] == f"--wait={gke.WAIT}"
    assert "--wait" not in str(manifest(plan, TPU, "finish"))  # the roles are done by then


def test_a_slice_is_one_pod_for_each_host(plan):
    role = jobs(manifest(plan, TPU))["expert-1"]
    assert (role["parallelism"], role["completions"], role["completionMode"]) == (4, 4, "Indexed")
    assert container(role)["command"][:3] == ["launch/job.sh", "tpu:16", "exit"]
    assert container(role)["resources"] == {"limits": {"google.com/tpu": "4"}}
    assert role["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }


def test_pods_on_gpu_nodes_find_each_other(plan):
    role = container(jobs(manifest(plan, GPU))["router"])
    variables = {each["name"]: each.get("value") for each in role["env"]}
    assert variables["JAX_COORDINATOR_ADDRESS"] == "shapes-router-0-0.shapes:8476"
    assert variables["JAX_NUM_PROCESSES"] == "2" and "JAX_PROCESS_ID" in variables
    assert role["command"][1] == "gpu:16" and role["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert {mount["mountPath"] for mount in role["volumeMounts"]} == {"/dev/shm", "/runs"}


def test_only_stages_that_use_an_accelerator_request_one(plan):
    for settings, asking in ((TPU, ["router"]), (GPU, ["router", "evaluate"])):
        made = jobs(manifest(plan, settings))
        assert [name for name in ("prepare", "cluster", "assemble", "router", "evaluate")
                if "limits" in container(made[name])["resources"]] == asking  # fmt: skip


def test_preemptions_do_not_count_refusals_end_and_memory_kills_are_counted(plan):
    role = jobs(manifest(plan, TPU))["router"]
    refused, disrupted, preempted = role["podFailurePolicy"]["rules"]
    assert (refused["action"], refused["onExitCodes"]["values"]) == ("FailJob", [1])
    assert (disrupted["action"], disrupted["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (preempted["action"], preempted["onExitCodes"]["values"]) == ("Ignore", [75])
    assert role["backoffLimit"] == 12  # 137 without a disruption, as of the kernel's memory killer


@pytest.fixture
def cluster(stand_in, tmp_path, monkeypatch):
    """kubectl with the JobSets of a file."""
    (tmp_path / "jobsets").write_text('{"items": []}')
    monkeypatch.setenv("JOBSETS", str(tmp_path / "jobsets"))
    return stand_in("kubectl", 'case "$*" in *"get jobsets"*) cat $JOBSETS;; *create*) cat >$JOBSETS.created;; esac')


def listed(tmp_path, made, **status):
    (tmp_path / "jobsets").write_text(json.dumps({"items": [{**made, "status": status}]}))


def test_no_job_is_queued_twice_and_ended_ones_are_replaced(plan, cluster, tmp_path, capsys):
    gke.launch("submit", plan, TPU, Commands())
    made = yaml.safe_load((tmp_path / "jobsets.created").read_text())
    assert made == manifest(plan, TPU)
    listed(tmp_path, made)
    before = len(cluster())
    for action, role in (("submit", ""), ("train", ""), ("train", "router"), ("data", "")):
        gke.launch(action, plan, TPU, Commands(), role=role)
    assert all(" get jobsets " in call for call in cluster()[before:])
    assert "router is queued or running already, in shapes" in capsys.readouterr().out
    listed(tmp_path, made, terminalState="Failed")
    gke.launch("submit", plan, TPU, Commands())
    assert [call.split()[2] for call in cluster()[-3:]] == ["get", "delete", "create"]


def test_xpk_accepts_the_workloads(plan, faults, capsys):
    workloads = []
    for accelerator, nodes, device in (
        ("v5e:4x4", 1, "--tpu-type=v5litepod-16"),
        ("v5p:2x2x4", 1, "--tpu-type=v5p-32"),
        ("h100:8", 2, "--device-type=h100-80gb-8"),
    ):
        settings = Settings(image="i", accelerator=accelerator, nodes=nodes, via="xpk", cluster_name="c", zone="z")
        gke.launch("train", plan, settings, Commands(dry_run=True))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("xpk ")]
        assert len(lines) == len(plan.roles) and all(device in line for line in lines)
        workloads += [shlex.split(line)[1:] for line in lines]
    *found, of_wrong = faults("xpk", [*workloads, [*workloads[0], "--tpu_typ=x"]])
    assert found == [[]] * len(workloads) and of_wrong


def test_xpk_starts_no_workload_twice(plan, stand_in):
    stand_in("kubectl", 'case "$*" in *shapes-router*) echo jobset/shapes-router;; esac')
    calls = stand_in("xpk")
    gke.launch("train", plan, Settings(image="i", accelerator="v6e:2x4", via="xpk", cluster_name="c"), Commands())
    started = [call for call in calls() if call.startswith("xpk")]
    assert len(started) == len(plan.roles) - 1 and not any("shapes-router" in call for call in started)


@pytest.mark.parametrize(
    "settings, action, role, sentence",
    [
        (Settings(accelerator="v5e:4x4"), "submit", "", "--image is missing"),
        (Settings(image="i"), "submit", "", "--accelerator=: must be a TPU slice such as v5e:4x4"),
        (Settings(image="i", accelerator="v5p:4x4"), "submit", "", "--accelerator=v5p:4x4: must be"),
        (Settings(image="i", accelerator="v5e:4x4", nodes=2), "submit", "", "--nodes=2: goes with GPUs"),
        (Settings(image="i", accelerator="v5e:4x4", volume="x"), "submit", "", "--volume=x: must be CLAIM:/path"),
        (Settings(image="i", accelerator="v5e:4x4"), "data", "router", "--role=router: names a role, and 'data'"),
        (Settings(image="i", accelerator="v5e:4x4", via="xpk"), "submit", "", "--via=xpk: workloads cannot wait"),
        (Settings(image="i", accelerator="v5e:4x4", via="xpk"), "train", "", "--cluster_name is missing"),
    ],
)
def test_missing_or_wrong_flags_are_refused(plan, settings, action, role, sentence):
    with pytest.raises(UserError, match=sentence):
        gke.launch(action, plan, settings, Commands(dry_run=True), role=role)


@pytest.mark.parametrize(
    "text, hosts, per_host", [("v6e:1x1", 1, 1), ("v5e:2x4", 1, 8), ("v5p:2x2x1", 1, 4), ("v4:2x2x2", 2, 4)]
)
def test_hosts_of_slices(text, hosts, per_host):
    found = accelerators.parse(text)
    assert (found.hosts, found.per_host) == (hosts, per_host)


def test_prepare_is_an_indexed_job(plan):
    made = manifest(plan.with_prepare_workers(16), TPU)
    prepare = jobs(made)["prepare"]
    assert (prepare["parallelism"], prepare["completions"], prepare["completionMode"]) == (16, 16, "Indexed")
    assert container(prepare)["command"][-1] == "--shard=auto/16"
    before = {job["name"]: [d["name"] for d in job.get("dependsOn", [])] for job in made["spec"]["replicatedJobs"]}
    assert before["finish-data"] == ["prepare"] and before["cluster"] == ["finish-data"]
    assert list(jobs(manifest(plan.with_prepare_workers(16), TPU, "data"))) == ["prepare", "finish-data", "cluster"]
