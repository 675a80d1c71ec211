"""Paged attention for rows with many query tokens, in Triton (Ampere and later).

A program takes a *tile*: some consecutive query tokens of a row with the heads that share a KV head, so that a key is
read once for all of them. It walks the keys in blocks: those that only some queries see, at the window's and the
causal edge, in loops with masks, and those that all see in one without. `prefill_plan` lists the tiles once a step.
The tiles of a row come last first, which are the longest, and with all their heads: programs that run side by side
find each other's keys in the L2 cache.

Reference: FlashAttention-2 (Dao, 2023) for the loop; Pope et al. (2022) for sharing keys among heads.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from paxcache.kernels._request import Pools, Rows, Scores
from paxcache.kernels.triton._tiles import (
    LOG2E,
    Shape,
    capped,
    finished,
    finite,
    load_tile,
    numbers_of,
    pool_inputs,
    product,
    shape_of,
)
from paxcache.kernels.triton._triton import Limits, call, constant, device_limits, jit, scalar, tl

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

# Columns of Plan.tiles: the row (-1: none), the tile's first query token in it, and whether the row has holes in sight.
ROW, FIRST, HOLES = (constant(i) for i in range(3))
TILE_COLUMNS = constant(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A launch configuration; `default_config` makes one."""

    columns: int
    """Query heads times query tokens of a tile."""
    block: int
    """Keys of a block."""
    num_warps: int
    num_stages: int
    """Blocks of keys in shared memory, plus one before Hopper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanShape:
    """What the form of a plan depends on; `plan_shape` makes one."""

    num_tiles: int
    block_tokens: int
    min_query_len: int
    page_size: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of a step."""

    tiles: Int32[Array, "tiles columns"]
    made_for: PlanShape = dataclasses.field(metadata={"static": True})


