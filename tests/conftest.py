"""Devices and settings of the test-suite, and the marker `gpu`."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

# XLA has as many threads as a CPU has cores, or as this says, which it reads when a backend is first used. The
# interpreter of GPU kernels runs each warpgroup in one, where it waits for the others: two are too few.
os.environ.setdefault("NPROC", str(max(8, os.cpu_count() or 1)))

# shard_map is tested on two CPU devices; the number must be set before the first use of a backend.
jax.config.update("jax_num_cpu_devices", 2)

# References are computed with JAX too; on a GPU its default for float32 products is TF32, far too coarse for one.
jax.config.update("jax_default_matmul_precision", "highest")

# Time limits of single examples say nothing on a shared machine. Examples are the same in every run, so that a
# change is judged by itself; `--hypothesis-profile=explore` draws new ones.
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("fixed")

MOST_MAPPINGS = 25_000  # of the 65,530 that a process may have; a test adds some thousands


@functools.cache
def _why_no_gpu() -> str:
    try:
        return "" if jax.devices("gpu") else "JAX lists no GPU"
    except RuntimeError as error:
        return str(error).splitlines()[0]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` where there is none, saying why."""
    if item.get_closest_marker("gpu") and (why := _why_no_gpu()):
        pytest.skip(f"needs an NVIDIA GPU: {why}")


def pytest_runtest_teardown() -> None:
    """Drops compiled programs before the process has as many memory mappings as Linux allows, when XLA would crash."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def cpu_devices() -> Iterator[list]:
    """Two CPU devices, on any machine; the default device is the first of them."""
    devices = jax.devices("cpu")
    assert len(devices) >= 2, "jax_num_cpu_devices came too late: something used a backend at import"
    with jax.default_device(devices[0]):
        yield devices[:2]
