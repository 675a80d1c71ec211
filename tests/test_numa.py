"""Binding threads to the node of a GPU, on a machine made of files."""

from __future__ import annotations

import os
import threading

import jax
import pytest

from paxcache import offload
from paxcache.offload import _numa

BUS = "0000:1b:00.0"

pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot bind threads"
)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that describes a machine: the node of its GPU, and each node's cores."""

    def describe(node: int, **cpulists: str) -> None:
        place = tmp_path / "bus/pci/devices" / BUS
        place.mkdir(parents=True)
        (place / "numa_node").write_text(f"{node}\n")
        for name, cpulist in cpulists.items():
            (tmp_path / "devices/system/node" / name).mkdir(parents=True)
            (tmp_path / "devices/system/node" / name / "cpulist").write_text(cpulist + "\n")

    monkeypatch.setattr(_numa, "_SYSFS", tmp_path)
    monkeypatch.setattr(_numa, "_bus_id", lambda device: BUS)
    return describe


def in_a_thread(function):
    """The result of a function in a thread of its own, whose binding ends with it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_the_thread_runs_on_the_nodes_cores_alone(machine):
    here = sorted(os.sched_getaffinity(0))
    machine(1, node0="", node1=f"{here[-1]}")
    binding, after = in_a_thread(lambda: (offload.bind_thread(), os.sched_getaffinity(0)))
    assert binding == (1, {here[-1]}, "") and after == {here[-1]}
    assert sorted(os.sched_getaffinity(0)) == here, "other threads stay as they are"


def test_forbidden_cores_stay_forbidden(machine):
    here = sorted(os.sched_getaffinity(0))
    machine(0, node0=f"{here[0]},{max(here) + 1}-{max(here) + 3}")
    assert in_a_thread(offload.bind_thread).cpus == {here[0]}


@pytest.mark.parametrize(
    ("node", "cpulist", "reason"),
    [
        (-1, "0", "names no NUMA node for 0000:1b:00.0"),
        (0, "9000-9001", "none of node 0's cores"),
        (0, "", "none of"),
    ],
)
def test_says_why_it_cannot(machine, node, cpulist, reason):
    machine(node, node0=cpulist)
    binding = offload.bind_thread()
    assert binding.node is None and reason in binding.reason
    assert binding.cpus == os.sched_getaffinity(0)


def test_a_machine_that_hides_its_nodes(machine):
    machine(0)
    assert "cpulist" in offload.bind_thread().reason


def test_lists_of_cores(machine):
    machine(0, node0="0-3,8,10-11")
    assert _numa._cpus_of(0) == {0, 1, 2, 3, 8, 10, 11}


def test_a_cpu_is_no_gpu():
    binding = offload.bind_thread(jax.devices("cpu")[0])
    assert binding == (None, os.sched_getaffinity(0), "cpu:0 is no GPU")


def test_what_is_no_device_is_refused():
    with pytest.raises(TypeError, match="device: expected a Device"):
        offload.bind_thread("cuda:0")


@pytest.mark.gpu
def test_a_gpu_is_found_or_the_reason_given():
    binding = in_a_thread(lambda: offload.bind_thread(jax.devices("gpu")[0]))
    assert (binding.node is None) == bool(binding.reason)
