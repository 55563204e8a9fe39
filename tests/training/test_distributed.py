"""Processes of one job find each other, or say why not; a process alone does not look for any."""

import os
import subprocess
import sys
import time

import jax
import pytest

from paris_jax import cli
from paris_jax.errors import UserError
from paris_jax.training import distributed
from paris_jax.training.distributed import join_processes, join_reason, with_flags
from tests.conftest import free_address

JOINED = (
    "from paris_jax.training.distributed import join_processes; join_processes(timeout=60); "
    "import jax; print(jax.process_count())"
)


@pytest.fixture
def address():
    return free_address()


def test_two_processes_are_one_job(address):
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", JOINED],
            env=os.environ | environment | {"JAX_PROCESS_ID": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in ended] == ["2\n", "2\n"], [err for _, err in ended]


@pytest.mark.parametrize(
    ("environment", "initialized"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}, ("a:1", 4, 0, None)),
        (  # Open MPI 5, which JAX does not know
            {
                **{"JAX_COORDINATOR_ADDRESS": "a:1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
                "OMPI_COMM_WORLD_LOCAL_RANK": "2",
            },
            ("a:1", 4, 0, 2),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, (None, None, None, None)),  # Open MPI 4: JAX knows
    ],
)
def test_jax_distributed_gets_coordinator_processes_and_rank(environment, initialized, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *who, **how: calls.append(who))
    join_processes(environment)
    assert calls == [initialized]


def test_flags_stand_before_the_environment_and_go_together():
    flags = {"coordinator": "a:1", "num_processes": 4, "process_id": 0}
    environment = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}
    assert with_flags(flags, {"JAX_PROCESS_ID": "3", "OTHER": "x"}) == environment | {"OTHER": "x"}
    assert with_flags(dict.fromkeys(flags), {"JAX_PROCESS_ID": "3"}) == {"JAX_PROCESS_ID": "3"}
    with pytest.raises(UserError, match="--coordinator and --num_processes must be given, too"):
        with_flags(flags | {"coordinator": None, "num_processes": None}, {})


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({}, ""),
        ({"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS=8"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "TPU_WORKER_HOSTNAMES names 2 hosts"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_COORDINATOR_ADDRESS=a:1"),
        ({"SLURM_NTASKS": "8", "PARIS_JAX_JOIN_HOSTS": "0"}, ""),
        ({"PARIS_JAX_JOIN_HOSTS": "1"}, "PARIS_JAX_JOIN_HOSTS=1"),
    ],
)
def test_processes_join_only_where_the_environment_names_several(environment, why):
    assert join_reason(environment) == why


def test_a_coordinator_that_does_not_answer_is_named_with_the_time_waited(address):
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    with pytest.raises(UserError, match=rf"The coordinator at {address} did not answer within 1 seconds .*=0 to run"):
        join_processes(environment, timeout=1)


def test_a_call_within_its_time_limit_returns():
    def late():
        raise UserError("too late")

    assert distributed.interruptible("a test", lambda: 5, late) == 5
    with pytest.raises(ZeroDivisionError):
        distributed.interruptible("a test", lambda: 1 // 0, late)
    with pytest.raises(UserError, match="too late"):
        distributed.interruptible("a test", lambda: time.sleep(1), late)
    assert distributed.has_abandoned_work()


OPEN_MPI_4 = {  # JAX makes the address of this
    **{"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
}


@pytest.mark.parametrize(
    ("environment", "preempted", "code", "said"),
    [
        ({}, False, 1, "error: Not all 2 processes of this job came to ADDRESS within 2 seconds; start those that"),
        ({}, True, 75, "preempted: finished work is kept; run the same command again"),
        (OPEN_MPI_4, False, 1, "error: Not all processes of this job came to the address that JAX found (above)"),
    ],
)
def test_a_job_whose_other_processes_never_come_ends_with_a_sentence(environment, preempted, code, said, address):
    command = (
        "import os, signal, sys, threading; from paris_jax.__main__ import main; "
        "from paris_jax.training import distributed; "
        "distributed.join_processes.__defaults__ = (os.environ, 2); "
        + ("threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start(); " if preempted else "")
        + "main()"
    )
    flags = [f"--coordinator={address}", "--num_processes=2", "--process_id=0"] if not environment else []
    ended = subprocess.run(
        [sys.executable, "-c", command, "train", "--workdir=nowhere", "--role=router", *flags],
        **{"env": os.environ | environment, "capture_output": True, "text": True, "timeout": 120},
    )
    assert ended.returncode == code, ended.stderr
    last = " ".join(ended.stderr.strip().splitlines()[-1].split())
    assert last.startswith(said.replace("ADDRESS", address)), ended.stderr
    if environment:
        assert "Connecting to JAX distributed service on 127.0.0.1:" in " ".join(ended.stderr.split())


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "host", "JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS=host: must be host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID=one: must be a whole number"),
        ({"PARIS_JAX_JOIN_HOSTS": "yes"}, "PARIS_JAX_JOIN_HOSTS=yes: must be 1"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, r"cannot be joined at a:1 \(asked for by JAX_COORDINATOR_ADDRESS=a:1\)"),
    ],
)
def test_an_incomplete_description_of_the_processes_is_refused(environment, sentence, monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"):  # JAX would look there
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=sentence):
        join_processes(environment)


@pytest.mark.parametrize(
    ("arguments", "joins"),
    [
        (["train"], True),
        (["sample"], False),
        (["sample", "--mesh=expert:8"], True),
        (["sample", "--coordinator=10.0.0.1:1", "--num_processes=8", "--process_id=0"], True),
        (["prepare"], False),
    ],
)
def test_sampling_joins_the_tasks_of_an_allocation_only_on_request(arguments, joins, monkeypatch):
    joined = []
    monkeypatch.setattr(distributed, "join_processes", joined.append)
    cli.start_jax(*cli.parse(arguments))
    assert bool(joined) == joins
