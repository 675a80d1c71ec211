"""The storage tier against a plain file of as many bytes on the same disk, in the same run.

    python examples/bench/bench_persist.py                     # 1 GiB in the system's folder for temporary files
    python examples/bench/bench_persist.py --folder DIR --gib 4 --repeats 5

Pages are those of a model of 32 layers, 8 KV heads of 128 in bfloat16, 16 tokens a page: 2 MiB each, of random bits.
The plain file is written in pieces of a page and synced once; `Storage.put` returns when every page is durable. Both
read into fresh memory. Before each read the system is told to drop what it keeps of the files (posix_fadvise), the
plain file's and the pages' alike, so that both come from the disk; "from memory" is the second read of the same. What
is read is compared with what was written. Plain and storage take turns in going first; medians of the rounds.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import paxcache
from paxcache import offload, persist

LAYERS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16


def make_config() -> paxcache.CacheConfig:
    return paxcache.CacheConfig(
        num_layers=LAYERS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        page_size=PAGE_SIZE,
        num_pages=1,
        max_seqs=1,
        max_pages_per_seq=1,
    )


def make_extent(config: paxcache.CacheConfig, num_pages: int) -> offload.Extent:
    """Pages in host memory, as `offload.swap_out` leaves them."""
    rng = np.random.default_rng(0)
    pool = jax.eval_shape(lambda: paxcache.init(config)).groups[0].pages

    def fill(leaf):
        shape = (num_pages, leaf.shape[0], *leaf.shape[2:])
        bits = rng.integers(0, 2**64, np.prod(shape) * leaf.dtype.itemsize // 8, np.uint64)
        return jax.device_put(bits.view(leaf.dtype).reshape(shape), jax.memory.Space.Host)

    return offload.Extent((jax.tree.map(fill, pool),), (jnp.ones(num_pages, bool),))


def as_bytes(extent: offload.Extent) -> list[np.ndarray]:
    """The leaves as bytes [N, ...]."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(extent.blocks)]
    return [leaf.reshape(leaf.shape[0], -1).view(np.uint8) for leaf in leaves]


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - begin, result


def write_plain(path: pathlib.Path, leaves: list[np.ndarray]) -> None:
    with open(path, "wb", buffering=0) as file:
        for page in zip(*leaves, strict=True):
            for part in page:
                file.write(part)
        os.fsync(file.fileno())


def read_plain(path: pathlib.Path, size: int, piece: int) -> np.ndarray:
    data = np.empty(size, np.uint8)
    with open(path, "rb", buffering=0) as file:
        for at in range(0, size, piece):
            file.readinto(data[at : at + piece])
    return data


def drop_from_memory(folder: pathlib.Path) -> None:
    """Tells the system to keep nothing of the files below a folder in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    folder: pathlib.Path, config: paxcache.CacheConfig, extent: offload.Extent, *, storage_first: bool
) -> dict[str, float]:
    """Seconds of one round."""
    leaves, times = as_bytes(extent), {}
    num_pages, size = leaves[0].shape[0], sum(leaf.size for leaf in leaves)
    keys = [entry.to_bytes(32, "big") for entry in range(num_pages)]
    plain = folder / "plain"
    storage = persist.Storage.open(folder / "pages", config, max_bytes=2 * size)

    def put():
        assert storage.put(keys, extent) == num_pages

    def check_plain(data):
        assert (data.reshape(num_pages, -1)[:, : leaves[0].shape[1]] == leaves[0]).all()

    def check_storage(found):
        assert found.held[0].all()
        assert all((a == b).all() for a, b in zip(as_bytes(found), leaves, strict=True))

    kinds = ["plain", "storage"][:: -1 if storage_first else 1]
    write = {"plain": lambda: write_plain(plain, leaves), "storage": put}
    read = {"plain": lambda: read_plain(plain, size, size // num_pages), "storage": lambda: storage.get(keys)}
    check = {"plain": check_plain, "storage": check_storage}
    for kind in kinds:
        times[f"{kind} write"], _ = seconds(write[kind])
    for kind in kinds:
        drop_from_memory(folder)
        for name in ("read", "read from memory"):
            times[f"{kind} {name}"], found = seconds(read[kind])
            check[kind](found)
            del found
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    parser.add_argument("--gib", type=float, default=1.0, help="bytes to write and read")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    config = make_config()
    num_pages = int(arguments.gib * 2**30) // config.page_bytes
    extent = make_extent(config, num_pages)
    rounds = []
    for number in range(arguments.repeats):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            rounds.append(measure(pathlib.Path(folder), config, extent, storage_first=number % 2 > 0))
    print(
        f"{num_pages} pages of {config.page_bytes / 2**20:g} MiB, {arguments.repeats} rounds, medians in MB/s"
    )
    print(f"{'':18}{'plain file':>12}{'storage':>12}{'ratio':>8}")
    for name, target in (("write", 0.8), ("read", 0.8), ("read from memory", None)):
        plain, storage = (
            statistics.median(num_pages * config.page_bytes / r[f"{kind} {name}"] / 1e6 for r in rounds)
            for kind in ("plain", "storage")
        )
        ratio = statistics.median(r[f"plain {name}"] / r[f"storage {name}"] for r in rounds)
        verdict = "" if target is None else f"  ({'at least' if ratio >= target else 'NOT'} {target:.0%})"
        print(f"{name:18}{plain:12.0f}{storage:12.0f}{ratio:8.2f}{verdict}")


if __name__ == "__main__":
    main()