def default_config(shape: Shape, limits: Limits) -> Config:
    """The largest tiles whose sums the registers hold, and as many stages as fit the shared memory, up to three."""
    itemsize = jnp.dtype(shape.products).itemsize
    row_bytes = max(shape.pad, shape.v_pad) * itemsize
    from_memory = limits.is_hopper and itemsize == 2 and shape.form == "plain"
    if row_bytes <= 256:
        columns, block, num_warps = 128, 128 if from_memory else 64, 8
    elif row_bytes <= 512:
        columns, block, num_warps = 64, 32, 8
    else:
        columns, block, num_warps = 16, 16, 8
    if itemsize == 4:  # three products for one, of as many operands
        columns, num_warps = min(columns, 32), 4 if row_bytes <= 512 else 8
    if not limits.is_hopper:  # weights and queries are in registers
        block = min(block, 32)
    others = columns * shape.pad * itemsize + 1024
    if not from_memory:
        others += columns * block * itemsize
        others *= 3 if itemsize == 4 else 1
    if shape.form != "plain":  # decoded, for the matrix unit
        others += block * (shape.pad + shape.v_pad) * itemsize
    room = limits.smem_bytes_per_block - others
    buffers = max(1, min(3, room // (block * shape.token_bytes)))
    # Products of whole warpgroups read a buffer while the one after it is waited for.
    return Config(
        columns=columns, block=block, num_warps=num_warps, num_stages=buffers + (not limits.is_hopper)
    )


def _blocks_of(shape: Shape, config: Config) -> tuple[int, int]:
    """Query heads and query tokens of a tile."""
    heads = min(shape.group, config.columns)
    return heads, config.columns // heads


def plan_shape(
    shape: Shape, *, num_rows: int, num_tokens: int, min_query_len: int, config: Config
) -> PlanShape:
    """The form of the plan that `prefill_plan` makes; a plan of another form is of no use to `prefill`."""
    _, block_tokens = _blocks_of(shape, config)
    most_rows = min(num_rows, max(1, num_tokens // min_query_len))
    return PlanShape(
        num_tiles=num_tokens // block_tokens + most_rows,
        block_tokens=block_tokens,
        min_query_len=min_query_len,
        page_size=shape.page_size,
    )


def prefill_plan(
    rows: Rows, made_for: PlanShape, *, sliding_window: Int32[Array, ""] | int | None = None
) -> Plan:
    """Lists the tiles of a step, on the device; lengths are dynamic, shapes are not.

    Args:
      rows: the step's. Those with fewer query tokens than the plan is made for are left alone.
      made_for: from `plan_shape`.
      sliding_window: tokens a query sees, itself included.

    Returns:
      The plan, for every layer with these rows, tables, window and heads.
    """
    i32, tokens = jnp.int32, made_for.block_tokens
    block_tables, seq_lens, _, query_lens = rows
    (B, M), page_size = block_tables.shape, made_for.page_size
    served = (seq_lens > 0) & (query_lens >= made_for.min_query_len)
    tiles = jnp.where(served, (query_lens + (tokens - 1)) // tokens, 0).astype(i32)
    row_ids = jnp.arange(B, dtype=i32)
    ends = jnp.sum(jnp.where(row_ids[None, :] <= row_ids[:, None], tiles, 0), axis=1, dtype=i32)
    ids = jnp.arange(made_for.num_tiles, dtype=i32)
    row = jnp.sum(ends[None, :] <= ids[:, None], axis=1, dtype=i32)
    at = jnp.minimum(row, B - 1)
    first = (ids - (ends - tiles)[at]) * tokens

    # A row with a hole in sight has all its blocks looked at for holes.
    entry = jnp.arange(M, dtype=i32)
    in_sight = entry < ((seq_lens + (page_size - 1)) // page_size)[:, None]
    if sliding_window is not None:
        low = jnp.maximum(seq_lens - query_lens - sliding_window + 1, 0) // page_size
        in_sight &= entry >= low[:, None]
    has_holes = jnp.any(in_sight & (block_tables < 0), axis=1).astype(i32)
    lines = jnp.stack([jnp.where(row < B, row, -1), first, has_holes[at], jnp.zeros_like(first)], axis=1)
    return Plan(lines[::-1], made_for)


@jit
def _attend(
    state,
    q_tile,
    position,
    begin,
    stop,
    end,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    table,
    first_page,
    kv_head,
    scale,
    cap,
    window,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    S: tl.constexpr,
    FORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    KEYS_ARE_VALUES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds blocks [begin, stop) of keys to sum, maximum and denominator; without MASKED all their keys are seen."""
    acc, m, l = state
    in_block = tl.arange(0, BLOCK)
    # Page ids are loaded a block ahead of their use, so that keys need not wait for them.
    token = begin * BLOCK + in_block
    page = tl.load(table + token // S, mask=token < end, other=-1)
    for i in range(begin, stop):
        present = page >= 0
        here = first_page + page
        slot = (here * KV_HEADS + kv_head) * S + token % S
        next_token = (i + 1) * BLOCK + in_block
        page = tl.load(table + next_token // S, mask=next_token < end, other=-1)

        k = load_tile(k_pages, slot, present, D, PAD, FORM, PRODUCTS, HARDWARE_FP8, MASKED)
        s = product(q_tile, tl.trans(k))
        if FORM != "plain":
            at = slot if PER_TOKEN else here
            s = s * tl.load(k_scales + at, mask=present, other=0.0)[None, :]
        if CAPPED:
            s = capped(s * scale, cap)
        if MASKED:
            if not CAPPED:
                s = s * scale
            seen = present[None, :]
            if CAUSAL:
                seen = seen & (token[None, :] <= position[:, None])
            if WINDOWED:
                seen = seen & (token[None, :] > position[:, None] - window)
            s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            top = finite(m_new)
            p = tl.exp2(s - top[:, None])
        elif CAPPED:
            m_new = tl.maximum(m, tl.max(s, 1))
            top = m_new
            p = tl.exp2(s - top[:, None])
        else:  # scaling and taking off the maximum are one instruction, for a scale that is not negative
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            top = m_new
            p = tl.exp2(s * scale - top[:, None])
        weight = tl.exp2(m - top)
        l = l * weight + tl.sum(p, 1)
        m = m_new
        if FORM != "plain":
            p = p * tl.load(v_scales + at, mask=present, other=0.0)[None, :]
        if KEYS_ARE_VALUES:
            v = k
        else:
            v = load_tile(v_pages, slot, present, DV, V_PAD, FORM, PRODUCTS, HARDWARE_FP8, MASKED)
        acc = acc * weight[:, None] + product(p.to(PRODUCTS), v)
        token = next_token
    return acc, m, l


@jit
def _prefill_kernel(
    q,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    tables,
    tiles,
    seq_lens,
    query_starts,
    query_lens,
    layer,
    sm_scale,
    soft_cap,
    window,
    sinks,
    out_in,
    lse_in,
    num_pages,
    max_pages,
    out,
    lse,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PAD: tl.constexpr,
    V_PAD: tl.constexpr,
    S: tl.constexpr,
    FORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    KEYS_ARE_VALUES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    HARDWARE_FP8: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a tile of query tokens and heads over all the keys that they see."""
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    pair = tl.program_id(0) % (KV_HEADS * HEAD_BLOCKS)
    line = tiles + tl.program_id(0) // (KV_HEADS * HEAD_BLOCKS) * TILE_COLUMNS
    row = tl.load(line + ROW)
    if row < 0:
        return
    first, has_holes = tl.load(line + FIRST), tl.load(line + HOLES)
    end, queries = tl.load(seq_lens + row), tl.load(query_lens + row)
    kv_head = pair % KV_HEADS

    column = tl.arange(0, COLUMNS)
    in_group = pair // KV_HEADS * BLOCK_HEADS + column % BLOCK_HEADS
    in_row = first + column // BLOCK_HEADS
    is_query = (column < BLOCK_HEADS * BLOCK_TOKENS) & (in_group < GROUP) & (in_row < queries)
    token_head = (tl.load(query_starts + row) + in_row).to(tl.int64) * (KV_HEADS * GROUP)
    token_head += kv_head * GROUP + in_group
    number = numbers_of(PAD, D, FORM)
    q_pointers = q + token_head[:, None] * D + number[None, :]
    q_tile = tl.load(q_pointers, mask=is_query[:, None] & (number < D)[None, :], other=0.0).to(PRODUCTS)
    scale = tl.load(sm_scale) * LOG2E
    q_tile = tl.where(scale < 0, -q_tile, q_tile)  # so that the scale is not negative
    scale = tl.abs(scale)

    # Keys [low, high) are seen by some query of the tile, [all_low, all_high) by all.
    position = end - queries + in_row
    lowest = end - queries + first
    highest = tl.minimum(lowest + BLOCK_TOKENS, end) - 1
    low, all_low = 0, 0
    high, all_high = end, end
    width = tl.load(window)
    if WINDOWED:
        low = tl.maximum(lowest - width + 1, 0)
        all_low = tl.maximum(highest - width + 1, 0)
    if CAUSAL:
        high, all_high = highest + 1, lowest + 1
    begin, stop = low // BLOCK, (high + BLOCK - 1) // BLOCK
    full_stop = tl.maximum(all_high // BLOCK, begin)
    if WINDOWED:
        full_begin = tl.minimum((all_low + BLOCK - 1) // BLOCK, full_stop)
    else:
        full_begin = begin
    if has_holes != 0:
        full_begin, full_stop = begin, begin

    state = (
        tl.zeros([COLUMNS, V_PAD], tl.float32),
        tl.full([COLUMNS], float("-inf"), tl.float32),
        tl.zeros([COLUMNS], tl.float32),
    )
    table = tables + row.to(tl.int64) * max_pages
    first_page = tl.load(layer).to(tl.int64) * num_pages
    cap = tl.load(soft_cap)
    if WINDOWED:
        state = _attend(
            state, q_tile, position, begin, full_begin, end, k_pages, v_pages, k_scales, v_scales, table,
            first_page, kv_head, scale, cap, width, KV_HEADS, D, DV, PAD, V_PAD, S, FORM, PER_TOKEN,
            KEYS_ARE_VALUES, PRODUCTS, HARDWARE_FP8, CAUSAL, WINDOWED, CAPPED, BLOCK, True,
        )  # fmt: skip
    state = _attend(
        state, q_tile, position, full_begin, full_stop, end, k_pages, v_pages, k_scales, v_scales, table,
        first_page, kv_head, scale, cap, width, KV_HEADS, D, DV, PAD, V_PAD, S, FORM, PER_TOKEN,
        KEYS_ARE_VALUES, PRODUCTS, HARDWARE_FP8, CAUSAL, WINDOWED, CAPPED, BLOCK, False,
    )  # fmt: skip
    acc, m, l = _attend(
        state, q_tile, position, full_stop, stop, end, k_pages, v_pages, k_scales, v_scales, table,
        first_page, kv_head, scale, cap, width, KV_HEADS, D, DV, PAD, V_PAD, S, FORM, PER_TOKEN,
        KEYS_ARE_VALUES, PRODUCTS, HARDWARE_FP8, CAUSAL, WINDOWED, CAPPED, BLOCK, True,
    )  # fmt: skip

    sink = tl.load(sinks + kv_head * GROUP + in_group, mask=is_query, other=0.0) if HAS_SINKS else m
    o, total = finished(acc, m, l, sink, HAS_SINKS)
    v_number = numbers_of(V_PAD, DV, FORM)
    to = out + token_head[:, None] * DV + v_number[None, :]
    tl.store(to, o.to(out.dtype.element_ty), mask=is_query[:, None] & (v_number < DV)[None, :])
    if RETURN_LSE:
        tl.store(lse + token_head, total, mask=is_query)


def prefill(
    out: Float[Array, "T H Dv"],
    lse: Float[Array, "T H"] | None,
    q: Float[Array, "T H D"],
    pools: Pools,
    rows: Rows,
    scores: Scores,
    *,
    plan: Plan,
    config: Config,
    limits: Limits | None = None,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "T H"] | None]:
    """Puts the attention of the rows that the plan serves into `out`, in place; other rows' tokens stay.

    Args:
      out: [T, H, Dv].
      lse: f32[T, H] to be written too, or None.
      q: [T, H, D].
      pools, rows, scores: what is asked for.
      plan: from `prefill_plan`, for these rows.
      config: the launch configuration that the plan was made for.
      limits: the device's.

    Returns:
      out and lse.
    """
    limits = device_limits() if limits is None else limits
    k_pages, _, layer = pools
    block_tables, seq_lens, query_starts, query_lens = rows
    sm_scale, soft_cap, sliding_window, sinks, causal, _ = scores
    shape = shape_of(q, pools)
    f32, i32 = jnp.float32, jnp.int32
    heads, tokens = _blocks_of(shape, config)
    pairs = shape.num_kv_heads * -(-shape.group // heads)
    written = [out, scalar(0, f32) if lse is None else lse]
    results = call(
        _prefill_kernel,
        q,
        *pool_inputs(pools),
        block_tables,
        plan.tiles,
        seq_lens.astype(i32),
        query_starts.astype(i32),
        query_lens.astype(i32),
        scalar(layer, i32),
        scalar(sm_scale, f32),
        scalar(0 if soft_cap is None else soft_cap, f32),
        scalar(0 if sliding_window is None else sliding_window, i32),
        scalar(0, f32) if sinks is None else sinks.astype(f32),
        *written,
        k_pages.shape[1],
        block_tables.shape[1],
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in written],
        grid=plan.made_for.num_tiles * pairs,
        limits=limits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        in_place={15: 0} if lse is None else {15: 0, 16: 1},
        **shape.constants(limits),
        CAUSAL=causal,
        WINDOWED=sliding_window is not None,
        CAPPED=soft_cap is not None,
        HAS_SINKS=sinks is not None,
        RETURN_LSE=lse is not None,
        BLOCK_HEADS=heads,
        BLOCK_TOKENS=tokens,
        COLUMNS=config.columns,
        BLOCK=config.block,
    )
    return results[0], None if lse is None else results[1]
