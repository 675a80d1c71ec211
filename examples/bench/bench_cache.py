"""What paging saves and what it costs: memory, waste, and the bookkeeping of a step.

    python examples/bench/bench_cache.py memory         # bytes reserved and waste against a dense cache
    python examples/bench/bench_cache.py bookkeeping    # kernels of extend + release (on a GPU), and their time

Speed of decoding is measured by bench_decode.py.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import paxcache
from timing import device_events

MAX_LEN = 4096


def filled(lens: np.ndarray, page_size: int, *, num_pages: int) -> paxcache.PagedKVCache:
    """A cache in which every row has been extended to its length, one layer of an 8B Llama's shape."""
    config = paxcache.CacheConfig(
        num_layers=1,
        num_kv_heads=8,
        head_dim=128,
        page_size=page_size,
        num_pages=num_pages,
        max_seqs=len(lens),
        max_pages_per_seq=-(-MAX_LEN // page_size),
    )
    cache, step = paxcache.extend(paxcache.init(config), jnp.asarray(lens), max_query_len=MAX_LEN)
    step.raise_if_failed()
    return cache


def memory() -> None:
    """Reserved bytes for log-normal lengths, then waste inside mapped pages over lengths and page sizes."""
    print(
        f"64 rows, log-normal lengths (median 160, sigma 1, clipped to {MAX_LEN}), page_size 16, pool sized to them"
    )
    saved = []
    for seed in range(5):
        lens = np.clip(np.random.default_rng(seed).lognormal(np.log(160), 1, 64).round(), 1, MAX_LEN).astype(
            np.int32
        )
        cache = filled(lens, 16, num_pages=int(np.sum(-(-lens // 16))))
        stats = paxcache.stats(cache)
        assert stats.num_free_pages == 0
        token_bytes = stats.page_bytes[0] // 16
        dense = 64 * MAX_LEN * token_bytes
        saved.append(1 - stats.pool_bytes / dense)
        print(
            f"  seed {seed}: mean length {lens.mean():6.1f}, pool {stats.pool_bytes / 2**20:6.1f} MiB, dense "
            f"{dense / 2**20:7.1f} MiB, {saved[-1]:.1%} less, waste in pages {float(stats.waste):.1%}"
        )
    print(f"  median {statistics.median(saved):.1%} less memory reserved")

    print("\nwaste inside mapped pages, 64 rows with lengths from n to n + 63")
    sizes = (8, 16, 32, 64)
    print("      n " + "".join(f"{f'page {s}':>10}" for s in sizes))
    for first in (1, 32, 64, 128, 256, 512, 1024, 2048, MAX_LEN - 63):
        lens = np.arange(first, first + 64, dtype=np.int32)
        waste = [
            float(paxcache.stats(filled(lens, s, num_pages=int(np.sum(-(-lens // s))))).waste) for s in sizes
        ]
        print(f"  {first:5d} " + "".join(f"{w:10.2%}" for w in waste))


def bookkeeping() -> None:
    """One step of extend and release: 256 rows and 65,536 pages, pools donated."""
    config = paxcache.CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=8, num_pages=65_536, max_seqs=256, max_pages_per_seq=512
    )

    def one_step(cache, query_lens, rows):
        cache, step = paxcache.extend(cache, query_lens, num_tokens=256)
        return paxcache.release(cache, rows), step

    step = jax.jit(one_step, donate_argnums=0)
    lens, rows = jnp.ones(256, jnp.int32), jnp.zeros(256, bool).at[3].set(True)
    cache, _ = paxcache.extend(paxcache.init(config), jnp.full(256, 1000), max_query_len=1000)
    cache, made = step(cache, lens, rows)
    made.raise_if_failed()
    repeats = 20
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder)
        for _ in range(repeats):
            cache, _ = step(cache, lens, rows)
        jax.block_until_ready(cache)
        jax.profiler.stop_trace()
        kernels = device_events(folder)
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        cache, _ = step(cache, lens, rows)
        jax.block_until_ready(cache)
        times.append(time.perf_counter() - begin)
    paxcache.check(cache)
    print(
        f"{jax.devices()[0].device_kind}: {statistics.median(times) * 1e6:.0f} µs a step, host time included"
    )
    if not kernels:
        print("kernels are counted on a GPU only")
        return
    total = sum(count for count, _ in kernels.values()) / repeats
    busy = sum(duration for _, duration in kernels.values()) / repeats
    print(f"{total:.1f} device activities a step, {busy:.0f} µs busy")
    for name, (count, duration) in sorted(kernels.items(), key=lambda item: -item[1][1]):
        print(f"  {count / repeats:5.1f} x {name:60.60} {duration / repeats:7.1f} µs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("memory", "bookkeeping"))
    {"memory": memory, "bookkeeping": bookkeeping}[parser.parse_args().what]()
