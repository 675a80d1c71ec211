"""Paged attention for rows with few query tokens, in Triton (Ampere and later).

Decode reads every visible key and value once and computes little: what counts is that all SMs read all the time,
whatever the mix of lengths.

- Work is split by tokens. `decode_plan` cuts a flat list of tiles, in order of (row, pair, token), into contiguous
  *ranges* of equal length, once a step. A *pair* is a KV head and a block of query columns. What a range does of one
  pair is a *piece*. A pair inside one range is finished there; one that is cut leaves partial results (un-normalised
  sum, maximum, denominator) that a second kernel joins, which also writes the zeros of tokens that no row owns.
- Neighbouring programs, the *lanes* of a range, take the same tokens of different pairs, because a page holds its
  heads side by side. The flat list is then a lane's.
- The heads of a KV head, and a few query tokens, are the columns of one matrix product, so that keys are read once.
- Programs are persistent, as many as shared memory lets an SM hold; several of them hide each other's starts.

Reference: flash decoding (Dao et al., 2023) for the split; FlashInfer (Ye et al., 2025) for balanced work lists.
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
from paxcache.kernels.triton._triton import (
    Limits,
    call,
    constant,
    device_limits,
    jit,
    next_power_of_2,
    scalar,
    tl,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

MIN_COLUMNS = 16  # rows of a matrix instruction
MAX_ACCUMULATOR = 64 * 128  # columns times width that the registers hold, of products in half precision
MAX_LANES = 8
TILE_BYTES = 32 * 1024  # of keys and values, and at most MAX_TILE tokens
MAX_TILE = 128
QUEUE_BYTES = 64 * 1024  # under way in a program: with two of them enough to keep the memory busy
MIN_TILES = 4  # a range: shorter ones pay more for joins than another program gains
JOINED = 32  # partial results that a join loads at once
ZEROED = 16  # tokens of a program that looks for those without a row
ROWS_AT_ONCE = 128  # that it compares them with

# Columns of Plan.ranges: where a range begins (row, which of its lane's pairs, tile), its tiles, and how many ranges
# continue the pair that it is the first to continue.
ROW, TURN, TILE, TILES, PARTS = (constant(i) for i in range(5))
RANGE_COLUMNS = constant(8)
# And of Plan.rows: visible tokens end and begin; the next row with work.
END, BEGIN, NEXT = (constant(i) for i in range(3))
ROW_COLUMNS = constant(4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A launch configuration; `default_config` makes one."""

    tile: int
    """Tokens of a tile."""
    num_warps: int
    num_stages: int
    """Tiles in shared memory, plus one."""
    num_ranges: int
    """Ranges a lane."""
    min_ranges: int
    """Ranges that get work where there is little."""
    lanes: int
    """Neighbouring programs that do the same ranges for different pairs of a row."""
    block_heads: int
    """Query heads of a pair."""
    block_tokens: int
    """Query tokens of a pair; a row with more takes several passes over its keys."""

    @property
    def columns(self) -> int:
        """Query columns of a pair, padded."""
        return max(MIN_COLUMNS, next_power_of_2(self.block_heads * self.block_tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanShape:
    """What the form of a plan depends on; `plan_shape` makes one."""

    num_rows: int
    max_query_len: int
    windowed: bool
    tile: int
    lanes: int
    turns: int
    """Pairs of a row that one lane takes, one after another."""
    num_ranges: int
    min_ranges: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The balanced list of work of a step."""

    ranges: Int32[Array, "ranges columns"]
    rows: Int32[Array, "B columns"]
    made_for: PlanShape = dataclasses.field(metadata={"static": True})


def _pairs(shape: Shape, max_query_len: int, config: Config) -> int:
    """Pairs of a row."""
    blocks = -(-shape.group // config.block_heads) * -(-max_query_len // config.block_tokens)
    return shape.num_kv_heads * blocks


def default_config(
    shape: Shape,
    max_query_len: int,
    limits: Limits,
    *,
    tile: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    programs_per_sm: int | None = None,
) -> Config:
    """Two programs an SM that share its memory, each with two tiles or more under way.

    Tiles are as long as that allows, up to TILE_BYTES: addresses and reductions cost instructions a tile, and decoding
    quantised pages is bound by those. What is given is not chosen.
    """
    itemsize, width = jnp.dtype(shape.products).itemsize, max(shape.pad, shape.v_pad)
    most = max(MIN_COLUMNS, 2 * MAX_ACCUMULATOR // (width * itemsize))
    block_heads = min(shape.group, most)
    block_tokens = max(1, min(max_query_len, most // block_heads))
    columns = max(MIN_COLUMNS, next_power_of_2(block_heads * block_tokens))
    room = limits.smem_bytes_per_sm // (programs_per_sm or 2) - 1024  # the system's

    def others(tile: int) -> int:
        """Bytes for queries, weights and reductions; TF32 takes them apart."""
        return columns * (shape.pad + tile) * itemsize * (2 if itemsize == 4 else 1) + 1024

    if tile is None:
        tile = MAX_TILE
        while tile > 16 and tile * shape.token_bytes > TILE_BYTES:
            tile //= 2
        while tile > 16 and 2 * tile * shape.token_bytes + others(tile) > room:
            tile //= 2
    buffer = tile * shape.token_bytes
    buffers = (
        num_stages - 1
        if num_stages
        else max(1, min(4, QUEUE_BYTES // buffer, (room - others(tile)) // buffer))
    )
    if programs_per_sm is None:
        smem = buffers * buffer + others(tile) + 1024
        programs_per_sm = max(1, min(2, limits.smem_bytes_per_sm // smem))
    made = Config(
        tile=tile,
        num_warps=num_warps or (4 if width <= 512 else 8),
        num_stages=buffers + 1,
        num_ranges=1,
        min_ranges=1,
        lanes=1,
        block_heads=block_heads,
        block_tokens=block_tokens,
    )
    programs, pairs = programs_per_sm * limits.num_sms, _pairs(shape, max_query_len, made)

    def divides(lanes: int) -> bool:
        """No more than one program in 32 is lost to the last group of lanes."""
        return pairs % lanes == 0 and all(32 * (n % lanes) <= n for n in (programs, limits.num_sms))

    lanes = max(filter(divides, range(1, MAX_LANES + 1)))
    return dataclasses.replace(
        made, lanes=lanes, num_ranges=programs // lanes, min_ranges=limits.num_sms // lanes
    )


def plan_shape(
    shape: Shape, *, num_rows: int, max_query_len: int, windowed: bool, config: Config
) -> PlanShape:
    """The form of the plan that `decode_plan` makes; a plan of another form is of no use to `decode`."""
    return PlanShape(
        num_rows=num_rows,
        max_query_len=max_query_len,
        windowed=windowed,
        tile=config.tile,
        lanes=config.lanes,
        turns=_pairs(shape, max_query_len, config) // config.lanes,
        num_ranges=config.num_ranges,
        min_ranges=config.min_ranges,
    )


def decode_plan(
    rows: Rows, made_for: PlanShape, *, sliding_window: Int32[Array, ""] | int | None = None
) -> Plan:
    """Cuts the visible tokens of a step into balanced ranges, on the device; lengths are dynamic, shapes are not.

    Args:
      rows: the step's. Those with more query tokens than the plan is made for are left alone.
      made_for: from `plan_shape`.
      sliding_window: tokens a query sees, itself included; tokens left of it are not read.

    Returns:
      The plan, for every layer with these rows, window and KV heads.
    """
    i32, tile_len, turns = jnp.int32, made_for.tile, made_for.turns
    _, seq_lens, _, query_lens = rows
    B = seq_lens.shape[0]
    served = (seq_lens > 0) & (query_lens > 0) & (query_lens <= made_for.max_query_len)
    end = jnp.where(served, seq_lens, 0).astype(i32)
    begin = jnp.zeros_like(end)
    if sliding_window is not None:
        begin = jnp.clip(end - query_lens - sliding_window + 1, 0, end)
    tiles = (end - begin + (tile_len - 1)) // tile_len

    row_ids = jnp.arange(B, dtype=i32)
    up_to = row_ids[None, :] <= row_ids[:, None]
    tile_ends = jnp.sum(jnp.where(up_to, tiles, 0), axis=1, dtype=i32) * turns
    following = jnp.min(jnp.where(~up_to & (tiles > 0), row_ids, B - 1), axis=1)
    total = tile_ends[-1]

    range_ids = jnp.arange(made_for.num_ranges + 1, dtype=i32)
    used = jnp.clip(total // MIN_TILES, made_for.min_ranges, made_for.num_ranges)
    each, more = total // used, total % used
    start = jnp.minimum(range_ids * each + jnp.minimum(range_ids, more), total)
    row = jnp.minimum(jnp.sum(tile_ends[None, :] <= start[:, None], axis=1, dtype=i32), B - 1)
    row_tiles = jnp.maximum(tiles[row], 1)
    within = start - (tile_ends[row] - tiles[row] * turns)
    turn, tile = within // row_tiles, within % row_tiles
    # The first range that continues a pair begins in it, and the one before does not.
    pair_start, pair_end = start - tile, start - tile + row_tiles
    before = jnp.concatenate([jnp.zeros(1, i32), start[:-1]])
    is_first = (tile > 0) & (start < total) & (before <= pair_start)
    in_pair = (start[None, :] >= start[:, None]) & (start[None, :] < jnp.minimum(pair_end, total)[:, None])
    parts = jnp.where(is_first, jnp.sum(in_pair, axis=1, dtype=i32), 0)
    num_tiles = start[1:] - start[:-1]
    ranges = jnp.stack([row[:-1], turn[:-1], tile[:-1], num_tiles, parts[:-1]], axis=1)
    ranges = jnp.pad(ranges, ((0, 0), (0, int(RANGE_COLUMNS) - ranges.shape[1])))
    row_lines = jnp.stack([end, begin, following, jnp.zeros_like(end)], axis=1)
    return Plan(ranges, row_lines, made_for)


@jit
def _decode_kernel(
    q,
    k_pages,
    v_pages,
    k_scales,
    v_scales,
    tables,
    ranges,
    rows,
    query_starts,
    query_lens,
    layer,
    sm_scale,
    soft_cap,
    window,
    sinks,
    num_pages,
    max_pages,
    out,
    lse,
    partials,
    stats,
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
    SEVERAL: tl.constexpr,
    LANES: tl.constexpr,
    TURNS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_LEN: tl.constexpr,
):
    """One program: the pieces of its range, in order."""
    program = tl.program_id(0)
    lane = program % LANES
    line = ranges + (program // LANES) * RANGE_COLUMNS
    row, turn = tl.load(line + ROW), tl.load(line + TURN)
    tile, left = tl.load(line + TILE), tl.load(line + TILES)
    scale = tl.load(sm_scale) * LOG2E
    cap = tl.load(soft_cap)
    first_page = tl.load(layer).to(tl.int64) * num_pages

    number = numbers_of(PAD, D, FORM)
    v_number = numbers_of(V_PAD, DV, FORM)
    column = tl.arange(0, COLUMNS)
    in_tile = tl.arange(0, TILE_LEN)

    while left > 0:
        end, begin = tl.load(rows + row * ROW_COLUMNS + END), tl.load(rows + row * ROW_COLUMNS + BEGIN)
        row_tiles = (end - begin + TILE_LEN - 1) // TILE_LEN
        stop = tl.minimum(tile + left, row_tiles)
        queries = tl.load(query_lens + row)
        kv_head, head, in_row, is_query = _columns(
            turn * LANES + lane, column, queries, GROUP, BLOCK_HEADS, BLOCK_TOKENS, KV_HEADS
        )
        token_head = (tl.load(query_starts + row) + in_row).to(tl.int64) * (KV_HEADS * GROUP) + head
        q_pointers = q + token_head[:, None] * D + number[None, :]
        q_tile = tl.load(q_pointers, mask=is_query[:, None] & (number < D)[None, :], other=0.0).to(PRODUCTS)

        position = end - queries + in_row
        m = tl.full([COLUMNS], float("-inf"), tl.float32)
        l = tl.zeros([COLUMNS], tl.float32)
        acc = tl.zeros([COLUMNS, V_PAD], tl.float32)
        table = tables + row.to(tl.int64) * max_pages
        # Page ids are loaded a tile ahead of their use, so that keys need not wait for them.
        token = begin + tile * TILE_LEN + in_tile
        page = tl.load(table + token // S, mask=token < end, other=-1)
        for t in range(tile, stop):
            present = page >= 0
            here = first_page + page
            slot = (here * KV_HEADS + kv_head) * S + token % S
            next_token = begin + (t + 1) * TILE_LEN + in_tile
            page = tl.load(table + next_token // S, mask=next_token < end, other=-1)

            k = load_tile(k_pages, slot, present, D, PAD, FORM, PRODUCTS, HARDWARE_FP8, True)
            s = product(q_tile, tl.trans(k)) * scale
            if FORM != "plain":
                at = slot if PER_TOKEN else here
                s = s * tl.load(k_scales + at, mask=present, other=0.0)[None, :]
            if CAPPED:
                s = capped(s, cap)
            seen = present[None, :]
            if SEVERAL and CAUSAL:
                seen = seen & (token[None, :] <= position[:, None])
            if SEVERAL and WINDOWED:
                seen = seen & (token[None, :] > position[:, None] - tl.load(window))
            s = tl.where(seen, s, float("-inf"))

            m_new = tl.maximum(m, tl.max(s, 1))
            top = finite(m_new)
            p = tl.exp2(s - top[:, None])
            weight = tl.exp2(m - top)
            l = l * weight + tl.sum(p, 1)
            m = m_new
            if FORM != "plain":
                p = p * tl.load(v_scales + at, mask=present, other=0.0)[None, :]
            if KEYS_ARE_VALUES:
                v = k
            else:
                v = load_tile(v_pages, slot, present, DV, V_PAD, FORM, PRODUCTS, HARDWARE_FP8, True)
            acc = acc * weight[:, None] + product(p.to(PRODUCTS), v)
            token = next_token

        if (tile == 0) & (stop == row_tiles):
            sink = tl.load(sinks + head, mask=is_query, other=0.0) if HAS_SINKS else m
            o, total = finished(acc, m, l, sink, HAS_SINKS)
            to = out + token_head[:, None] * DV + v_number[None, :]
            tl.store(to, o.to(out.dtype.element_ty), mask=is_query[:, None] & (v_number < DV)[None, :])
            if RETURN_LSE:
                tl.store(lse + token_head, total, mask=is_query)
        else:
            # Slot 0 of a range holds the end of the pair that it begins in, slot 1 the beginning of the one that it
            # ends in.
            slot_of = program * 2 + tl.where(tile == 0, 1, 0)
            part = slot_of.to(tl.int64) * COLUMNS + column
            tl.store(partials + part[:, None] * V_PAD + tl.arange(0, V_PAD)[None, :], acc)
            tl.store(stats + part * 2, m)
            tl.store(stats + part * 2 + 1, l)

        left -= stop - tile
        row_done = turn == TURNS - 1
        turn = tl.where(row_done, 0, turn + 1)
        row = tl.where(row_done, tl.load(rows + row * ROW_COLUMNS + NEXT), row)
        tile = 0


@jit
def _columns(
    pair,
    column,
    queries,
    GROUP: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
):
    """Of a pair the KV head, and of each of its columns the query head, the row's query token, and if it is one."""
    HEAD_BLOCKS: tl.constexpr = (GROUP + BLOCK_HEADS - 1) // BLOCK_HEADS
    kv_head = pair % KV_HEADS
    block = pair // KV_HEADS
    in_group = (block % HEAD_BLOCKS) * BLOCK_HEADS + column % BLOCK_HEADS
    in_row = (block // HEAD_BLOCKS) * BLOCK_TOKENS + column // BLOCK_HEADS
    is_query = (column < BLOCK_HEADS * BLOCK_TOKENS) & (in_group < GROUP) & (in_row < queries)
    return kv_head, kv_head * GROUP + in_group, in_row, is_query


@jit
def _join_kernel(
    ranges,
    query_starts,
    query_lens,
    seq_lens,
    sinks,
    partials,
    stats,
    out_in,
    lse_in,
    num_rows,
    num_tokens,
    out,
    lse,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    V_PAD: tl.constexpr,
    FORM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    RETURN_LSE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
    PART_BLOCK: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """One program joins a column of a cut pair; those after them write the zeros of some tokens without a row."""
    USED: tl.constexpr = BLOCK_HEADS * BLOCK_TOKENS
    program = tl.program_id(0)
    if program < NUM_PROGRAMS * USED:
        column, program = program % USED, program // USED
        line = ranges + (program // LANES) * RANGE_COLUMNS
        parts = tl.load(line + PARTS)
        if parts > 0:
            row = tl.load(line + ROW)
            pair = tl.load(line + TURN) * LANES + program % LANES
            _, head, in_row, is_query = _columns(
                pair, column, tl.load(query_lens + row), GROUP, BLOCK_HEADS, BLOCK_TOKENS, KV_HEADS
            )
            if is_query:
                m = tl.full([1], float("-inf"), tl.float32)
                l = tl.zeros([1], tl.float32)
                acc = tl.zeros([1, V_PAD], tl.float32)
                for first in range(0, parts + 1, PART_BLOCK):
                    i = first + tl.arange(0, PART_BLOCK)
                    there = i <= parts
                    # Slot 1 of the range before, then slot 0 of each range from this one on.
                    slot = tl.where(i == 0, 2 * (program - LANES) + 1, 2 * (program + (i - 1) * LANES))
                    part = slot.to(tl.int64) * COLUMNS + column
                    m_i = tl.load(stats + part * 2, mask=there, other=float("-inf"))
                    l_i = tl.load(stats + part * 2 + 1, mask=there, other=0.0)
                    acc_i = tl.load(
                        partials + part[:, None] * V_PAD + tl.arange(0, V_PAD)[None, :],
                        mask=there[:, None],
                        other=0.0,
                    )
                    m_new = tl.maximum(m, tl.max(m_i, 0))
                    top = finite(m_new)
                    weight, weight_i = tl.exp2(m - top), tl.exp2(m_i - top)
                    l = l * weight + tl.sum(l_i * weight_i, 0)
                    acc = acc * weight[:, None] + tl.sum(acc_i * weight_i[:, None], 0)[None, :]
                    m = m_new
                sink = tl.load(sinks + head) if HAS_SINKS else 0.0
                o, total = finished(acc, m, l, sink, HAS_SINKS)
                number = numbers_of(V_PAD, DV, FORM)
                token_head = (tl.load(query_starts + row) + in_row).to(tl.int64) * (KV_HEADS * GROUP) + head
                to = out + token_head * DV + number[None, :]
                tl.store(to, o.to(out.dtype.element_ty), mask=(number < DV)[None, :])
                if RETURN_LSE:
                    tl.store(lse + token_head + tl.arange(0, 1), total)
    else:
        token = (program - NUM_PROGRAMS * USED) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
        owned = (token >= num_tokens).to(tl.int32)
        for first in range(0, num_rows, ROW_BLOCK):
            row = first + tl.arange(0, ROW_BLOCK)
            there = row < num_rows
            start = tl.load(query_starts + row, mask=there, other=0)
            count = tl.load(query_lens + row, mask=there, other=0)
            count = tl.where(tl.load(seq_lens + row, mask=there, other=0) > 0, count, 0)
            after = token[:, None] - start[None, :]
            owns = (after >= 0) & (after < count[None, :])
            owned = tl.maximum(owned, tl.max(owns.to(tl.int32), 1))
        if tl.min(owned, 0) == 0:
            HEADS: tl.constexpr = KV_HEADS * GROUP
            for head in range(HEADS):
                token_head = token.to(tl.int64) * HEADS + head
                number = tl.arange(0, V_PAD)
                zeros = tl.zeros([TOKEN_BLOCK, V_PAD], out.dtype.element_ty)
                to = out + token_head[:, None] * DV + number[None, :]
                tl.store(to, zeros, mask=(owned == 0)[:, None] & (number < DV)[None, :])
                if RETURN_LSE:
                    nothing = tl.full([TOKEN_BLOCK], float("-inf"), tl.float32)
                    tl.store(lse + token_head, nothing, mask=owned == 0)


def decode(
    q: Float[Array, "T H D"],
    pools: Pools,
    rows: Rows,
    scores: Scores,
    *,
    plan: Plan,
    config: Config,
    limits: Limits | None = None,
) -> tuple[Float[Array, "T H Dv"], Float[Array, "T H"] | None]:
    """Attention of the rows that the plan serves; zeros (and -inf) for tokens of no row.

    What it returns for tokens of rows with more query tokens than the plan serves is undefined.

    Args:
      q: [T, H, D].
      pools, rows, scores: what is asked for.
      plan: from `decode_plan`, for these rows.
      config: the launch configuration that the plan was made for.
      limits: the device's.

    Returns:
      out [T, H, Dv] and lse f32[T, H] or None.
    """
    limits = device_limits() if limits is None else limits
    k_pages, _, layer = pools
    block_tables, seq_lens, query_starts, query_lens = rows
    sm_scale, soft_cap, sliding_window, sinks, causal, return_lse = scores
    shape, made_for = shape_of(q, pools), plan.made_for
    (T, H, _), B, P = q.shape, block_tables.shape[0], k_pages.shape[1]
    f32, i32 = jnp.float32, jnp.int32
    programs = config.num_ranges * config.lanes
    parts = 2 * programs * config.columns
    queries = query_starts.astype(i32), query_lens.astype(i32)
    sinks_or_not = scalar(0, f32) if sinks is None else sinks.astype(f32)
    common = {
        "KV_HEADS": shape.num_kv_heads,
        "GROUP": shape.group,
        "DV": shape.v_head_dim,
        "V_PAD": shape.v_pad,
        "FORM": shape.form,
        "HAS_SINKS": sinks is not None,
        "RETURN_LSE": return_lse,
        "LANES": config.lanes,
        "BLOCK_HEADS": config.block_heads,
        "BLOCK_TOKENS": config.block_tokens,
        "COLUMNS": config.columns,
    }
    results = [
        jax.ShapeDtypeStruct((T, H, shape.v_head_dim), q.dtype),
        jax.ShapeDtypeStruct((T, H) if return_lse else (1,), f32),
    ]
    out, lse, partials, stats = call(
        _decode_kernel,
        q,
        *pool_inputs(pools),
        block_tables,
        plan.ranges,
        plan.rows,
        *queries,
        scalar(layer, i32),
        scalar(sm_scale, f32),
        scalar(0 if soft_cap is None else soft_cap, f32),
        scalar(0 if sliding_window is None else sliding_window, i32),
        sinks_or_not,
        P,
        block_tables.shape[1],
        outputs=[
            *results,
            jax.ShapeDtypeStruct((parts, shape.v_pad), f32),
            jax.ShapeDtypeStruct((parts, 2), f32),
        ],
        grid=programs,
        limits=limits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **(shape.constants(limits) | common),
        CAUSAL=causal,
        WINDOWED=sliding_window is not None,
        CAPPED=soft_cap is not None,
        SEVERAL=made_for.max_query_len > 1,
        TURNS=made_for.turns,
        TILE_LEN=config.tile,
    )
    out, lse = call(
        _join_kernel,
        plan.ranges,
        *queries,
        seq_lens.astype(i32),
        sinks_or_not,
        partials,
        stats,
        out,
        lse,
        B,
        T,
        outputs=results,
        grid=programs * config.block_heads * config.block_tokens + -(-T // ZEROED),
        limits=limits,
        num_warps=4,
        in_place={7: 0, 8: 1} if return_lse else {7: 0},
        **common,
        NUM_PROGRAMS=programs,
        PART_BLOCK=JOINED,
        TOKEN_BLOCK=ZEROED,
        ROW_BLOCK=ROWS_AT_ONCE,
    )
    return out, lse if return_lse else None
