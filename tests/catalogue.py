"""Named cases for the ops, as data, for every implementation: problems built from a case, and what to expect.

A new backend is tested by adding its name to `IMPLEMENTATIONS`. Pools are poisoned: every slot that no query may see
holds NaN or an infinity, and so do pages 0 and P - 1, which no table names, since wrapped and clamped indices end
there. Values lie in [-1, 1], so that one rounding of a weight and one of the result bound the error by the dtype's
own epsilon; see `TOLERANCE`.
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import oracle

IMPLEMENTATIONS = (
    pytest.param("xla", id="xla"),
    pytest.param("mosaic_gpu", id="mosaic_gpu", marks=pytest.mark.gpu),
    pytest.param("triton", id="triton", marks=pytest.mark.gpu),
)
DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
LSE_TOLERANCE = 1e-4  # float32 scores of magnitude ~10, and a sum of exponentials


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """One paged attention problem. Without `query_lens` every row has one query."""

    name: str
    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    """First query of each row; None packs rows and passes cu_query_lens."""
    num_tokens: int | None = None
    """Length of the packed axis; None is the sum, more leaves a tail that belongs to no row."""
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    v_head_dim: int | None = None
    """0: no values, keys serve as values."""
    page_size: int = 4
    max_pages: int = 6
    num_pages: int = 48
    layer: int | None = None
    num_layers: int = 3
    sm_scale: float | None = None
    soft_cap: float | None = None
    sliding_window: int | None = None
    traced_window: bool = False
    sinks: bool = False
    causal: bool = True
    holes: tuple[tuple[int, int], ...] = ()
    """(row, entry) pairs that map nothing."""
    shared: tuple[tuple[int, int, int], ...] = ()
    """(row, of_row, entries): a row's first entries are another row's pages."""
    extra_pages: bool = False
    """Rows map pages past their length too."""
    halves: bool = False
    """Run it in the half-precision dtypes on every machine, not on GPUs alone: compiling takes the suite's time."""
    query_scale: float = 1.0
    poison: float = float("nan")


_MIXED = (1, 4, 5, 0, 23, 24)
_RAGGED: dict[str, Any] = {"seq_lens": (5, 9, 0, 24, 13, 4), "query_lens": (5, 3, 0, 7, 1, 4)}  # 20 tokens
_KERNEL: dict[str, Any] = {
    "page_size": 16,
    "head_dim": 64,
    "num_heads": 8,
    "num_kv_heads": 2,
    "max_pages": 5,
    "num_pages": 40,
}
_LONG: dict[str, Any] = {
    "page_size": 16,
    "head_dim": 128,
    "num_heads": 16,
    "num_kv_heads": 8,
    "max_pages": 48,
    "num_pages": 200,
}

