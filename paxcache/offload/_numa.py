"""Where host memory lies: binding a thread to the processor cores beside a GPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax

from paxcache import _checks

_SYSFS = Path("/sys")


class Binding(NamedTuple):
    """What `bind_thread` did."""

    node: int | None
    """The NUMA node that the thread is bound to; None where it is not."""
    cpus: frozenset[int]
    """The cores that the thread may run on now."""
    reason: str
    """Why it is not bound; empty where it is."""


def bind_thread(device: Any = None) -> Binding:
    """Binds the calling thread to the cores of the NUMA node that a GPU hangs on, if the machine says which.

    Linux gives memory from the node of the thread that asks for it, and a transfer that crosses nodes is slower. Call
    this in the thread that makes pinned memory, before it does (`swap_out`, `preempt`, `Storage.get`). Cores that
    the thread was not allowed before stay forbidden. Nothing raises because a machine has no nodes or hides them: a
    machine with one node has nothing to bind to, and `reason` says so.

    Args:
      device: the GPU; None: the first device.

    Returns:
      A `Binding`.

    Raises:
      TypeError: device is no device.

    Example:
      >>> import jax
      >>> from paxcache import offload
      >>> offload.bind_thread(jax.devices("cpu")[0]).reason
      'cpu:0 is no GPU'

    Reference: NUMA binding of FastDeploy's cache manager; set_mempolicy(2) on where memory comes from.
    """
    device = jax.devices()[0] if device is None else device
    _checks.instance("device", device, jax.Device, source="jax.devices")
    if not hasattr(os, "sched_setaffinity"):
        return Binding(None, frozenset(range(os.cpu_count() or 1)), "this system cannot bind threads")
    allowed = frozenset(os.sched_getaffinity(0))
    try:
        node = _node_of(_bus_id(device))
        cpus = _cpus_of(node) & allowed
        if not cpus:
            raise LookupError(f"none of node {node}'s cores is allowed to this thread")
        os.sched_setaffinity(0, cpus)
    except (LookupError, OSError) as error:
        return Binding(None, allowed, str(error))
    return Binding(node, frozenset(cpus), "")


def _bus_id(device: Any) -> str:
    """Where a GPU sits, as the driver writes it: ``0000:1b:00.0``."""
    if device.platform != "gpu":
        raise LookupError(f"{device.platform}:{device.id} is no GPU")
    driver = ctypes.CDLL("libcuda.so.1")  # OSError: there is none
    handle, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device.local_hardware_id)
    failed = failed or driver.cuDeviceGetPCIBusId(text, len(text), handle)
    if failed:
        raise LookupError(f"the driver does not tell where {device} sits (error {failed})")
    return text.value.decode().lower()


def _node_of(bus_id: str) -> int:
    """The NUMA node of a PCI device."""
    node = int((_SYSFS / "bus/pci/devices" / bus_id / "numa_node").read_text())
    if node < 0:
        raise LookupError(f"the machine names no NUMA node for {bus_id}")
    return node


def _cpus_of(node: int) -> frozenset[int]:
    """The cores of a node, which the kernel lists like ``0-3,8``."""
    cpus: set[int] = set()
    for part in (_SYSFS / f"devices/system/node/node{node}/cpulist").read_text().strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)
