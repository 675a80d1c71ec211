"""Pages to host memory and back: how fast, against the link of the same run, and what it costs the work beside it.

    python examples/bench/bench_offload.py [--only link swap overlap resume layers representation]
                                            [--json FILE] [--tiny]

Pages are those of an 8B model: 32 layers, 8 KV heads of 128 in bfloat16, 16 tokens: 2 MiB each.

- link: one pinned array to the host and back, by torch where it is installed (events of the device) and by
  `jax.device_put`. The best of these is the link that the other sections are measured against.
- swap: scattered pages out of a pool and back into it: by `offload.swap_out`, which gathers by a program and transfers
  outside of it, alone and several in a row, or within one program; by `offload.swap_in`, within one program, or put
  first and then scattered.
  "fresh" keeps the earlier extents, so that each takes memory that was not used before; "first" is the first of all.
- overlap: a decode loop of the 8B shape (16 rows of 4k) alone and beside pieces of 256 MiB that leave or come back.
- resume: a row preempted and resumed, against the prefill of the same model that would recompute it.
- layers: a row that comes back and decodes a token: whole and then the step, or layer by layer within the step.
- representation: a pool in host memory that programs update and read: whether in place, by what, and how fast.

Except where it says so, times are of the host's clock, from the call until the result is ready. What comes back is
compared with what left. `--tiny` runs on a CPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.compute_on import compute_on

import bench_decode_step as model
import paxcache
import timing
from paxcache import offload, ops
from paxcache.offload import _pages
from timing import Report, Result

SECTIONS = ("link", "swap", "overlap", "resume", "layers", "representation")
MIB = 2**20
IN_A_ROW = 4
WARMUPS = 2  # arrays that come out of a program may be committed and those that went in not, so compile twice
HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; by default in full."""

    shape: model.Shape
    num_bytes: tuple[int, ...] = (16 * MIB, 256 * MIB, 1024 * MIB)
    pool_bytes: int = 4096 * MIB
    repeats: int = 7
    decode_case: str = "16x4k"
    decode_steps: int = 48
    piece_bytes: int = 256 * MIB
    resume_lens: tuple[int, ...] = (16, 64, 128, 256, 512, 2048, 8192)
    chunks: tuple[int, ...] = (128, 512, 2048)
    """Tokens of the programs that recompute, of which the smallest that holds a prompt is taken, or the last."""
    layer_len: int = 8192
    block_bytes: int = 64 * MIB

    def config(self, num_pages: int, *, max_seqs: int = 1, max_pages: int = 1) -> paxcache.CacheConfig:
        return paxcache.CacheConfig(
            num_layers=self.shape.num_layers,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            page_size=model.PAGE_SIZE,
            num_pages=num_pages,
            max_seqs=max_seqs,
            max_pages_per_seq=max_pages,
        )

    @property
    def page_bytes(self) -> int:
        return self.config(1).page_bytes


FULL = Sizes(model.Shape())
PAGE_OF_TINY = 2048
TINY = Sizes(
    shape=dataclasses.replace(model.TINY, num_layers=1),
    num_bytes=(8 * PAGE_OF_TINY,),
    pool_bytes=64 * PAGE_OF_TINY,
    repeats=2,
    decode_steps=6,
    piece_bytes=8 * PAGE_OF_TINY,
    resume_lens=(32,),
    chunks=(16,),
    layer_len=32,
    block_bytes=8 * PAGE_OF_TINY,
)


def on_host(tree: Any) -> Any:
    """Into host memory, by a transfer outside any program."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host")), tree)


def on_device(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind("device")), tree)


def compiled(lowered: dict[Any, Any]) -> dict[Any, Any]:
    """The programs, all compiled at the same time."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(lowered, pool.map(lambda x: x.compile(), lowered.values()), strict=True))


