"""The kernels against the machine's limits and against what a JAX installation carries, on one device in one run.

    python examples/bench/bench_kernels.py [--only decode quantized prefill append move plan limits] [--repeats 20]
                                           [--json FILE] [--plot FILE.png] [--quick]

Llama shapes: 32 query and 8 KV heads of 128, bfloat16, pages shuffled. Every result is compared with a float32
reference (moves: bit by bit) before it is timed; a wrong one is reported as WRONG and not timed. paxcache sees NaN in
every slot past a row's length; the peers see zeros there, since most of them multiply what they mask. Plans are made
outside the time of attention and timed by themselves. See timing.py for what a time is.

- "of limit": decode, the time in which the device reads as many bytes (K and V once, q and out) over the time taken;
  append and move, the same with a device copy (bytes read and written); prefill, TFLOP/s over those of an 8192³ matrix
  product, where only visible pairs of query and key count, 4 D H operations each.
- quantized: decoding over quantised pages, whose bytes are counted with their scales. "gain": the time over plain
  pages of the same run over the time taken; beside it what the byte counts and the read limit at each size allow.
- "vs peer": the best peer's time over the time taken, so that more is better.

A contestant that cannot do a case, or fails, is reported with its reason, and the run goes on. `--quick` shrinks every
case until a CPU can do it: a look at whether the program runs, not a measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import math
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import timing
from paxcache import ops
from timing import Contestant, Limits, Report, Result, Variant, close_to, compare

SECTIONS = ("limits", "plan", "decode", "quantized", "prefill", "append", "move")
H, K, D = 32, 8, 128
MAX_GATHER_BYTES = 16 * 2**30  # of K and V made dense, for peers without pages


# --------------------------------------------------------------------------------------------------
# Attention
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """The arguments of one attention call; a row's queries follow those of the row before."""

    q: jax.Array  # [T, H, D]
    k_pages: Any  # [P, K, S, D], or quantised pages
    v_pages: Any
    block_tables: jax.Array  # [B, M]
    seq_lens: np.ndarray  # with the new tokens
    query_lens: np.ndarray

    @property
    def query_starts(self) -> np.ndarray:
        return (np.cumsum(self.query_lens) - self.query_lens).astype(np.int32)

    @property
    def is_decode(self) -> bool:
        return bool((self.query_lens == 1).all())

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return self.q, self.k_pages, self.v_pages, self.block_tables, jnp.asarray(self.seq_lens)

    @property
    def read_bytes(self) -> int:
        """K and V once, q and out."""
        _, num_kv_heads, S, _ = self.k_pages.shape
        leaves = jax.tree.leaves((self.k_pages, self.v_pages))
        by_token = sum(math.prod(x.shape[3:]) * x.dtype.itemsize for x in leaves if x.shape[2] == S)
        return int(self.seq_lens.sum()) * num_kv_heads * by_token + 2 * 2 * self.q.size

    @property
    def flops(self) -> int:
        """Of the pairs of query and key that are visible."""
        n, length = self.query_lens.astype(np.int64), self.seq_lens.astype(np.int64)
        return 4 * D * self.q.shape[1] * int((n * (length - n) + n * (n + 1) // 2).sum())

    def rows(self, first: int, last: int) -> Batch:
        """Some of the rows, over the same pools."""
        ends, rows = np.cumsum(self.query_lens), slice(first, last)
        q = self.q[self.query_starts[first] : ends[last - 1]]
        tables, seq_lens, query_lens = self.block_tables[rows], self.seq_lens[rows], self.query_lens[rows]
        return Batch(q, self.k_pages, self.v_pages, tables, seq_lens, query_lens)

    def clean(self) -> Batch:
        """The same with zeros in the slots past the rows' lengths, and a page in every table entry."""
        k, v = (jnp.where(jnp.isnan(pool), 0, pool) for pool in (self.k_pages, self.v_pages))
        return dataclasses.replace(self, k_pages=k, v_pages=v, block_tables=jnp.maximum(self.block_tables, 0))


def make_batch(seed: int, case: Case, page_size: int) -> Batch:
    """Random queries, keys and values; pages in random order, NaN in the slots past a row's length."""
    pages = -(-case.seq_lens // page_size)
    num_pages, columns = int(pages.sum()), np.arange(pages.max())
    tables = np.full((len(pages), len(columns)), -1, np.int32)
    mapped = columns < pages[:, None]
    tables[mapped] = np.random.default_rng(seed).permutation(num_pages)
    slots_used = np.empty(num_pages, np.int32)
    slots_used[tables[mapped]] = np.minimum(case.seq_lens[:, None] - columns * page_size, page_size)[mapped]
    q_key, k_key, v_key = jax.random.split(jax.random.key(seed), 3)

    @jax.jit
    def pool(key):
        values = jax.random.normal(key, (num_pages, case.num_kv_heads, page_size, D), jnp.bfloat16)
        used = jnp.arange(page_size) < jnp.asarray(slots_used)[:, None]
        return jnp.where(used[:, None, :, None], values, jnp.nan)

    q = jax.random.normal(q_key, (int(case.query_lens.sum()), case.num_heads, D), jnp.bfloat16)
    return Batch(q, pool(k_key), pool(v_key), jnp.asarray(tables), case.seq_lens, case.query_lens)


def reference(batch: Batch) -> jax.Array:
    """Attention in float32, one block of a row's queries after another."""
    block = int(min(256, batch.query_lens.max()))
    items = [(row, first) for row, n in enumerate(batch.query_lens) for first in range(0, n, block)]
    queries = jnp.asarray(batch.query_lens), jnp.asarray(batch.query_starts)
    return _reference(jnp.asarray(items, jnp.int32), *batch.arrays, *queries, block=block)


@functools.partial(jax.jit, static_argnames="block")
def _reference(items, q, k_pages, v_pages, tables, seq_lens, query_lens, query_starts, *, block):
    (T, num_heads, _), (_, num_kv_heads, S, _) = q.shape, k_pages.shape
    position = jnp.arange(tables.shape[1] * S)

    def one(item):
        row, first = item
        within = first + jnp.arange(block)
        queries = q[jnp.minimum(query_starts[row] + within, T - 1)].astype(jnp.float32)
        queries = queries.reshape(block, num_kv_heads, num_heads // num_kv_heads, D)

        def dense(pool):
            tokens = jnp.moveaxis(pool[jnp.maximum(tables[row], 0)], 1, 0).reshape(num_kv_heads, -1, D)
            return jnp.where((position < seq_lens[row])[:, None], tokens, 0).astype(jnp.float32)

        scores = jnp.einsum("qkgd,knd->kgqn", queries, dense(k_pages), precision="highest") / math.sqrt(D)
        seen = position <= (seq_lens[row] - query_lens[row] + within)[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
        out = jnp.einsum("kgqn,knd->qkgd", weights, dense(v_pages), precision="highest")
        target = jnp.where(within < query_lens[row], query_starts[row] + within, T)
        return out.reshape(block, num_heads, D), target

    out, target = lax.map(one, (items[:, 0], items[:, 1]))
    return jnp.zeros(q.shape, jnp.float32).at[target].set(out, mode="drop")


def planner(batch: Batch, implementation: ops.Implementation = None) -> Callable[[], ops.Plan]:
    """Makes the plan of a batch."""
    (T, num_heads, head_dim), (_, num_kv_heads, page_size, _) = batch.q.shape, batch.k_pages.shape
    options: dict[str, Any] = dict(num_heads=num_heads, num_kv_heads=num_kv_heads, page_size=page_size)
    options |= dict(head_dim=head_dim, dtype=batch.k_pages.dtype, implementation=implementation)
    arrays = [batch.block_tables, jnp.asarray(batch.seq_lens)]
    if batch.is_decode:
        return functools.partial(jax.jit(lambda *x: ops.plan(*x, **options)), *arrays)
    options |= dict(num_tokens=T, max_query_len=int(batch.query_lens.max()))
    arrays.append(jnp.asarray(batch.query_lens))
    return functools.partial(jax.jit(lambda *x: ops.plan(*x[:2], query_lens=x[2], **options)), *arrays)


def paged(batch: Batch, implementation: ops.Implementation) -> list[Variant]:
    """paxcache's attention, with a plan made before."""
    arrays: dict[str, Any] = dict(plan=planner(batch, implementation)())
    static: dict[str, Any] = dict(implementation=implementation)
    if not batch.is_decode:
        arrays["query_starts"] = jnp.asarray(batch.query_starts)
        arrays["query_lens"] = jnp.asarray(batch.query_lens)
        static["max_query_len"] = int(batch.query_lens.max())
    attend = jax.jit(lambda arrays, *x: ops.paged_attention(*x, **arrays, **static))
    return [Variant(functools.partial(attend, arrays, *batch.arrays))]


def cudnn_paged(batch: Batch) -> list[Variant]:
    """cuDNN's paged attention, by way of JAX's private interface."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # noqa: PLC0415

    @jax.jit
    def attend(q, k, v, tables, lens):
        tables, one = tables[:, None, :, None], jnp.ones_like(lens)
        options: dict[str, Any] = dict(scale=D**-0.5, mask_type=cudnn.MaskType.PADDING, qkv_layout="BNTH")
        out: Any = cudnn.paged_attention(q[:, :, None], k, v, one, lens, tables, tables, **options)
        return out[:, :, 0]

    return [Variant(functools.partial(attend, *batch.arrays))]


def pallas_triton(batch: Batch, settings: tuple[tuple[int, int, int], ...]) -> list[Variant]:
    """JAX's own deprecated op, with several settings (splits, pages a block, warps) to choose from."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention  # noqa: PLC0415

    q, k, v, tables, lens = batch.arrays
    q *= D**-0.5  # alone of all, the op does not scale the scores
    k, v = jnp.swapaxes(k, 0, 1), jnp.swapaxes(v, 0, 1)
    variants = []
    for splits, pages, warps in settings:
        wide = jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % (splits * pages))))
        options = dict(k_splits=splits, pages_per_compute_block=pages, num_warps=warps)
        attend = functools.partial(paged_attention, q, k, v, wide, lens, **options)  # is jitted
        variants.append(Variant(attend, note=f"{splits} splits, {pages} pages, {warps} warps"))
    return variants


def dense(pool: jax.Array, tables: jax.Array) -> jax.Array:
    """Pages as a dense cache [B, M * S, K, D]."""
    size = 2 * 2 * tables.size * math.prod(pool.shape[1:])
    if size > MAX_GATHER_BYTES:
        raise NotImplementedError(f"a dense cache of these rows takes {size / 2**30:.0f} GiB")
    return jnp.swapaxes(pool[tables], 2, 3).reshape(len(tables), -1, pool.shape[1], D)


def xla_gather(batch: Batch) -> list[Variant]:
    """Gather the pages, then attend densely."""

    @jax.jit
    def attend(q, k, v, tables, lens):
        k, v = dense(k, tables), dense(v, tables)
        return jax.nn.dot_product_attention(q[:, None], k, v, key_value_seq_lengths=lens)[:, 0]

    return [Variant(functools.partial(attend, *batch.arrays))]


def cudnn_dense(batch: Batch) -> list[Variant]:
    """cuDNN over a dense cache that is there already: what attention costs without pages."""
    if (batch.seq_lens != batch.query_lens).any():
        raise NotImplementedError("its causal mask is aligned to the first key: no context")
    inside = np.arange(batch.query_lens.max()) < batch.query_lens[:, None]
    row, column = np.nonzero(inside)
    k, v = (
        jax.jit(dense)(x, batch.block_tables)[:, : inside.shape[1]] for x in (batch.k_pages, batch.v_pages)
    )
    q = jnp.zeros((*inside.shape, *batch.q.shape[1:]), batch.q.dtype).at[row, column].set(batch.q)
    lens: dict[str, Any] = {}
    if not inside.all():
        lens = dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), jnp.asarray(batch.query_lens))
    attend = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))
    return [Variant(functools.partial(attend, q, k, v, **lens), lambda out: out[row, column])]


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of one attention call."""

    seq_lens: np.ndarray
    query_lens: np.ndarray
    num_heads: int = H
    num_kv_heads: int = K


def attention_cases(section: str, quick: bool) -> dict[str, Case]:
    """The cases of "decode" or "prefill"."""
    rng = np.random.default_rng(2)
    # Quantiles of a Pareto distribution from 16 to 60k tokens, 305k in all.
    tail = np.minimum(16 + 283 * (200 / (np.arange(200) + 0.5) - 1), 60_000)
    lens = {
        "1 x 8k": [8192],
        "16 x 4k": [4096] * 16,
        "64 x 4k": [4096] * 64,
        "64 ragged 2k-8k": rng.integers(2048, 8193, 64),
        "256 x 1k": [1024] * 256,
        "8 x 32k": [32768] * 8,
        "64k + 127 x 512": [65536] + [512] * 127,
        "200 rows, heavy tail": rng.permutation(tail),
        "64 x 4k, 8 heads on 1": [4096] * 64,
    }
    ragged = rng.integers(64, 1025, 16)
    prefill = {
        "1 x 8k": ([8192], [8192]),
        "1 x 32k": ([32768], [32768]),
        "8 x 1k on 8k": ([9216] * 8, [1024] * 8),
        "16 ragged 64-1024": (ragged, ragged),
        "mixed": ([4096] * 60 + [5120] * 4, [1] * 60 + [1024] * 4),
    }
    pairs = {name: (n, [1] * len(n)) for name, n in lens.items()} if section == "decode" else prefill
    cases = {}
    for name, both in pairs.items():
        seq_lens, query_lens = (np.asarray(x).astype(np.int32) for x in both)
        if quick:  # the last row too: a mixed case has its prompts at the end
            seq_lens, query_lens = (
                np.maximum(x[[0, len(x) // 2, -1]] // 64, 1) for x in (seq_lens, query_lens)
            )
        cases[name] = Case(seq_lens, query_lens, *((8, 1) if name.endswith("on 1") else (H, K)))
    return cases


def run_plan(limits: Limits, report: Report, seed: int) -> None:
    for section in ("decode", "prefill"):
        for name, case in attention_cases(section, limits.quick).items():
            make = planner(make_batch(seed, case, 16))
            contestant = Contestant("ops.plan", lambda make=make: [Variant(make)])
            # Whether a plan is right shows in the attention that uses it.
            compare(report, "plan", f"{section}: {name}", [contestant], wrong=lambda plan: "")


def run_decode(limits: Limits, report: Report, seed: int) -> None:
    settings = ((16, 8, 8), (8, 8, 4), (32, 8, 4))[: 1 if limits.quick else None]
    for name, case in attention_cases("decode", limits.quick).items():
        with report.guarded("decode", name):
            batch = make_batch(seed, case, 16)
            clean, work = batch.clean(), batch.read_bytes
            contestants = [
                Contestant("mosaic_gpu", functools.partial(paged, batch, "mosaic_gpu")),
                Contestant("triton", functools.partial(paged, batch, "triton")),
                Contestant("cuDNN paged", functools.partial(cudnn_paged, clean), is_peer=True),
                Contestant("XLA gather + dpa", functools.partial(xla_gather, clean), is_peer=True),
                Contestant("Pallas-Triton", functools.partial(pallas_triton, clean, settings), is_peer=True),
            ]
            if limits.quick or name in ("1 x 8k", "16 x 4k"):  # once: it is known to be no match
                contestants.insert(1, Contestant("xla", functools.partial(paged, batch, "xla")))
            options: dict[str, Any] = dict(work=work, limit_us=limits.read_us(work))
            compare(report, "decode", name, contestants, wrong=close_to(reference(batch)), **options)


def quantized(batch: Batch, name: str, scales: str) -> tuple[Batch, Batch]:
    """The batch with quantised pages, and with the numbers that these stand for."""
    form = ops.FORMATS[name]
    P, _, S, _ = batch.k_pages.shape

    @jax.jit
    def quantize(pool):
        values = jnp.zeros((*pool.shape[:-1], D // form.per_element), form.dtype)
        given = jnp.full((P, 1, 1), jnp.nanmax(jnp.abs(pool.astype(jnp.float32))) / form.largest)
        own = jnp.zeros(pool.shape[:-1])
        empty = ops.QuantizedPages(values, own if scales == "per_token_head" else given)
        tokens = jnp.moveaxis(pool, 2, 1).reshape(P * S, -1, D)
        pages, _ = ops.write_pages(empty, None, tokens, None, jnp.arange(P * S), implementation="xla")
        return pages

    @jax.jit
    def numbers(pool):
        values = pool.values
        if form.per_element > 1:
            both = values.astype(jnp.int8)
            values = jnp.concatenate([(both << 4) >> 4, both >> 4], axis=-1)
        return (values.astype(jnp.float32) * pool.scales[..., None]).astype(jnp.float32)

    k, v = quantize(batch.k_pages), quantize(batch.v_pages)
    stored = dataclasses.replace(batch, k_pages=k, v_pages=v)
    return stored, dataclasses.replace(batch, k_pages=numbers(k), v_pages=numbers(v))


def run_quantized(limits: Limits, report: Report, seed: int) -> None:
    def measure(title, batch, expected, **options):
        contestants = [Contestant("mosaic_gpu", functools.partial(paged, batch, "mosaic_gpu"))]
        if limits.quick:
            contestants.append(Contestant("xla", functools.partial(paged, batch, "xla")))
        return compare(report, "quantized", title, contestants, wrong=close_to(expected), **options)

    forms = [(name, "per_token_head") for name in ("fp8_e4m3", "int8", "int4")] + [("fp8_e4m3", "per_tensor")]
    if limits.quick:
        forms = forms[1:3]
    names = ("16 x 4k", "64 x 4k", "64 ragged 2k-8k", "64k + 127 x 512")
    for name in names[: 1 if limits.quick else None]:
        with report.guarded("quantized", name):
            batch = make_batch(seed, attention_cases("decode", limits.quick)[name], 16)
            read = {"work": batch.read_bytes, "limit_us": limits.read_us(batch.read_bytes)}
            plain = measure(f"{name}, bfloat16", batch, reference(batch), **read)
            for form, scales in forms:
                stored, numbers = quantized(batch, form, scales)
                read = {"work": stored.read_bytes, "limit_us": limits.read_us(stored.read_bytes)}
                timed = measure(f"{name}, {form}, {scales}", stored, reference(numbers), **read)
                allowed = limits.read_us(batch.read_bytes) / limits.read_us(stored.read_bytes)
                for ours, result in timed.items():
                    before = plain[ours].us
                    if result.us and before:
                        gain = before / result.us
                        result.note = f"gain {gain:.2f}, {gain / allowed:.2f} of the {allowed:.2f} allowed"
                        print(f"    {ours}: {result.note}", flush=True)
                        report.save()
    with report.guarded("quantized", "prefill"):
        batch = make_batch(seed, attention_cases("prefill", limits.quick)["1 x 8k"], 16)
        rate = {"work": batch.flops, "unit": "TFLOP/s", "limit_us": batch.flops / limits.flops_per_us()}
        for form, _ in forms[:3]:
            stored, numbers = quantized(batch, form, "per_token_head")
            measure(f"prefill 1 x 8k, {form}", stored, reference(numbers), **rate)


def run_prefill(limits: Limits, report: Report, seed: int) -> None:
    def measure(case: str, batch: Batch, expected: jax.Array, peers: list[Contestant], **options: Any) -> Any:
        ours: tuple[ops.Implementation, ...] = ("mosaic_gpu", "triton")
        contestants = [Contestant(str(x), functools.partial(paged, batch, x)) for x in ours]
        contestants += peers
        if limits.quick:
            contestants.insert(1, Contestant("xla", functools.partial(paged, batch, "xla")))
        options |= dict(work=batch.flops, unit="TFLOP/s", limit_us=batch.flops / limits.flops_per_us())
        return compare(report, "prefill", case, contestants, wrong=close_to(expected), **options)

    for name, case in attention_cases("prefill", limits.quick).items():
        peer_us = math.inf  # of the peer, which has no pages and is measured once
        for page_size in (16, 64):
            title = f"{name}, page {page_size}"
            with report.guarded("prefill", title):
                batch = make_batch(seed, case, page_size)
                expected, peers = reference(batch), []
                if page_size == 16:
                    peers = [
                        Contestant("cuDNN dense", functools.partial(cudnn_dense, batch.clean()), is_peer=True)
                    ]
                whole = measure(title, batch, expected, peers, peer_us=peer_us)
                if peers:
                    peer_us = whole["cuDNN dense"].us or math.inf
                if name != "mixed":
                    continue
                cut = int((case.query_lens == 1).sum())  # rows, and their tokens
                decode = measure(f"{title}: decode alone", batch.rows(0, cut), expected[:cut], [])
                rest = batch.rows(cut, len(case.seq_lens))
                prefill = measure(f"{title}: prefill alone", rest, expected[cut:], [])
                for ours in decode:
                    together, alone = whole[ours].us, (decode[ours].us, prefill[ours].us)
                    if together and all(alone):
                        whole[ours].note = f"{together / sum(alone):.2f} of the sum of its parts alone"
                        print(f"    {ours}: {whole[ours].note}", flush=True)
                        report.save()


# --------------------------------------------------------------------------------------------------
# Writes and moves
# --------------------------------------------------------------------------------------------------


def in_place(function: Callable[..., Any], state: Any, *arguments: Any) -> list[Variant]:
    """Calls ``state = function(state, *arguments)`` with the state donated."""
    update, held = jax.jit(function, donate_argnums=0), [state]

    def call():
        held[0] = update(held[0], *arguments)
        return held[0]

    return [Variant(call)]


def exactly(expected: Callable[..., Any], *arguments: Any) -> Callable[[Any], str]:
    """A check for equal bits; what is expected is computed when it is needed, because pools are large."""

    @jax.jit
    def differences(out, arguments):
        pairs = zip(jax.tree.leaves(out), jax.tree.leaves(expected(*arguments)), strict=True)
        return sum(jnp.sum(a != b, dtype=jnp.int32) for a, b in pairs)

    def wrong(out):
        count = int(differences(out, arguments))
        return f"{count} elements differ" if count else ""

    return wrong


@dataclasses.dataclass(frozen=True)
class Task:
    """What pages are moved or written, and how to tell whether they were."""

    name: str
    build: Callable[[Any], list[Variant]]
    """Of the backend's name."""
    wrong: Callable[[Any], str]
    work: int | None
    """Bytes read and written."""


