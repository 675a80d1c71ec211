"""Compiles functions for an H200 on a machine without a GPU, and reads the assembler's report.

Needs the CUDA plug-in of JAX installed (``jax[cuda12]`` or ``jax[cuda13]``); `available` says whether it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

# The compiler needs none of the CUDA libraries that JAX looks for when it first uses a backend: in another test, maybe,
# but not before all tests are imported.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

H200 = """
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0"
  runtime_version: "12.9.0"
  compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.10.0"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the assembler says of one kernel."""

    name: str
    registers: int
    spill_bytes: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled function."""

    hlo: str
    kernels: tuple[Kernel, ...]
    log: str
    """All that the compilers printed."""


def available() -> bool:
    """Whether the plug-in that compiles for NVIDIA GPUs is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


def compile_for_h200(f: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Compiled:
    """Compiles ``f(*args)`` for an H200; `args` are arrays or shapes, alone or in pytrees."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    target = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(target, (1,), ("x",)), PartitionSpec())

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    with _captured_output() as output:
        compiled = jax.jit(f, donate_argnums=donate).lower(*jax.tree.map(shape, args)).compile()
    report = output()
    kernels = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        flags=re.DOTALL,
    )
    found = tuple(Kernel(name, int(regs), int(stores) + int(loads)) for name, stores, loads, regs in kernels)
    return Compiled(compiled.as_text() or "", found, report)


@contextlib.contextmanager
def _captured_output() -> Iterator[Callable[[], str]]:
    """What C code prints, to stdout or stderr, in the block."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as file:
        text = ""
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: text
        finally:
            for fd, old in zip((1, 2), saved, strict=True):
                os.dup2(old, fd)
                os.close(old)
            file.seek(0)
            text = file.read().decode(errors="replace")
