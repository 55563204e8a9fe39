"""The plan of a run: its stages, their order, their names, and roles that share places."""

import dataclasses

import pytest

from paris_jax.config.experiment import Experiment
from paris_jax.errors import UserError
from paris_jax.launchers.stages import make_plan, spread


def test_the_number_of_experts_is_the_configs(plan):
    names = [stage.name for stage in plan.stages]
    assert names == [
        *("prepare", "cluster", "expert 0", "expert 1", "expert 2", "router", "monolith", "assemble", "evaluate")
    ]
    two = Experiment.from_config({"clustering": {"num_clusters": 2}})
    assert [stage.name for stage in make_plan(two, "runs/x").roles] == ["expert 0", "expert 1", "router", "monolith"]


def test_stages_wait_for_their_inputs(plan):
    assert plan.stage("cluster").after == ("prepare",)
    assert all(role.after == ("cluster",) for role in plan.roles)
    assert plan.stage("assemble").after == ("expert 0", "expert 1", "expert 2", "router")  # the monolith is not in it
    assert plan.stage("evaluate").after == ("assemble", "monolith")


def test_assembling_and_clustering_need_no_accelerator_and_preparing_only_for_published_encoders(plan):
    wants = {stage.name for stage in plan.stages if stage.needs_accelerator}
    assert wants == {"expert 0", "expert 1", "expert 2", "router", "monolith", "evaluate"}
    dinov2 = Experiment.from_config({"features": {"name": "dinov2"}})
    assert make_plan(dinov2, "runs/x").stage("prepare").needs_accelerator


@pytest.mark.parametrize(
    "workdir, name",
    [
        ("gs://bucket/my run_2", "my-run-2"),
        ("runs/2026", "run-2026"),
        ("/shared/Shapes/", "shapes"),
        ("gs://b/" + "x" * 90, "x" * 24),
    ],
)
def test_jobs_are_named_after_the_run_folder(workdir, name):
    assert make_plan(Experiment(), workdir).name == name


def test_a_role_that_is_not_there_is_refused(plan):
    with pytest.raises(
        UserError, match=r"--role=expert 7: must be one of expert 0, expert 1, expert 2, router, monolith"
    ):
        plan.only("expert 7")


def test_roles_queue_over_fewer_places_and_each_is_placed_once(plan):
    queues = spread(plan.roles, [1.0, 1.0])
    assert queues[0][0].name == "monolith" and queues[1][0].name == "expert 0"  # the longest first
    assert sorted(stage.name for queue in queues for stage in queue) == sorted(stage.name for stage in plan.roles)
    work = [sum(stage.work for stage in queue) for queue in queues]
    assert max(work) < 1.2 * min(work)


def test_a_faster_place_gets_the_longer_roles(plan):
    queues = spread(plan.roles, [1.0, 3.0])
    work = [sum(stage.work for stage in queue) for queue in queues]
    assert queues[1][0].name == "monolith" and work[1] > 2 * work[0] > 0


def test_more_places_than_roles_leave_some_empty(plan):
    one = dataclasses.replace(plan, stages=plan.roles[:2])
    assert sorted(len(queue) for queue in spread(one.roles, [1.0] * 4)) == [0, 0, 1, 1]


def test_workers_of_an_array_share_the_shards_and_cluster_waits_for_the_manifest(plan):
    array = plan.with_prepare_workers(16)
    names = [stage.name for stage in array.stages]
    assert names[:3] == ["prepare", "finish data", "cluster"] and names[3:] == [s.name for s in plan.stages[2:]]
    assert array.stage("prepare").arguments == (*plan.stage("prepare").arguments, "--shard=auto/16")
    assert array.stage("finish data").arguments == (*plan.stage("prepare").arguments, "--finish")
    assert array.stage("cluster").after == ("finish data",) and array.stage("finish data").after == ("prepare",)
    assert [stage.workers for stage in array.stages[:2]] == [16, 1]
    assert plan.with_prepare_workers(1) == plan