def seconds(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """How long a call takes until its result is ready, and the result."""
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin, result


def named(num_bytes: int) -> str:
    return f"{num_bytes / MIB:g} MiB" if num_bytes >= MIB else f"{num_bytes / 1024:g} KiB"


@jax.jit
def _random_leaf(leaf, seed):
    bits = jax.random.bits(jax.random.key(seed, impl="rbg"), leaf.shape, jnp.uint16)
    return lax.bitcast_convert_type(bits & jnp.uint16(0x3FFF), leaf.dtype)  # finite numbers


@jax.jit
def _same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.stack([(x == y).all() for x, y in pairs]).all()


@dataclasses.dataclass
class Bench:
    """The report, the sizes, and what sections share."""

    report: Report
    sizes: Sizes
    link: dict[str, float] = dataclasses.field(default_factory=dict)
    """Bytes a second, out and back; empty if not measured."""
    summary: list[Result] = dataclasses.field(default_factory=list)
    """What is said again at the end."""
    _params: Any = None

    def add(
        self,
        section: str,
        case: str,
        contestant: str,
        times: list[float],
        *,
        num_bytes: int = 0,
        direction: str = "",
        note: str = "",
    ) -> float:
        """A line of the report; the median in seconds."""
        median = statistics.median(times)
        result = Result(section, case, contestant, us=median * 1e6, note=note)
        if num_bytes:
            result.rate, result.unit = num_bytes / median / 1e9, "GB/s"
            best = f"best {num_bytes / min(times) / 1e9:.1f} GB/s"
            result.note = f"{best}; {note}" if note else best
        if num_bytes and direction in self.link:
            result.of_limit = num_bytes / median / self.link[direction]
        self.report.add(result)
        return median

    def say(self, section: str, case: str, contestant: str, note: str, *, again: bool = False) -> None:
        self.report.add(Result(section, case, contestant, note=note))
        if again:
            self.summary.append(Result("summary", case, contestant, note=note))

    def trace(
        self, section: str, case: str, contestant: str, call: Callable[[], Any], undo: Callable[[], Any]
    ) -> float:
        """What a call does on the device, as a line; its median span in seconds, NaN where there is no trace."""
        spans = []
        for _ in range(self.sizes.repeats):
            with timing.traced() as events:
                jax.block_until_ready(call())
            spans.append(timing.span_us(events) / 1e6 if events else math.nan)
            undo()
        self.say(section, case, contestant, listed(events))
        return statistics.median(spans)

    @property
    def params(self) -> Any:
        """The model's weights, made once."""
        if self._params is None:
            self._params = jax.block_until_ready(model.init_params(self.sizes.shape, stacked=False))
        return self._params


# --------------------------------------------------------------------------------------------------
# The link
# --------------------------------------------------------------------------------------------------


def torch_seconds(num_bytes: int, repeats: int) -> dict[str, list[float]]:
    """Copies of one pinned array, timed by events on the device."""
    import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    there = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    here = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    times: dict[str, list[float]] = {}
    for direction, to, source in (("out", here, there), ("back", there, here)):
        for repetition in range(repeats + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            to.copy_(source, non_blocking=True)
            end.record()
            torch.cuda.synchronize()
            if repetition:  # the first one is a warm-up
                times.setdefault(direction, []).append(start.elapsed_time(end) / 1000)
    return times


def run_link(bench: Bench) -> None:
    def add(case, contestant, times, num_bytes):
        for direction, some in times.items():
            bench.add("link", f"{case}, {direction}", contestant, some, num_bytes=num_bytes)
            best = num_bytes / statistics.median(some)
            bench.link[direction] = max(bench.link.get(direction, 0), best)

    for num_bytes in bench.sizes.num_bytes:
        case = named(num_bytes)
        with bench.report.guarded("link", f"{case}, torch"):
            if importlib.util.find_spec("torch") is None or not timing.on_gpu():
                raise NotImplementedError("no torch, or no GPU")
            add(case, "torch", torch_seconds(num_bytes, bench.sizes.repeats), num_bytes)
        with bench.report.guarded("link", f"{case}, device_put"):
            array = jnp.zeros(num_bytes, jnp.uint8)
            times: dict[str, list[float]] = {"out": [], "back": []}
            for _ in range(bench.sizes.repeats + 1):
                taken, there = seconds(on_host, array)
                times["out"].append(taken)
                taken, _ = seconds(on_device, there)
                times["back"].append(taken)
                del there
            firsts = {direction: some.pop(0) for direction, some in times.items()}
            add(case, "jax.device_put", times, num_bytes)
            bench.say("link", case, "first", f"out {firsts['out']:.4f} s, back {firsts['back']:.4f} s")
    for direction, rate in bench.link.items():
        bench.say("link", direction, "the link", f"{rate / 1e9:.2f} GB/s")


# --------------------------------------------------------------------------------------------------
# Swap
# --------------------------------------------------------------------------------------------------

gather = jax.jit(ops.gather_pages)
scatter_in_place = jax.jit(ops.scatter_pages, donate_argnums=0)
out_in_program = jax.jit(offload.swap_out)
swap_in = jax.jit(offload.swap_in, donate_argnums=0)


def listed(events: list[timing.Event]) -> str:
    """What ran on the device, longest first, and the span of all."""
    if not events:
        return "no trace"
    parts = sorted(timing.totals(events).items(), key=lambda item: -item[1][1])[:5]
    names = ", ".join(f"{count} x {name[:40]} {us:.0f} µs" for name, (count, us) in parts)
    return f"span {timing.span_us(events):.0f} µs: {names}"


def run_swap(bench: Bench) -> None:
    sizes = bench.sizes
    page_bytes = sizes.page_bytes
    P = sizes.pool_bytes // page_bytes
    cache = paxcache.init(sizes.config(P))
    (group,) = cache.groups
    group = dataclasses.replace(group, pages=jax.tree.map(lambda x: _random_leaf(x, x.ndim), group.pages))
    order = np.random.default_rng(0).permutation(P).astype(np.int32)
    bench.say("swap", "the pool", "", f"{P} pages of {named(page_bytes)}")

    def add(case, name, num_bytes, direction, call, undo=lambda: None):
        times = []
        for _ in range(sizes.repeats + WARMUPS):
            times.append(seconds(call)[0])
            undo()
        times = times[WARMUPS:]
        bench.add("swap", case, name, times, num_bytes=num_bytes, direction=direction)
        span = bench.trace("swap", case, name, call, undo)
        limit = num_bytes / bench.link.get(direction, math.nan)
        note = (
            f"of the link: {limit / span:.1%} by device span, {limit / statistics.median(times):.1%} by wall"
        )
        bench.summary.append(Result("summary", case, name, note=note))

    def out(num_bytes, ids, expected):
        case = f"{named(num_bytes)}, out"
        swap_out = functools.partial(offload.swap_out, cache, ids)
        jax.block_until_ready(swap_out(memory_kind="device"))  # compiles, and takes no host memory
        fresh, extents = [], []
        for _ in range(4):
            taken, extent = seconds(swap_out)
            fresh.append(taken)
            extents.append(extent)
        bench.add("swap", case, "first", fresh[:1], num_bytes=num_bytes)
        bench.add("swap", case, "fresh", fresh[1:], num_bytes=num_bytes, direction="out")
        del extents, extent
        forms = {"offload.swap_out": swap_out, "in one program": lambda: out_in_program(cache, ids)}
        for name, call in forms.items():
            with bench.report.guarded("swap", f"{case}, {name}"):
                if not _same(on_device(call().blocks[0]), expected):
                    raise RuntimeError("WRONG: other bits than in the pool")
                add(case, name, num_bytes, "out", call)

        def in_a_row():
            return [swap_out() for _ in range(IN_A_ROW)]

        with bench.report.guarded("swap", f"{case}, {IN_A_ROW} in a row"):
            add(f"{case}, {IN_A_ROW} in a row", "offload.swap_out", IN_A_ROW * num_bytes, "out", in_a_row)

    def back(num_bytes, ids, expected):
        nonlocal cache
        case = f"{named(num_bytes)}, back"
        extent = jax.block_until_ready(offload.swap_out(cache, ids))
        page_ids = free = (jnp.asarray(order[-len(ids) :]),)

        def put_first(cache, extent):
            (group,) = cache.groups
            pages = scatter_in_place(group.pages, free[0], on_device(extent.blocks[0]))
            return dataclasses.replace(cache, groups=(dataclasses.replace(group, pages=pages),)), free, True

        for name, function in {"offload.swap_in": swap_in, "put, then scatter": put_first}.items():
            with bench.report.guarded("swap", f"{case}, {name}"):

                def call(function=function):
                    nonlocal cache, page_ids
                    cache, page_ids, _ = function(cache, extent)
                    return cache

                def give_back(function=function):
                    nonlocal cache
                    if function is swap_in:
                        cache = jax.block_until_ready(offload.drop(cache, page_ids))

                call()
                if not _same(gather(cache.groups[0].pages, page_ids[0]), expected):
                    raise RuntimeError("WRONG: other bits than left the pool")
                give_back()
                add(case, name, num_bytes, "back", call, give_back)

    for num_bytes in sizes.num_bytes:
        with bench.report.guarded("swap", named(num_bytes)):
            ids = jnp.asarray(order[: num_bytes // page_bytes])
            used = dataclasses.replace(group, ref_counts=jnp.zeros(P, jnp.int32).at[ids].set(1))
            cache = dataclasses.replace(cache, groups=(used,))
            expected = gather(group.pages, ids)
            taken = timing.measure(functools.partial(gather, group.pages, ids), repeats=sizes.repeats)
            note = f"read and written at {2 * num_bytes / taken.us / 1e6:.2f} TB/s"
            bench.report.add(
                Result("swap", named(num_bytes), "the gather alone", us=taken.us, note=note, timing=taken)
            )
            out(num_bytes, ids, expected)
            back(num_bytes, ids, expected)
            group = cache.groups[0]


# --------------------------------------------------------------------------------------------------
# Overlap
# --------------------------------------------------------------------------------------------------


def decode(step: Any, params: Any, cache: Any, tokens: jax.Array, steps: int, beside: Any, every: int) -> Any:
    """Seconds of a loop that is one step ahead of what the host has seen, and its cache."""
    begin, seen = time.perf_counter(), None
    for i in range(steps):
        cache, tokens, _ = step(params, cache, tokens)
        if beside is not None and i % every == 0:
            cache = beside(cache)
        if seen is not None:
            jax.block_until_ready(seen)
        seen = tokens
    jax.block_until_ready(seen)
    return time.perf_counter() - begin, cache


def run_overlap(bench: Bench) -> None:
    sizes = bench.sizes
    params = bench.params
    lens = model.row_lens(sizes.decode_case, sizes is TINY)
    steps = sizes.decode_steps
    cache = model.paged_cache(sizes.shape, lens, steps + 1)
    tokens = jnp.zeros(len(lens), jnp.int32)
    function = functools.partial(model.paged_step, sizes.shape)
    begin = time.perf_counter()
    step = jax.jit(function, donate_argnums=1).lower(params, cache, tokens).compile()
    bench.say("overlap", "the step", "", f"compiled in {time.perf_counter() - begin:.0f} s")
    P = cache.groups[0].ref_counts.shape[0]
    N = min(sizes.piece_bytes // sizes.page_bytes, P)
    order = np.random.default_rng(1).permutation(P)[: P // N * N].astype(np.int32)
    pages = [jnp.asarray(some) for some in np.split(order, len(order) // N)]
    num_bytes = N * sizes.page_bytes
    restart = jnp.asarray(lens)

    def run(beside, every):
        nonlocal cache
        cache = paxcache.truncate(cache, restart)
        taken, cache = decode(step, params, cache, tokens, steps, beside, every)
        return taken / steps

    def compare(name, make, everies):
        """`make` gives what is called beside the steps, and a call that ends it and says how many pieces moved."""
        for every in everies:
            with bench.report.guarded("overlap", f"{name}, every {every}"):
                slower, rates, moved = [], [], 0
                for _ in range(4):
                    before = run(None, 1)
                    beside, finish = make()
                    begin = time.perf_counter()
                    taken = run(beside, every)
                    moved = finish()
                    rates.append(moved * num_bytes / (time.perf_counter() - begin) / 1e9)
                    slower.append(taken / before - 1)
                del slower[0], rates[0]  # a warm-up, which may compile
                note = f"slower by {statistics.median(slower):.1%} ({min(slower):.1%} to {max(slower):.1%}), "
                note += f"{statistics.median(rates):.1f} GB/s, {moved} of {-(-steps // every)} pieces"
                bench.say("overlap", f"{named(num_bytes)} every {every} steps", name, note, again=True)

    def leaving(start):
        """Pieces that leave: at most two at a time, so that what is on the device stays bounded."""
        under_way, started = deque(), 0

        def beside(cache):
            nonlocal started
            while under_way and all(leaf.is_ready() for leaf in jax.tree.leaves(under_way[0])):
                under_way.popleft()
            if len(under_way) < 2:
                under_way.append(start(cache, pages[started % len(pages)]))
                started += 1
            return cache

        def finish():
            jax.block_until_ready(list(under_way))
            return started

        return beside, finish

    def returning(write, block):
        started = 0

        def beside(cache):
            nonlocal started
            (group,), started = cache.groups, started + 1
            group = dataclasses.replace(group, pages=write(group.pages, block))
            return dataclasses.replace(cache, groups=(group,))

        return beside, lambda: jax.block_until_ready(cache) and started

    run(None, 1)
    base = statistics.median([run(None, 1) for _ in range(3)])
    bench.add("overlap", f"{sizes.decode_case}, alone", "a step", [base])
    compare("offload.swap_out", functools.partial(leaving, offload.swap_out), (1, 2, 8))
    compare("out in one program", functools.partial(leaving, out_in_program), (1, 8))
    block = jax.block_until_ready(on_host(gather(cache.groups[0].pages, pages[0])))

    def in_program(pool, block):
        return _pages.copy_in_place((pool,), (pages[0],), (block,), None)[0]

    def put_first(pool, block):
        return scatter_in_place(pool, pages[0], on_device(block))

    compare("back in one program", functools.partial(returning, in_program, block), (8,))
    compare("put, then scatter", functools.partial(returning, put_first, block), (8,))


# --------------------------------------------------------------------------------------------------
# Resume
# --------------------------------------------------------------------------------------------------


def prefill(shape: model.Shape, params: Any, cache: Any, tokens: jax.Array, query_lens: jax.Array) -> Any:
    """Computes a chunk of one row's prompt; gives its next token too."""
    cache, step = paxcache.extend(cache, query_lens, num_tokens=len(tokens))
    x = params["embed"][tokens]
    for index, w in enumerate(params["layers"]):

        def attend(q, k, v, cache=cache, index=index):
            written = paxcache.append(cache, index, k, v, step)
            return paxcache.attend(written, index, q, step), written

        x, cache = model.layer_step(shape, w, x, step.positions, attend)
    return cache, model.next_token(params, x[-1:])[0]


def run_resume(bench: Bench) -> None:
    sizes = bench.sizes
    params = bench.params
    longest, S = max(sizes.resume_lens), model.PAGE_SIZE
    config = sizes.config(2 * (longest // S + 1), max_seqs=2, max_pages=longest // S + 1)
    device = jax.devices()[0]
    cache = jax.device_put(paxcache.init(config), device)  # committed, as it is once pages came back
    row, both = jnp.array([0]), jnp.array([True, True])
    step = jax.jit(functools.partial(prefill, sizes.shape), donate_argnums=1)
    begin = time.perf_counter()
    programs = compiled(
        {T: step.lower(params, cache, jnp.zeros(T, jnp.int32), jnp.zeros(2, jnp.int32)) for T in sizes.chunks}
    )
    bench.say("resume", "chunks", "", f"of {sizes.chunks} compiled in {time.perf_counter() - begin:.0f} s")

    def recompute(n, T):
        nonlocal cache
        tokens, lens = jnp.zeros(T, jnp.int32), jnp.array([min(n, T), 0])
        cache = jax.block_until_ready(paxcache.release(cache, both))
        begin = time.perf_counter()
        for _ in range(-(-n // T)):
            cache, token = programs[T](params, cache, tokens, lens)
        jax.block_until_ready(token)
        return time.perf_counter() - begin

    back = jax.jit(offload.resume, donate_argnums=(0, 1))

    def move(n):
        """Seconds of preempting until the row is idle, until its pages are on the host, and of resuming."""
        nonlocal cache
        N = -(-n // S)
        host = jax.device_put(offload.init(config, N), device)
        expected = gather(cache.groups[0].pages, cache.groups[0].block_tables[0, :N])
        times = []
        for _ in range(sizes.repeats + WARMUPS):
            begin = time.perf_counter()
            cache, host, ticket = offload.preempt(cache, host, row)
            jax.block_until_ready(cache)
            idle = time.perf_counter() - begin
            jax.block_until_ready(ticket)
            left = time.perf_counter() - begin
            begin = time.perf_counter()
            cache, host, ok = back(cache, host, ticket, row)
            jax.block_until_ready(cache)
            times.append((idle, left, time.perf_counter() - begin))
            if not ok:
                raise RuntimeError("refused")
        if not _same(gather(cache.groups[0].pages, cache.groups[0].block_tables[0, :N]), expected):
            raise RuntimeError("WRONG: other bits than before")
        return (list(some) for some in zip(*times[WARMUPS:], strict=True))

    faster: list[int] = []
    for n in sizes.resume_lens:
        case = f"{n} tokens"
        with bench.report.guarded("resume", case):
            T = min((T for T in sizes.chunks if n <= T), default=sizes.chunks[-1])
            recompute(n, T)
            again = [recompute(n, T) for _ in range(min(sizes.repeats, 5))]
            median = bench.add("resume", case, "recomputed", again, note=f"in steps of {T}")
            options: dict[str, Any] = {"num_bytes": -(-n // S) * sizes.page_bytes}
            idle, left, resumed = move(n)
            bench.add("resume", case, "row is idle", idle)
            out = bench.add("resume", case, "preempted", left, **options, direction="out")
            resumed = bench.add("resume", case, "resumed", resumed, **options, direction="back")
            note = f"resuming takes {resumed / median:.2f} of recomputing, both ways {(out + resumed) / median:.2f}"
            bench.say("resume", case, "", note, again=True)
            if resumed < median:
                faster.append(n)
    slower = [n for n in sizes.resume_lens if n not in faster]
    note = f"resuming is faster at {faster or 'none'}, recomputing at {slower or 'none'}"
    bench.say("resume", "crossover", "", note, again=True)


# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------


def decode_rows(shape: model.Shape, params: Any, cache: Any, tokens: jax.Array, arrival: Any = None) -> Any:
    """One token of every row; where pages arrive, those of a layer land before it."""
    cache, step = paxcache.extend(cache, jnp.ones(len(tokens), jnp.int32), max_query_len=1)
    x = params["embed"][tokens]
    for index, w in enumerate(params["layers"]):
        if arrival is not None:
            cache, arrival = offload.land(cache, index, arrival, x)

        def attend(q, k, v, cache=cache, index=index):
            written = paxcache.append(cache, index, k[:, None], v[:, None], step)
            return paxcache.attend(written, index, q[:, None], step)[:, 0], written

        x, cache = model.layer_step(shape, w, x, step.positions[:, 0], attend)
    return cache, model.next_token(params, x)[1]


def run_layers(bench: Bench) -> None:
    sizes, params, n = bench.sizes, bench.params, bench.sizes.layer_len
    row, tokens, everyone = jnp.array([0]), jnp.zeros(1, jnp.int32), jnp.array([True])
    cache = model.paged_cache(sizes.shape, np.array([n], np.int32), model.PAGE_SIZE)
    N = n // model.PAGE_SIZE + 1
    config = sizes.config(cache.groups[0].ref_counts.shape[0])
    tickets = {
        by_layer: offload.preempt(cache, offload.init(config, N), row, max_pages=N, by_layer=by_layer)[1:]
        for by_layer in (False, True)
    }
    cache = paxcache.release(cache, everyone)

    def decode(params, cache, tokens):
        return decode_rows(sizes.shape, params, cache, tokens)

    def by_layer(params, cache, host, ticket, tokens):
        cache, host, arrival, _ = offload.begin_resume(cache, host, ticket, row)
        return decode_rows(sizes.shape, params, cache, tokens, arrival)

    begin = time.perf_counter()
    programs = compiled(
        {
            "decode": jax.jit(decode, donate_argnums=1).lower(params, cache, tokens),
            "by layer": jax.jit(by_layer, donate_argnums=1).lower(params, cache, *tickets[True], tokens),
        }
    )
    bench.say("layers", "the steps", "", f"compiled in {time.perf_counter() - begin:.0f} s")
    resume = jax.jit(offload.resume, donate_argnums=0)

    def whole(cache):
        return programs["decode"](params, resume(cache, *tickets[False], row)[0], tokens)

    def layered(cache):
        return programs["by layer"](params, cache, *tickets[True], tokens)

    def alone(cache):  # of a row that is there
        return programs["decode"](params, cache, tokens)

    expected: Any = None
    for name, function in {
        "resume, then decode": whole,
        "by layer": layered,
        "decode alone": alone,
    }.items():
        with bench.report.guarded("layers", name):
            times: list[float] = []
            logits: Any = None
            for _ in range(sizes.repeats + WARMUPS):
                if function is alone:
                    cache = resume(cache, *tickets[False], row)[0]
                jax.block_until_ready(cache)
                taken, (cache, logits) = seconds(function, cache)
                cache = paxcache.release(cache, everyone)
                times.append(taken)
            expected = logits if expected is None else expected
            if not timing.relative_error(logits, expected) < timing.TOLERANCE:
                raise RuntimeError("WRONG: other logits than of the first form")
            bench.add("layers", f"{n} tokens, {named(N * sizes.page_bytes)}", name, times[WARMUPS:])


# --------------------------------------------------------------------------------------------------
# Representation
# --------------------------------------------------------------------------------------------------


def pointer(array: jax.Array) -> int:
    return array.addressable_shards[0].data.unsafe_buffer_pointer()


def run_representation(bench: Bench) -> None:
    """The last section: a program that the compiler does not survive takes no other numbers with it."""
    sizes = bench.sizes
    page_bytes, L = sizes.page_bytes, sizes.shape.num_layers
    N = sizes.block_bytes // page_bytes
    P = 16 * N
    device = jnp.zeros((1,)).sharding
    host = device.with_memory_kind("pinned_host")
    width = page_bytes // 2 // L
    fresh = _random_leaf(jnp.zeros((N, L, width), jnp.bfloat16), 5)
    ids = jnp.asarray(np.random.default_rng(2).permutation(P)[:N].astype(np.int32))
    start = jnp.int32(N)
    note = f"[{P}, {L}, {width}] of {named(P * page_bytes)} on the host, {named(N * page_bytes)} move"
    bench.say("representation", "the pool", "", note)

    def report(name, function, make_arguments, shardings, donated, view):
        """Compiles, looks, checks and times; `view` brings the result to what it should be."""
        with bench.report.guarded("representation", name):
            jitted = jax.jit(function, out_shardings=shardings, donate_argnums=donated)
            arguments = make_arguments()
            compiled = jitted.lower(*arguments).compile()
            memory: Any = compiled.memory_analysis()
            text = compiled.as_text() or ""
            moves = sorted(
                set(re.findall(r"%?([\w.-]*(?:copy|scatter|gather|dynamic|async)[\w.-]*) = ", text))
            )
            facts = f"temp {memory.temp_size_in_bytes}, host temp {memory.host_temp_size_in_bytes}, "
            facts += f"host alias {memory.host_alias_size_in_bytes} bytes; {len(moves)} moves: {', '.join(moves)[:200]}"
            bench.say("representation", name, "compiled", facts)
            before = pointer(arguments[0])
            out = jax.block_until_ready(compiled(*arguments))
            kind, same = out.sharding.memory_kind, pointer(out) == before
            # A NumPy view of the result itself would keep it from being donated to the next call.
            right = bool(jnp.array_equal(*view(on_device(out))))
            result = f"result in {kind}, {'the same buffer' if same else 'another buffer'}, "
            bench.say("representation", name, "seen", result + ("right" if right else "WRONG"))
            times = []
            for _ in range(sizes.repeats + WARMUPS):
                arguments = (out, *arguments[1:]) if donated else arguments
                taken, out = seconds(compiled, *arguments)
                times.append(taken)
            bench.add("representation", name, "time", times[WARMUPS:], num_bytes=N * page_bytes)
            arguments = (out, *arguments[1:]) if donated else arguments
            with timing.traced() as events:
                jax.block_until_ready(compiled(*arguments))
            bench.say("representation", name, "trace", listed(events))

    def pool_on_host():
        return jax.block_until_ready(jax.device_put(jnp.zeros((P, L, width), jnp.bfloat16), host))

    def slice_of(out):
        return np.asarray(out)[N : 2 * N], np.asarray(fresh)

    def rows_of(out):
        return np.asarray(out)[np.asarray(ids)], np.asarray(fresh)

    def update(pool, block, start):
        return lax.dynamic_update_slice_in_dim(pool, jax.device_put(block, HOST), start, 0)

    def scatter(pool, block, ids):
        there = jax.device_put(block, HOST), jax.device_put(ids, HOST)
        return pool.at[there[1]].set(there[0], unique_indices=True, mode="promise_in_bounds")

    def scatter_by_host(pool, block, ids):
        @compute_on(compute_type="device_host", out_memory_spaces=HOST)
        def on_cpu(pool, block, ids):
            return pool.at[ids].set(block, unique_indices=True, mode="promise_in_bounds")

        return on_cpu(pool, jax.device_put(block, HOST), jax.device_put(ids, HOST))

    def read_slice(pool, start):
        return jax.device_put(lax.dynamic_slice_in_dim(pool, start, N), DEVICE)

    def read(pool, ids):
        return jax.device_put(pool.at[jax.device_put(ids, HOST)].get(mode="promise_in_bounds"), DEVICE)

    def read_by_host(pool, ids):
        @compute_on(compute_type="device_host", out_memory_spaces=HOST)
        def on_cpu(pool, ids):
            return pool.at[ids].get(mode="promise_in_bounds")

        return jax.device_put(on_cpu(pool, jax.device_put(ids, HOST)), DEVICE)

    def filled():
        pool = np.zeros((P, L, width), fresh.dtype)
        pool[N : 2 * N] = np.asarray(fresh)
        return jax.block_until_ready(jax.device_put(pool, host)), start

    def scattered():
        pool = np.zeros((P, L, width), fresh.dtype)
        pool[np.asarray(ids)] = np.asarray(fresh)
        return jax.block_until_ready(jax.device_put(pool, host)), ids

    def whole(out):
        return np.asarray(out), np.asarray(fresh)

    report("slice of the pool, back", read_slice, filled, device, (), whole)
    report("update of a slice", update, lambda: (pool_on_host(), fresh, start), host, (0,), slice_of)
    report("gather, back", read, scattered, device, (), whole)
    report("scatter", scatter, lambda: (pool_on_host(), fresh, ids), host, (0,), rows_of)
    report("gather by the host, back", read_by_host, scattered, device, (), whole)
    report("scatter by the host", scatter_by_host, lambda: (pool_on_host(), fresh, ids), host, (0,), rows_of)


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(arguments)
    sizes = TINY if args.tiny else FULL
    bound = offload.bind_thread() if timing.on_gpu() else None
    where = "not bound" if bound is None else bound.reason or f"bound to node {bound.node}"
    report = Report(timing.header("bench_offload", numa=where), sizes.repeats, args.json)
    bench, begin = Bench(report, sizes), time.perf_counter()
    runs = run_link, run_swap, run_overlap, run_resume, run_layers, run_representation
    for section, run in zip(SECTIONS, runs, strict=True):
        if section in args.only:
            with report.guarded(section, "all that is left"):
                run(bench)
            print(f"  {time.perf_counter() - begin:.0f} s since the start", flush=True)
    for result in bench.summary:
        report.add(result)
    return report


if __name__ == "__main__":
    main()
