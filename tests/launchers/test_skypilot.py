"""SkyPilot: managed jobs that its own parser accepts, recovered after preemptions and not for ever after errors."""

import pytest

from paris_jax.errors import UserError
from paris_jax.launchers import accelerators, skypilot
from paris_jax.launchers.commands import Commands
from paris_jax.launchers.skypilot import Settings, task

GPU = Settings(accelerator="h100:8", nodes=2, spot=True)
TPU = Settings(accelerator="v5e:4x4", spot=True, image="registry/paris:1")


def made(plan, name, settings):
    return task(plan.stage(name), plan, settings, accelerators.parse(settings.accelerator, settings.nodes))


def test_skypilot_reads_the_tasks_and_would_find_a_misspelt_field(plan, faults):
    tasks = [
        [{"name": "all"}, *(made(plan, stage.name, settings) for stage in plan.stages)]
        for settings in (GPU, TPU, Settings(accelerator="v6e:2x4", infra="gcp/us-central2"))
    ]
    *found, of_wrong = faults("skypilot", [*tasks, [made(plan, "router", GPU) | {"num_node": 2}]])
    assert found == [[], [], []]
    assert "num_node" in of_wrong[0]


def test_preemptions_recover_without_end_and_errors_do_not(plan):
    recovery = made(plan, "router", GPU)["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]}
    assert made(plan, "assemble", GPU)["resources"]["job_recovery"]["max_restarts_on_errors"] == 0


def test_nodes_find_each_other(plan):
    role = made(plan, "expert 1", GPU)
    assert role["num_nodes"] == 2 and role["resources"]["accelerators"] == {"H100": 8}
    assert "SKYPILOT_NODE_RANK" in role["run"] and "launch/job.sh gpu:16 exit train" in role["run"]
    assert role["setup"] == "./launch/install.sh cuda12 gcs evaluation"


def test_a_slice_is_one_node_whose_hosts_join(plan):
    role = made(plan, "monolith", TPU)
    assert role["num_nodes"] == 1 and role["resources"]["accelerators"] == "tpu-v5litepod-16:1"
    assert "PARIS_JAX_JOIN_HOSTS=1" in role["run"] and "setup" not in role


def test_only_stages_that_use_an_accelerator_request_one(plan):
    assert [stage.name for stage in plan.stages if "accelerators" in made(plan, stage.name, GPU)["resources"]] == [
        *("expert 0", "expert 1", "expert 2", "router", "monolith", "evaluate")
    ]


def test_no_job_is_queued_twice(plan, stand_in, capsys):
    queue = '[{"job_id": 3, "job_name": "shapes-router"}, {"job_id": 4, "job_name": "shapes-expert-0"}]'
    calls = stand_in("sky", f"case \"$*\" in *queue*) echo '{queue}';; esac")
    skypilot.launch("train", plan, GPU, Commands())
    launched = [call.split("--name=")[1].split()[0] for call in calls() if " launch " in call]
    assert launched == ["shapes-expert-1", "shapes-expert-2", "shapes-monolith"]
    assert "shapes-router is queued or running already" in capsys.readouterr().out


def test_stages_before_and_after_the_roles_are_pipelines(plan, capsys):
    skypilot.launch("finish", plan, GPU, Commands(dry_run=True))
    shown = capsys.readouterr().out
    assert shown.index("name: shapes-assemble") < shown.index("name: shapes-evaluate") and "---" in shown


def test_an_unreadable_queue_starts_no_job(plan, stand_in):
    calls = stand_in("sky", "exit 1")
    with pytest.raises(UserError, match="'sky jobs queue' failed"):
        skypilot.launch("train", plan, GPU, Commands())
    assert len(calls()) == 1


def test_logs_are_of_one_role(plan, stand_in):
    with pytest.raises(UserError, match="--role is missing"):
        skypilot.launch("logs", plan, GPU, Commands(dry_run=True))
    calls = stand_in("sky")
    skypilot.launch("logs", plan, GPU, Commands(), role="expert 2")
    assert calls() == ["sky jobs logs --name=shapes-expert-2 --no-follow"]


def test_prepare_runs_on_several_nodes_that_do_not_join(plan):
    prepare = made(plan.with_prepare_workers(16), "prepare", GPU)
    assert prepare["num_nodes"] == 16 and "--shard=auto/16" in prepare["run"]
    assert "JAX_COORDINATOR_ADDRESS" not in prepare["run"] and "accelerators" not in prepare["resources"]