ATTENTION = (
    # Lengths: 0, 1, a page, one less, one more, all pages; one shape, so one compilation.
    Attention(name="decode_lengths_around_a_page", seq_lens=(0, 1, 3, 4, 5, 8), halves=True),
    Attention(name="decode_mixed_lengths", seq_lens=_MIXED, halves=True),
    Attention(name="decode_all_rows_idle", seq_lens=(0,) * 6, halves=True),
    Attention(name="decode_all_rows_full", seq_lens=(24,) * 6, halves=True),
    Attention(name="decode_one_long_row", seq_lens=(1, 1, 24, 1, 1, 1)),
    Attention(name="decode_shared_prefix", seq_lens=(13, 12, 9, 8, 24, 2), shared=((1, 0, 2), (2, 0, 2), (3, 0, 2))),
    Attention(name="decode_pages_past_the_length", seq_lens=_MIXED, extra_pages=True),
    Attention(name="decode_holes", seq_lens=(24, 24, 9, 8, 16, 5), holes=((0, 0), (0, 1), (1, 3), (2, 1), (4, 3))),
    Attention(name="decode_only_holes", seq_lens=(8, 4, 3, 4, 5, 6), holes=((0, 0), (0, 1), (1, 0), (2, 0))),
    Attention(name="decode_infinite_poison", seq_lens=_MIXED, extra_pages=True, poison=float("inf"), halves=True),
    Attention(name="decode_large_scores", seq_lens=_MIXED, query_scale=16.0, halves=True),
    # Query lengths: 20 tokens, so one compilation again.
    Attention(name="ragged", **_RAGGED, halves=True),
    Attention(name="ragged_prefill_only", seq_lens=(5, 3, 4, 1, 0, 7), query_lens=(5, 3, 4, 1, 0, 7), halves=True),
    Attention(name="ragged_all_decode", seq_lens=_MIXED, query_lens=(1, 1, 1, 0, 1, 1), num_tokens=20),
    Attention(name="ragged_tail_of_padding", seq_lens=(5, 9, 0, 24, 13, 4), query_lens=(3, 0, 0, 6, 1, 1),
              num_tokens=20),
    Attention(name="ragged_nothing_asked", seq_lens=_MIXED, query_lens=(0,) * 6, num_tokens=20),
    Attention(name="ragged_one_row_has_all", seq_lens=(0, 0, 20, 0, 3, 0), query_lens=(0, 0, 20, 0, 0, 0), halves=True),
    Attention(name="ragged_last_row_has_all", seq_lens=(1, 2, 3, 4, 5, 24), query_lens=(0, 0, 0, 0, 0, 20)),
    Attention(name="ragged_holes", **_RAGGED, holes=((1, 0), (3, 1), (3, 3), (4, 3), (5, 0))),
    Attention(name="ragged_shared_prefix", **_RAGGED, shared=((3, 1, 2), (4, 1, 1))),
    Attention(name="gap_where_a_row_was_refused", **_RAGGED, starts=(0, 5, 8, 14, 21, 22), num_tokens=26),
    Attention(name="row_aligned", **_RAGGED, starts=(0, 7, 14, 21, 28, 35), num_tokens=42),
    # Features, each alone and together, on decode and ragged rows.
    Attention(name="decode_soft_cap", seq_lens=_MIXED, soft_cap=2.0, query_scale=4.0, sm_scale=0.7),
    Attention(name="decode_window_5", seq_lens=_MIXED, sliding_window=5),
    Attention(name="decode_window_5_of_holes", seq_lens=(9, 17, 24, 8, 6, 12), sliding_window=5,
              holes=((0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (2, 3), (5, 0))),
    Attention(name="decode_window_int32_max", seq_lens=_MIXED, sliding_window=2**31 - 1),
    Attention(name="decode_window_1_traced", seq_lens=_MIXED, sliding_window=1, traced_window=True),
    Attention(name="decode_window_5_traced", seq_lens=_MIXED, sliding_window=5, traced_window=True),
    Attention(name="decode_window_past_the_start_traced", seq_lens=_MIXED, sliding_window=1000, traced_window=True),
    Attention(name="decode_window_int32_max_traced", seq_lens=_MIXED, sliding_window=2**31 - 1, traced_window=True),
    Attention(name="decode_sinks", seq_lens=_MIXED, sinks=True, halves=True),
    Attention(name="ragged_soft_cap", **_RAGGED, soft_cap=2.0, query_scale=4.0),
    Attention(name="ragged_window_3", **_RAGGED, sliding_window=3),
    Attention(name="ragged_window_3_of_holes", **_RAGGED, sliding_window=3, holes=((3, 0), (3, 1), (3, 2), (4, 0))),
    Attention(name="ragged_window_3_traced", **_RAGGED, sliding_window=3, traced_window=True),
    Attention(name="ragged_window_1_traced", **_RAGGED, sliding_window=1, traced_window=True),
    Attention(name="ragged_sinks", **_RAGGED, sinks=True),
    Attention(name="ragged_sinks_alone", **_RAGGED, sinks=True, holes=((0, 0), (0, 1), (5, 0))),
    Attention(name="ragged_not_causal", **_RAGGED, causal=False),
    Attention(name="ragged_not_causal_window", **_RAGGED, causal=False, sliding_window=4),
    Attention(name="ragged_everything", **_RAGGED, sm_scale=0.3, soft_cap=3.0, sliding_window=6, sinks=True,
              layer=1, holes=((3, 2),), shared=((4, 1, 1),), extra_pages=True, halves=True),
    # Pools.
    Attention(name="layer_of_a_pool", seq_lens=_MIXED, layer=2),
    Attention(name="ragged_layer_of_a_pool", **_RAGGED, layer=0),
    Attention(name="values_narrower", seq_lens=_MIXED, v_head_dim=5, halves=True),
    Attention(name="ragged_values_wider", **_RAGGED, v_head_dim=16),
    Attention(name="keys_serve_as_values", seq_lens=_MIXED, v_head_dim=0, layer=1),
    Attention(name="ragged_keys_serve_as_values", **_RAGGED, v_head_dim=0, halves=True),
    # Heads.
    Attention(name="mha", seq_lens=_MIXED, num_heads=3, num_kv_heads=3),
    Attention(name="mqa", seq_lens=_MIXED, num_heads=8, num_kv_heads=1),
    Attention(name="gqa_5", seq_lens=_MIXED, num_heads=5, num_kv_heads=1),
    Attention(name="ragged_gqa_7", **_RAGGED, num_heads=14, num_kv_heads=2, sinks=True),
    # Sizes that divide nothing, and those that kernels like.
    Attention(name="page_of_one", seq_lens=(0, 1, 2, 6), page_size=1, num_pages=30),
    Attention(name="page_of_three", seq_lens=(3, 4, 17, 18), query_lens=(3, 1, 5, 0), page_size=3),
    Attention(name="head_dim_5", seq_lens=_MIXED, head_dim=5),
    Attention(name="one_row_one_page", seq_lens=(3,), max_pages=1, num_pages=3),
    Attention(name="kernel_decode_64", seq_lens=(0, 1, 15, 16, 17, 80), **_KERNEL, halves=True),
    Attention(name="kernel_decode_96", seq_lens=(31, 1, 80), **{**_KERNEL, "head_dim": 96}),
    Attention(name="kernel_decode_256", seq_lens=(7, 49), **{**_KERNEL, "head_dim": 256}),
    Attention(name="kernel_ragged_128", seq_lens=(80, 33, 0, 17, 64), query_lens=(66, 33, 0, 1, 5),
              **{**_KERNEL, "head_dim": 128}, num_tokens=120),
    Attention(name="kernel_ragged_everything", seq_lens=(80, 33, 0, 17, 64), query_lens=(66, 33, 0, 1, 5),
              **_KERNEL, sliding_window=37, soft_cap=5.0, sinks=True, layer=2, halves=True),
    # Long rows: more keys than one worker takes, split and joined again, with whole splits empty or out of sight.
    Attention(name="long_decode", seq_lens=(700, 1, 128, 600, 0, 512), **_LONG, halves=True),
    Attention(name="long_decode_holes", seq_lens=(700, 700, 300, 16, 64, 640), **_LONG,
              holes=(*((0, m) for m in range(16)), *((1, m) for m in range(8, 43)), *((5, m) for m in range(40)))),
    Attention(name="long_ragged", seq_lens=(700, 300, 0, 129), query_lens=(150, 1, 0, 129), **_LONG),
    Attention(name="long_ragged_everything", seq_lens=(700, 300, 0, 129), query_lens=(150, 1, 0, 129), **_LONG,
              sliding_window=200, soft_cap=5.0, sinks=True, layer=1, holes=tuple((0, m) for m in range(21))),
)  # fmt: skip


def attention_params():
    """pytest parameters (case, dtype, implementation)."""
    for implementation in IMPLEMENTATIONS:
        for case in ATTENTION:
            for dtype in DTYPES:
                if dtype == "float32" or case.halves or implementation.marks:
                    name = f"{case.name}-{dtype}-{implementation.id}"
                    yield pytest.param(
                        case, dtype, *implementation.values, id=name, marks=implementation.marks
                    )


@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of `ops.paged_attention`: NumPy arrays by name, static options by name, and the answer."""

    arrays: dict[str, Any]
    static: dict[str, Any]
    out: np.ndarray
    lse: np.ndarray

    def device_arrays(self) -> dict[str, Any]:
        """The arrays on the default device."""
        return {name: None if x is None else jnp.asarray(x) for name, x in self.arrays.items()}


def build(case: Attention, dtype: str, *, seed: int = 0) -> Problem:
    """A problem with fresh pages in shuffled order; the same case and seed give the same problem."""
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), seed])
    B, P, S, D = len(case.seq_lens), case.num_pages, case.page_size, case.head_dim
    K, H = case.num_kv_heads, case.num_heads
    tables = _tables(case, rng)
    np_dtype = jnp.dtype(dtype)

    def pool(width: int, fill) -> np.ndarray:
        pages = np.full((P, K, S, width), case.poison, np_dtype)
        if np.isinf(case.poison):
            pages[::2] = -case.poison
        for b, length in enumerate(case.seq_lens):
            for p in range(length):
                page = tables[b, p // S]
                if page >= 0 and not np.isfinite(pages[page, 0, p % S, 0]):
                    pages[page, :, p % S] = fill((K, width)).astype(np_dtype)
        return pages

    k_pages = pool(
        D, rng.standard_normal if case.v_head_dim != 0 else lambda shape: rng.uniform(-1, 1, shape)
    )
    v_dim = D if case.v_head_dim is None else case.v_head_dim
    v_pages = pool(v_dim, lambda shape: rng.uniform(-1, 1, shape)) if v_dim else None
    lens = case.query_lens
    num_tokens = case.num_tokens or (B if lens is None else sum(lens))
    q = (case.query_scale * rng.standard_normal((num_tokens, H, D))).astype(np_dtype)
    seq_lens = np.asarray(case.seq_lens, np.int32)
    sinks = rng.standard_normal(H).astype(np.float32) if case.sinks else None

    starts = None
    if lens is not None:
        starts = case.starts or (0, *np.cumsum(lens)[:-1])
    out, lse = oracle.paged_attention(
        q, k_pages, v_pages, tables, seq_lens, query_starts=starts, query_lens=lens, sm_scale=case.sm_scale,
        soft_cap=case.soft_cap, sliding_window=case.sliding_window, sinks=sinks, causal=case.causal,
    )  # fmt: skip

    if case.layer is not None:
        k_pages, v_pages = (_one_of_layers(case, pages) for pages in (k_pages, v_pages))
    arrays = {
        "q": q,
        "k_pages": k_pages,
        "block_tables": tables,
        "seq_lens": seq_lens,
        "sinks": sinks,
        "sliding_window": np.int32(case.sliding_window)
        if case.traced_window and case.sliding_window
        else None,
    }
    if lens is not None and case.starts is None:
        arrays["cu_query_lens"] = np.cumsum([0, *lens], dtype=np.int32)
    elif lens is not None:
        arrays |= {"query_starts": np.asarray(starts, np.int32), "query_lens": np.asarray(lens, np.int32)}
    static: dict[str, Any] = {
        "layer": case.layer,
        "sm_scale": case.sm_scale,
        "soft_cap": case.soft_cap,
        "causal": case.causal,
    }
    if not case.traced_window:
        static["sliding_window"] = case.sliding_window
    arrays = {n: x for n, x in arrays.items() if x is not None}
    return Problem({**arrays, "v_pages": v_pages}, static, out, lse)


def _tables(case: Attention, rng: np.random.Generator) -> np.ndarray:
    """Tables of shuffled pages; -1 past the length, or pages of poison there."""
    B, M, S = len(case.seq_lens), case.max_pages, case.page_size
    tables = np.full((B, M), -1, np.int32)
    fresh = iter(rng.permutation(np.arange(1, case.num_pages - 1)).tolist())
    for b, length in enumerate(case.seq_lens):
        needed = -(-length // S)
        assert needed <= M, f"{case.name}: row {b} does not fit"
        tables[b, :needed] = [next(fresh) for _ in range(needed)]
    for b, of, entries in case.shared:
        tables[b, :entries] = tables[of, :entries]
    for b, m in case.holes:
        tables[b, m] = -1
    if case.extra_pages:
        for b, length in enumerate(case.seq_lens):
            if -(-length // S) < M and (page := next(fresh, None)) is not None:
                tables[b, -(-length // S)] = page
    return tables


def _one_of_layers(case: Attention, pages: np.ndarray | None) -> np.ndarray | None:
    """The pool of several layers whose others are poison."""
    if pages is None:
        return None
    stacked = np.full((case.num_layers, *pages.shape), np.nan, pages.dtype)
    stacked[case.layer] = pages
    return stacked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """One `ops.write_pages` problem over a pool of 12 pages."""

    name: str
    slots: tuple[int, ...]
    layer: int | None = None
    v_head_dim: int | None = None
    page_size: int = 4
    head_dim: int = 8
    num_kv_heads: int = 2
    num_pages: int = 12


_SHUFFLED = (17, 3, 40, 0, 47, 8, 21, 30)
WRITE = (
    Write(name="shuffled_slots", slots=_SHUFFLED),
    Write(name="negative_slots_are_dropped", slots=(-1, 3, -2, 0, -48, 8, -49, -(2**31))),
    Write(name="slots_past_the_pool_are_dropped", slots=(48, 3, 49, 0, 96, 8, 1000, 2**31 - 1)),
    Write(name="all_dropped", slots=(-1, 48, -1, 48, -1, 48, -1, 48)),
    Write(name="one_page_in_order", slots=(20, 21, 22, 23)),
    Write(name="one_token", slots=(47,)),
    Write(name="no_tokens", slots=()),
    Write(name="layer_of_a_pool", slots=_SHUFFLED, layer=1),
    Write(name="layer_of_a_pool_with_dropped", slots=(17, -1, 40, 48, 47, -5, 21, 10**9), layer=2),
    Write(name="without_values", slots=_SHUFFLED, v_head_dim=0, layer=0),
    Write(name="values_of_another_width", slots=_SHUFFLED, v_head_dim=3),
    Write(name="page_of_one", slots=(0, 11, 5, 12, -1), page_size=1),
    Write(name="kernel_sizes", slots=(0, 191, 17, 16, 15, -1, 192, 100), page_size=16, head_dim=128, layer=1),
)


def build_write(case: Write, dtype: str):
    """(pools, new tokens, slots, expected pools); pools hold random numbers, v is None where there are no values."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    np_dtype = jnp.dtype(dtype)
    lead = (3,) if case.layer is not None else ()
    v_dim = case.head_dim if case.v_head_dim is None else case.v_head_dim
    pools, tokens, expected = [], [], []
    for width in (case.head_dim, v_dim):
        if width == 0:
            for values in (pools, tokens, expected):
                values.append(None)
            continue
        pool = rng.standard_normal((*lead, case.num_pages, case.num_kv_heads, case.page_size, width)).astype(
            np_dtype
        )
        new = rng.standard_normal((len(case.slots), case.num_kv_heads, width)).astype(np_dtype)
        after = pool.copy()
        target = after if case.layer is None else after[case.layer]
        for token, slot in enumerate(case.slots):
            if 0 <= slot < case.num_pages * case.page_size:
                target[slot // case.page_size, :, slot % case.page_size] = new[token]
        pools.append(pool)
        tokens.append(new)
        expected.append(after)
    return pools, tokens, np.asarray(case.slots, np.int64), expected
