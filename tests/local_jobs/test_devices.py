"""Devices are cut into disjoint groups, and a process that is given one sees and uses that one only."""

import os
import platform
import subprocess
import sys
import threading

import pytest

from paris_jax.errors import UserError
from paris_jax.local_jobs import devices
from paris_jax.local_jobs.devices import Devices, find_devices


def numbers(groups):
    return [",".join(group.numbers) for group in groups]


def of(kind, count):
    return Devices(kind, tuple(map(str, range(count))))


PARIS = [3, 1, 1, 1, 0.3]  # costs of the monolith, three experts and the router


@pytest.mark.parametrize(
    ("found", "num_roles", "groups"),
    [
        (of("cpu", 2), 5, ["0", "1"]),
        (of("cpu", 8), 5, ["0", "1", "2", "3", "4"]),
        (of("cpu", 7), 2, ["0,1,2", "3,4,5"]),
        (of("cpu", 4), 0, ["0,1,2,3"]),
        (Devices("cpu"), 5, [""]),  # cores that cannot be given out: in turn, on all of them
    ],
)
def test_cores_are_split_into_groups_of_one_size(found, num_roles, groups):
    assert numbers(found.groups([1.0] * num_roles)) == groups


@pytest.mark.parametrize(
    ("found", "work", "groups"),
    [
        (of("gpu", 1), PARIS, ["0"]),
        (of("gpu", 2), PARIS, ["0", "1"]),  # half each: the monolith, and all others in turn
        (of("gpu", 4), PARIS, ["0,1", "2,3"]),
        (of("gpu", 8), PARIS, ["0,1,2,3", "4", "5", "6", "7"]),
        (of("gpu", 8), [1, 1, 1], ["0,1", "2,3", "4,5"]),  # three would not divide a batch
        (of("tpu", 8), [1] * 4, ["0,1", "2,3", "4,5", "6,7"]),
        (Devices("gpu", ("4", "6")), [1] * 4, ["4", "6"]),
        (of("gpu", 8), [], ["0"]),
    ],
)
def test_accelerators_are_split_so_that_all_roles_end_early(found, work, groups):
    assert numbers(found.groups(work)) == groups


def test_the_size_of_a_group_divides_the_batch():
    assert numbers(of("gpu", 8).groups([1, 1], batch=6)) == ["0,1", "2,3"]


def test_a_job_expects_its_kind_and_number_of_devices():
    assert [each.expectation for each in (of("gpu", 2), of("tpu", 4), of("cpu", 2))] == ["gpu:2", "tpu:4", "cpu"]


def test_environment_variables_restrict_the_visible_devices():
    assert of("gpu", 2).environment() == {"CUDA_VISIBLE_DEVICES": "0,1"}
    tpu = of("tpu", 8).groups([1] * 4)[1].environment()
    assert tpu == {"TPU_VISIBLE_CHIPS": "2,3", "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,2,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
    assert of("cpu", 2).environment() == {"JAX_PLATFORMS": "cpu"}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are given out on Linux only")
def test_a_pinned_thread_and_its_processes_stay_on_their_core_and_others_do_not():
    allowed = os.sched_getaffinity(0)
    core = max(allowed)
    seen = []

    def work():
        Devices("cpu", (str(core),)).pin()
        code = "import os; print(sorted(os.sched_getaffinity(0)))"
        seen.append(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [f"[{core}]\n"]
    assert os.sched_getaffinity(0) == allowed


class TestFind:
    @pytest.fixture(autouse=True)
    def bare(self, monkeypatch):
        """A machine without accelerators, whatever this one has."""
        for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "TPU_ACCELERATOR_TYPE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(devices.shutil, "which", lambda _: None)
        monkeypatch.setattr(devices.glob, "glob", lambda _: [])
        monkeypatch.setattr(devices, "_cores", lambda: ("0", "1"))

    def test_without_accelerators_it_is_the_cores(self):
        assert find_devices("auto") == find_devices("cpu") == Devices("cpu", ("0", "1"))

    def test_gpus_and_chips_are_found(self, monkeypatch):
        monkeypatch.setattr(devices.glob, "glob", lambda p: ["a", "b"] if "nvidia" in p else [])
        assert find_devices("auto") == of("gpu", 2)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
        assert find_devices("auto") == Devices("gpu", ("5", "7"))
        assert find_devices("cpu").kind == "cpu"
        monkeypatch.setattr(devices.glob, "glob", lambda p: ["a"] * 4 if "accel" in p else [])
        assert find_devices("auto") == of("tpu", 4)
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
        assert find_devices("auto").kind == "cpu"

    def test_some_by_number(self):
        assert find_devices("gpu:4,6") == Devices("gpu", ("4", "6"))
        assert find_devices("cpu:1") == Devices("cpu", ("1",))

    @pytest.mark.parametrize(
        ("asked", "sentence"),
        [
            ("gpu:0,0", "--devices=gpu:0,0: must name different devices by number, as in gpu:0,1"),
            ("gpu:a", "must name different devices"),
            ("gpu", "--devices=gpu: must be auto, cpu"),
            ("cpu:9", "the cores that may be used here are 0,1"),
        ],
    )
    def test_absent_devices_are_refused(self, asked, sentence):
        with pytest.raises(UserError, match=sentence):
            find_devices(asked)


FAULTS = """
import resource, sys
from paris_jax.local_jobs.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def work():
    b"x" * (60 << 20)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can keep freed memory")
def test_freed_memory_is_used_again_without_faulting_it_in_anew():
    def faults(how):
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], check=True, capture_output=True).stdout)

    assert faults("keep") < 100
    assert faults("give back") > 10 * 1000
