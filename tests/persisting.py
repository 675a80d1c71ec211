"""Pages, storages, disks without room and processes that are killed: for tests of what is stored."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import multiprocessing
import os
import resource
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import paxcache
from driver import config_of
from layouts import LAYOUTS, group, with_random_bits
from paxcache import offload, persist

PLENTY = 2**30


QUANTIZED = {
    "int8": config_of(group(quantization="int8")),
    "fp8 and int4 per tensor": config_of(
        group(quantization="fp8_e4m3"), group(quantization="int4", scales="per_tensor", v_head_dim=0)
    ),
}
WINDOWED = config_of(group(), group(num_layers=1, sliding_window=5))


def random_cache(config: paxcache.CacheConfig) -> paxcache.PagedKVCache:
    return with_random_bits(paxcache.init(config))


def key_of(*numbers: int) -> list[bytes]:
    return [n.to_bytes(32, "big") for n in numbers]


def init(config: paxcache.CacheConfig) -> paxcache.PagedKVCache:
    """An empty cache, with scales where it needs any."""
    given = [g for g in config.layer_groups if g.scales == "per_tensor"]
    scales = jnp.arange(1.0, 1 + sum(g.num_layers for g in config.layer_groups))
    v_scales = scales if any(g.value_dim for g in given) else None
    return paxcache.init(config, k_scales=scales if given else None, v_scales=v_scales)


@functools.cache
def shapes_of(config: paxcache.CacheConfig) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), init(config))


def extent_of(
    config: paxcache.CacheConfig, num_pages: int, *, seed: int = 0, held: Any = None
) -> offload.Extent:
    """Pages of random bits, which depend on the seed and the page alone."""
    pools = shapes_of(config)
    rngs = [np.random.default_rng([seed, page]) for page in range(num_pages)]

    def fill(leaf):
        size = leaf.size // leaf.shape[1] * leaf.dtype.itemsize
        data = np.frombuffer(b"".join(rng.bytes(size) for rng in rngs), leaf.dtype)
        return jnp.asarray(data.reshape(num_pages, leaf.shape[0], *leaf.shape[2:]))

    blocks = tuple(jax.tree.map(fill, g.pages) for g in pools.groups)
    return offload.Extent(blocks, held or (jnp.ones(num_pages, bool),) * len(blocks))


def open_storage(path, config: Any = LAYOUTS["bf16"], max_bytes=PLENTY) -> persist.Storage:
    return persist.Storage.open(path, config, max_bytes=max_bytes)


def page_file(folder, key: bytes):
    (path,) = folder.glob(f"*/{key.hex()}-*")
    return path


def flip(path) -> None:
    """Changes a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@functools.cache
def processes():
    """Starts processes from one that has imported everything and used nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["paxcache.persist", "pytest"])
    return context


def run_until_killed(work, *args, seconds: float) -> list[Any]:
    """What a process reported until it was killed, some time after its first report."""
    ours, theirs = processes().Pipe(duplex=False)
    process = processes().Process(target=work, args=(*args, theirs))
    process.start()
    theirs.close()
    assert ours.poll(60)
    time.sleep(seconds)
    process.kill()
    process.join()
    reports = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            reports.append(ours.recv())
    ours.close()
    process.close()
    return reports


def raw(array) -> bytes:
    return np.asarray(array).tobytes()


STEPS = "write", "fsync", "replace", "link", "unlink", "mkdir", "utime"
"""Calls of `os` that change what is on disk or make it durable."""


def run_and_die(step: int, work, args) -> None:
    """Does some work and is killed right before a step of it."""
    numbers = itertools.count()

    def before(call):
        @functools.wraps(call)
        def killing(*args, **options):
            if next(numbers) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return killing

    for name in STEPS:
        setattr(os, name, before(getattr(os, name)))
    work(*args)


def killed_at_every_step(work, *args):
    """Runs some work in processes that are killed at its first step, its second, and so on; yields after each.

    The last one comes to its end.
    """
    for step in itertools.count():
        process = processes().Process(target=run_and_die, args=(step, work, args))
        process.start()
        process.join()
        code = process.exitcode
        process.close()
        assert code in (0, -signal.SIGKILL), code
        yield step
        if code == 0:
            return


@contextlib.contextmanager
def no_room_after(num_bytes: int):
    """A disk that is full after some bytes more."""
    write, room = os.write, num_bytes

    def limited(file, data):
        nonlocal room
        if not room and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(file, memoryview(data)[:room])
        room -= count
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", limited)
        yield