def append_tasks(quick: bool, seed: int) -> Iterator[Task]:
    """Writes of K and V."""
    num_pages, S = 256 if quick else 32768, 16  # 1 GiB each of K and V
    keys, rng = jax.random.split(jax.random.key(seed), 4), np.random.default_rng(seed)
    shape = 1, num_pages, K, S, D
    pools = jax.jit(lambda: [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2]])

    for tokens in (4, 256, 1024) if quick else (64, 256, 2048, 8192, 65536):
        # Few tokens are one each of as many rows; many fill pages one after another.
        pages, spread = rng.permutation(num_pages), tokens <= 256
        page = pages[:tokens] if spread else np.repeat(pages[: -(-tokens // S)], S)[:tokens]
        offset = rng.integers(0, S, tokens) if spread else np.arange(tokens) % S
        slots = jnp.asarray(page * S + offset, jnp.int32)
        new = [jax.random.normal(key, (tokens, K, D), jnp.bfloat16) for key in keys[2:]]
        writer = np.full((num_pages, S), -1, np.int32)
        writer[page, offset] = np.arange(tokens)

        def expected(new, writer):
            written = (jnp.moveaxis(x[jnp.maximum(writer, 0)], 2, 1) for x in new)
            is_new = (writer >= 0)[:, None, :, None]
            return [jnp.where(is_new, x, pool) for x, pool in zip(written, pools(), strict=True)]

        def write(implementation, new=new, slots=slots):
            def run(state, new, slots):
                (k_pages, v_pages), (k, v) = state, new
                return ops.write_pages(k_pages, v_pages, k, v, slots, layer=0, implementation=implementation)

            return in_place(run, pools(), new, slots)

        work = 2 * sum(x.nbytes for x in new)
        yield Task(f"{tokens} tokens", write, exactly(expected, new, jnp.asarray(writer)), work)


def run_tasks(
    section: str, tasks: Iterator[Task], peers: dict[str, str], limits: Limits, report: Report
) -> None:
    """Measures both kernels and the peers, backends by their names."""
    for task in tasks:
        names = {"mosaic_gpu": "mosaic_gpu", "triton": "triton"} | peers
        contestants = [
            Contestant(name, functools.partial(task.build, backend), is_peer=name in peers)
            for name, backend in names.items()
        ]
        options = {"work": task.work, "limit_us": limits.copy_us(task.work)} if task.work else {}
        compare(report, section, task.name, contestants, wrong=task.wrong, **options)


def run_append(limits: Limits, report: Report, seed: int) -> None:
    tasks = append_tasks(limits.quick, seed)
    run_tasks("append", tasks, {"XLA scatter, donated": "xla"}, limits, report)


def move_tasks(quick: bool, seed: int) -> Iterator[Task]:
    """Pages out of a pool, into it, and within it."""
    L, P, N = (2, 64, 8) if quick else (32, 2048, 512)
    pool_key, block_key = jax.random.split(jax.random.key(seed))
    pool = jax.jit(lambda: jax.random.normal(pool_key, (L, P, K, 16, D), jnp.bfloat16))
    blocks = jax.random.normal(block_key, (N, L, K, 16, D), jnp.bfloat16)
    ids = jax.random.permutation(block_key, P)
    src, dst = ids[:N], ids[N : 2 * N]
    source_of = jnp.arange(P).at[dst].set(src)
    block_of = jnp.full(P, -1).at[dst].set(jnp.arange(N))

    def scattered(blocks, block_of):
        new = jnp.moveaxis(blocks[jnp.maximum(block_of, 0)], 0, 1)
        return jnp.where((block_of >= 0)[:, None, None, None], new, pool())

    def gather(implementation):
        run = jax.jit(functools.partial(ops.gather_pages, implementation=implementation))
        return [Variant(functools.partial(run, pool(), src))]

    def scatter(implementation):
        return in_place(
            functools.partial(ops.scatter_pages, implementation=implementation), pool(), dst, blocks
        )

    def copy(implementation, src=src, dst=dst):
        return in_place(functools.partial(ops.copy_pages, implementation=implementation), pool(), src, dst)

    work, size = 2 * blocks.nbytes, f"{N} pages x {L} layers"
    gathered = exactly(lambda src: jnp.moveaxis(pool()[:, src], 1, 0), src)
    yield Task(f"gather, {size}", gather, gathered, work)
    yield Task(f"scatter, {size}", scatter, exactly(scattered, blocks, block_of), work)
    copied = exactly(lambda source_of: pool()[:, source_of], source_of)
    yield Task(f"copy, {size}", copy, copied, work)
    for n in (64, 256):
        nothing = jnp.full(n, -1, jnp.int32)
        build = functools.partial(copy, src=nothing, dst=nothing)
        yield Task(f"copy, {n} x nothing", build, exactly(pool), None)


def run_move(limits: Limits, report: Report, seed: int) -> None:
    run_tasks("move", move_tasks(limits.quick, seed), {"xla": "xla"}, limits, report)


# --------------------------------------------------------------------------------------------------
# The program
# --------------------------------------------------------------------------------------------------


def run_limits(limits: Limits, **_: Any) -> None:
    for mib in (1, 4) if limits.quick else (32, 256, 1024, 4096):
        limits.read_us(mib * 2**20)
        limits.copy_us(2 * mib * 2**20)
    limits.flops_per_us()


def plot(results: list[Result], facts: dict[str, Any], path: Path) -> str:
    """Draws the shares of the limits; returns what was done."""
    if importlib.util.find_spec("matplotlib") is None:
        return "plot left out: matplotlib is not installed"
    from matplotlib.figure import Figure  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    titles = {
        "decode": "Decode: share of the time to read the same bytes",
        "prefill": "Prefill: share of an 8192³ matrix product",
        "append": "Append: share of a device copy",
    }
    timed = [r for r in results if r.section in titles and r.of_limit is not None]
    sections = [section for section in titles if any(r.section == section for r in timed)]
    if not sections:
        return "plot left out: nothing was measured against a limit"
    rows = [len({r.case for r in timed if r.section == section}) for section in sections]
    figure = Figure(figsize=(8, 1 + 0.5 * sum(rows)), layout="constrained")
    axes = figure.subplots(len(sections), 1, height_ratios=rows, squeeze=False, sharex=True)[:, 0]
    for axis, section in zip(axes, sections, strict=True):
        chosen = [r for r in timed if r.section == section]
        cases, names = (
            list(dict.fromkeys(r.case for r in chosen)),
            list(dict.fromkeys(r.contestant for r in chosen)),
        )
        height = 0.8 / len(names)
        for n, name in enumerate(names):
            own = [r for r in chosen if r.contestant == name]
            label = name if own[0].is_peer else f"paxcache ({name})"
            places = [cases.index(r.case) + n * height for r in own]
            axis.barh(places, [r.of_limit for r in own], height=height, align="edge", label=label)
        axis.set_yticks([i + 0.4 for i in range(len(cases))], cases)
        axis.invert_yaxis()
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(titles[section], fontsize=10)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{facts['device']}, JAX {facts['jax']}, {facts['date']}", fontsize=10)
    figure.savefig(path, dpi=150)
    return f"plot in {path}"


def main(arguments: list[str] | None = None) -> Report:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(arguments)
    seed = secrets.randbelow(2**31)  # fresh inputs in every run
    report = Report(timing.header("bench_kernels", seed=seed), args.repeats, args.json)
    limits = Limits(report, args.quick)
    runs = run_limits, run_plan, run_decode, run_quantized, run_prefill, run_append, run_move
    for section, run in zip(SECTIONS, runs, strict=True):
        if section in args.only:
            with report.guarded(section, "all that is left"):
                run(limits=limits, report=report, seed=seed)
    print(f"\nall results, medians of {args.repeats}")
    for result in sorted(report.results, key=lambda r: SECTIONS.index(r.section)):
        print(f"{result.section:8} {result}")
    if args.plot:
        print(plot(report.results, report.facts, args.plot))
    return report


if __name__ == "__main__":
    main()
