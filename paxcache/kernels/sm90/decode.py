"""Paged attention for rows with few query tokens, on Hopper (sm_90a).

Decode reads every visible key and value once and computes little: what counts is that every SM streams pages from
the first microsecond to the last, whatever the mix of lengths. Four ideas:

- Work is split by tokens. `decode_plan` cuts a flat list of tiles of 64 tokens, in order of (row, KV head, token),
  into contiguous *ranges* of equal length, once per step. A range may begin and end inside a *pair* (row, KV head);
  what a range does of one pair is a *piece*. A pair inside one range is finished there. A pair that is cut leaves
  partial results (un-normalised sum, maximum, denominator), and the piece that is done last joins them: no program
  ever waits for another.
- Neighbouring programs, the *lanes* of a range, take the same tokens of different KV heads in step, because a page
  holds its heads side by side and memory answers faster to neighbours. The flat list is then a lane's.
- The operands are swapped: tokens are the rows of the matrix unit, S^T = K Q^T and O^T = V^T P^T, and the *columns*
  are a KV head's queries: its G heads times the row's query tokens, padded to 8. A group of 4 heads wastes half of
  an 8-wide column block instead of 60 of 64 rows. What exceeds a warpgroup's registers, many heads a KV head or many
  query tokens, becomes further pairs, which read the same keys again.
- Programs are persistent, two or three an SM. Warps of their own stream keys and values across the borders of pieces,
  so that the pipeline never drains.

Quantised pages are streamed as they are stored, and become half precision in registers, exactly: shared memory, which
the matrix unit reads too, would be the bottleneck. Three programs share a thread block and its warps of copies. A score
is multiplied by its key's scale. A value's scale joins its weight's exponent, ``exp(score) * scale = exp2(score *
log2(e) + log2(scale))``, so that the largest weight of a column is 1 whatever the scales are: float16 has no room for
others. The denominator takes it off again.

float32 pages are streamed as they are too. The matrix unit knows no float32: a number becomes three of bfloat16 in
registers, whose sum it is, and a product six, the small ones first. What is left out is below float32's last bit.

Reference: flash decoding (Dao et al., 2023) for the split; FlashInfer (Ye et al., 2025) for balanced work lists.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from paxcache._quantize import QuantizedPages
from paxcache.kernels._request import Pools, Rows, Scores, shapes_of
from paxcache.kernels.sm90._mosaic import (
    off_mesh,
    pl,
    plgpu,
)
from paxcache.kernels.sm90.decode_case import (
    FLOAT_COLUMNS,
    NOTES,
    WARPS,
    Case,
    default_config,
    scratch_of,
)
from paxcache.kernels.sm90.decode_plan import (
    COUNTER_SETS,
    TILE,
    Config,
    OfRange,
    OfRow,
    Plan,
    count_joins,
    count_pieces,
    decode_plan,
    plan_shape,
    tiles_of_piece,
)
from paxcache.kernels.sm90.inline.matrices import reduce_columns
from paxcache.kernels.sm90.inline.memory import arrive, store_arrays
from paxcache.kernels.sm90.inline.tiles import (
    load_bytes,
    load_floats,
    store_queries,
    store_transposed,
    store_untransposed,
    zero_rows,
)
from paxcache.kernels.sm90.operands import (
    LOG2E,
    check_supported,
    parts_of,
    soft_cap,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

NEG = -1e30  # where a running maximum starts: finite, so that no difference of two maxima is NaN
HOLE = 1 << 28  # added to the index of a token in a hole, past any length

MATRIX = plgpu.Layout.WGMMA
MATRIX_T = plgpu.Layout.WGMMA_TRANSPOSED
COLUMN = plgpu.Layout.WGMMA.reduce(0)
ROW_OF_MATRIX = plgpu.Layout.WGMMA.reduce(1)


def _per_column(columns: Any, num_rows: int) -> Any:
    """One value a column, repeated for each row of a matrix."""
    return lax.broadcast_in_dim(columns, (num_rows, columns.shape[0]), [1])


def _per_row(rows: Any, num_columns: int) -> Any:
    """One value a row, repeated for each column of a matrix."""
    return lax.broadcast_in_dim(rows, (rows.shape[0], num_columns), [0])


def _limits_of_columns(case: Case, length: Any, num_queries: Any, first_query: Any, window: Any) -> Any:
    """The first token that each column sees, or None, and the one after the last; scalars where all see the same.

    Args:
      case: the call.
      length: tokens of the row; this and the results are counted from any one token.
      num_queries: query tokens of the row.
      first_query: the query token that column 0 stands for.
      window: tokens a query sees, or None.
    """
    if case.max_query_len == 1 or (window is None and not case.causal):
        return None if window is None else length - window, length
    # Column j * group + i is head i of query token j. Padding columns count as later tokens: they see too much, and
    # are not written.
    column = plgpu.broadcasted_iota(jnp.int32, (case.columns,), 0, layout=COLUMN)
    position = lax.div(column, jnp.full_like(column, case.group)) + (length - num_queries + first_query)
    low = None if window is None else position - (window - 1)
    high = jnp.minimum(position + 1, length) if case.causal else length
    return low, high


def _visible(tokens: Any, low: Any, high: Any, holes: Any, tile_start: Any, copy_len: int) -> Any:
    """Which tokens of a tile are seen: `tokens` counts them from the tile's first, `holes` has a bit a copy."""
    copy = lax.shift_right_logical(tokens, jnp.full_like(tokens, copy_len.bit_length() - 1))
    hole = lax.shift_right_logical(jnp.full_like(tokens, 0) + holes, copy)
    token = tokens + lax.bitwise_and(hole, jnp.full_like(tokens, 1)) * HOLE

    def limit(x):
        x = x - tile_start
        return _per_column(x, tokens.shape[0]) if jnp.ndim(x) else x

    seen = token < limit(high)
    return seen if low is None else jnp.logical_and(seen, token >= limit(low))


def _to_output_tile(values: Any, o_s: Any, case: Case) -> None:
    """Puts [head dim, columns] into `o_s` as [columns, head dim], ready for the copy engine."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # earlier copies have left o_s
    values = values.astype(o_s.dtype)
    if case.quantized and not case.interpreted:
        store_untransposed(values, o_s)
    elif case.num_parts > 1:  # float32 fits no matrix of the store
        o_s.T[...] = plgpu.layout_cast(values, MATRIX_T)
    else:
        store_transposed(values, o_s, interpreted=case.interpreted)
    plgpu.commit_smem()  # all threads' values, before the copy engine reads them


def _copy_heads(o_s: Any, first_column: int, out: Any, token: Any, head: Any, group: int) -> None:
    """Starts the copy of one query token's heads."""
    source = o_s.at[pl.ds(first_column, group)]
    plgpu.copy_smem_to_gmem(source, out.at[token, pl.ds(head * group, group)])


def _zero_unowned(
    program: Any, programs: Any, row_line: Any, num_rows: int, out: Any, o_s: Any, case: Case
) -> None:
    """Writes zeros for the tokens that no row owns: before the first row, between rows and after the last.

    `programs` of them share the work.
    """
    num_tokens = out.shape[0]

    def zero(begin, end, step):
        """Of the tokens from `begin` on every `step`-th."""
        count = lax.div(end - begin + (step - 1), jnp.asarray(step, jnp.int32))

        @pl.when(count > 0)
        def _():
            zeros = jnp.zeros((case.padded_dim, case.columns), jnp.float32)
            _to_output_tile(plgpu.layout_cast(zeros, MATRIX), o_s, case)

            def copy(j, _):
                token, head = begin + lax.div(j, case.head_groups) * step, lax.rem(j, case.head_groups)
                _copy_heads(o_s, 0, out, token, head, case.group)

            lax.fori_loop(0, count * case.head_groups, copy, None)

    def end_of(row):
        return row_line(row, OfRow.START) + row_line(row, OfRow.QUERIES)

    def gap(i, _):
        after = program + i * programs  # the row after the gap
        begin = jnp.where(after > 0, end_of(jnp.maximum(after - 1, 0)), 0)
        zero(
            begin,
            jnp.where(after < num_rows, row_line(jnp.minimum(after, num_rows - 1), OfRow.START), num_tokens),
            1,
        )

    # After the last row most of a packed step may be empty: where it can be long, all programs share it.
    is_long = num_tokens - num_rows >= case.config.num_programs
    num_gaps = num_rows if is_long else num_rows + 1
    gaps = jnp.where(program < programs, lax.div(num_gaps - 1 + programs - program, programs), 0)
    lax.fori_loop(0, gaps, gap, None)
    if is_long:
        pl.when(program < programs)(lambda: zero(end_of(num_rows - 1) + program, num_tokens, programs))


def _parts(case: Case, join: Any) -> tuple[Any, Any, int]:
    """Where a cut pair's partial results lie: the first one, the second, and the step from there to the others."""
    if case.config.piece_len is None:
        return case.config.num_programs + join - case.config.lanes, join, case.config.lanes
    return join * case.max_pieces, join * case.max_pieces + 1, 1


def _join(
    case: Case, partials: Any, stats: Any, first: Any, second: Any, step_by: int, others: Any
) -> tuple[Any, Any, Any]:
    """The sum, maximum and denominator of a cut pair, always added up in the order of the tokens."""
    chunk, DP = case.config.join_chunk, case.padded_dim

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def part(i):
        return load(partials.at[i], MATRIX), load(stats.at[i, 0], COLUMN), load(stats.at[i, 1], COLUMN)

    def step(i, total):
        acc, m, l = total
        parts = []
        for j in range(chunk):
            at = i * chunk + j
            index = second + (jnp.minimum(at, others) - 1) * step_by
            o_j, m_j, l_j = part(index if j else jnp.where(at == 0, first, index))
            parts.append((o_j, m_j + jnp.where(at <= others, 0.0, 2 * NEG), l_j))  # past the end: weight 0
        m_new = functools.reduce(jnp.maximum, [m_j for _, m_j, _ in parts], m)
        weight = jnp.exp2(m - m_new)
        acc, l = acc * _per_column(weight, DP), l * weight
        for o_j, m_j, l_j in parts:
            weight = jnp.exp2(m_j - m_new)
            acc, l = acc + o_j * _per_column(weight, DP), l + l_j * weight
        return acc, m_new, l

    return lax.fori_loop(0, lax.div(others + chunk, chunk), step, _nothing(DP, case.columns, (case.columns,)))


def _nothing(num_rows: int, columns: int, sum_shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """Sum, maximum and denominator before the first token; the denominator may be kept a value a token."""
    zeros = jnp.zeros(sum_shape, jnp.float32)
    return (
        plgpu.layout_cast(jnp.zeros((num_rows, columns), jnp.float32), MATRIX),
        plgpu.layout_cast(jnp.full((columns,), NEG, jnp.float32), COLUMN),
        plgpu.layout_cast(zeros, MATRIX if len(sum_shape) == 2 else COLUMN),
    )


def _finish(case: Case, acc: Any, m: Any, l: Any, where: Any, sinks: Any, outs: Any, o_s: Any) -> None:
    """Normalises a pair's result and writes it."""
    row, pair, num_queries, start = where
    head, first_query = _head_and_first_query(case, pair)
    DP, block_tokens = case.padded_dim, case.config.block_tokens
    if case.has_sinks:
        sink = plgpu.load(sinks.at[head], layout=COLUMN, optimized=False) * LOG2E
        m_all = jnp.maximum(m, sink)
        weight = jnp.exp2(m - m_all)
        acc, l, m = acc * _per_column(weight, DP), l * weight + jnp.exp2(sink - m_all), m_all
    some = l > 0  # nothing was seen, as where all is hole: zeros
    inverse = jnp.where(some, 1.0 / l, jnp.zeros_like(l))
    _to_output_tile(acc * _per_column(inverse, DP), o_s, case)
    start = start + first_query
    for j in range(block_tokens):
        # Past the row's last query token: columns whose results nobody asked for.
        @pl.when(first_query + j < num_queries)
        def _(j=j):
            _copy_heads(o_s, j * case.group, outs["out"], start + j, head, case.group)

    if case.return_lse:
        lse = (m + jnp.log2(l)) * (1 / LOG2E)
        outs["lse"][row, pair] = jnp.where(some, lse, jnp.full_like(l, -jnp.inf))


def _head_and_first_query(case: Case, pair: Any) -> tuple[Any, Any]:
    """The head group and the first query token of the row that a pair stands for."""
    if case.blocks == 1:
        return pair, 0
    return lax.div(pair, case.blocks), lax.rem(pair, case.blocks) * case.config.block_tokens


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A program's way through its range.

    A *place* is a tuple: row, turn (which of the lane's pairs of the row), tile of the pair; the row's length, first
    visible token (0 without a window), number of query tokens (1 where no row has more), first query token.
    """

    case: Case
    plan: Any
    program: Any

    def range_line(self, column: Any) -> Any:
        # A launch may have some programs more than the plan.
        group = jnp.minimum(lax.div(self.program, self.case.config.lanes), self.case.num_ranges - 1)
        return self.plan[group, column]

    def row_line(self, row: Any, column: Any) -> Any:
        return self.plan[self.case.num_ranges + row, column]

    @property
    def lane(self) -> Any:
        lanes = self.case.config.lanes
        return lax.rem(self.program, lanes) if lanes > 1 else 0

    def count(self, column: int) -> Any:
        """Tiles or pieces of the range."""
        return jnp.where(self.program < self.case.config.num_programs, self.range_line(column), 0)

    def first_place(self) -> tuple[Any, ...]:
        case = self.case
        return (
            self.range_line(OfRange.ROW),
            self.range_line(OfRange.TURN),
            self.range_line(OfRange.FIRST),
            self.range_line(OfRange.LEN),
            self.range_line(OfRange.LOW) if case.windowed else 0,
            self.range_line(OfRange.QUERIES) if case.max_query_len > 1 else 1,
            self.range_line(OfRange.START),
        )

    def base_of(self, low: Any) -> Any:
        """The token that tile 0 begins with."""
        return low - lax.rem(low, self.case.block_len) if self.case.windowed else 0

    def first_token(self, place: tuple[Any, ...]) -> Any:
        _, _, tile, _, low, *_ = place
        return self.base_of(low) + tile * TILE

    def tiles_of(self, place: tuple[Any, ...]) -> Any:
        _, _, _, length, low, _, _ = place
        return lax.div(length - self.base_of(low) + (TILE - 1), TILE)

    def piece_end(self, place: tuple[Any, ...], tiles_left: Any) -> Any:
        """The tile after the piece that begins at a place."""
        _, _, tile, *_ = place
        tiles, piece_len = self.tiles_of(place), self.case.config.piece_len
        return jnp.minimum(
            tiles, tile + (tiles_left if piece_len is None else tiles_of_piece(piece_len, tiles))
        )

    def move(self, place: tuple[Any, ...], tile: Any) -> tuple[Any, ...]:
        """To a tile of the same pair, or to the next pair if the pair has no such tile."""
        row, turn, _, length, low, queries, start = place
        done = tile >= self.tiles_of(place)
        row_done = jnp.logical_and(done, turn == self.case.turns - 1)
        turn = jnp.where(done, jnp.where(row_done, 0, turn + 1), turn)
        tile = jnp.where(done, 0, tile)
        length = jnp.where(row_done, self.row_line(row, OfRow.NEXT_LEN), length)
        if self.case.windowed:
            low = jnp.where(row_done, self.row_line(row, OfRow.NEXT_LOW), low)
        if self.case.max_query_len > 1:
            queries = jnp.where(row_done, self.row_line(row, OfRow.NEXT_QUERIES), queries)
        start = jnp.where(row_done, self.row_line(row, OfRow.NEXT_START), start)
        row = jnp.where(row_done, self.row_line(row, OfRow.NEXT), row)
        return row, turn, tile, length, low, queries, start

    def pair(self, place: tuple[Any, ...]) -> Any:
        _, turn, *_ = place
        return turn * self.case.config.lanes + self.lane


def attend_body(refs: dict[str, Any], case: Case, block: Any, **scratch: Any) -> None:
    """One thread block: the pieces of its programs' ranges, in order."""
    config = case.config
    plan, tables = refs["plan"], refs["tables"]
    k_s, v_s, notes = (scratch[x] for x in ("k_s", "v_s", "notes"))
    q_full, k_full, v_full = (scratch[x] for x in ("q_full", "k_full", "v_full"))
    k_free, v_free = (scratch[x] for x in ("k_free", "v_free"))
    G, S, D, DP, N = case.group, case.page_size, case.head_dim, case.padded_dim, case.columns
    copy_len, stages = case.copy_len, config.num_stages
    thread = lax.axis_index("thread")
    layer = refs["layer"][0]
    busy_blocks = plan[case.num_ranges, OfRow.BUSY_BLOCKS] if config.beside_prefill else case.num_blocks

    def walk_of(consumer):
        program = consumer * busy_blocks + block  # neighbours lie in neighbouring blocks
        if config.beside_prefill:
            program = jnp.where(block < busy_blocks, program, config.num_programs)
        return _Walk(case, plan, program)

    @pl.when(thread == config.consumers)
    def _producers():
        def drain(free, consumer, count):
            """Waits for the last completions: a producer must see every one."""

            def wait(i, _):
                plgpu.barrier_wait(free.at[consumer * stages + lax.rem(i, stages)])

            lax.fori_loop(jnp.maximum(count - stages, 0), count, wait, None)

        def stream(consumer, names):
            """Copies a program's keys, its values, or both in turn."""
            walk = walk_of(consumer)
            num_tiles = walk.count(OfRange.TILES)
            buffers = {"k": (k_s, k_full, k_free), "v": (v_s, v_full, v_free)}

            def copy(i, place, pages):
                """Starts the copies of tile number i."""
                slot = consumer * stages + lax.rem(i, stages)
                head, _ = _head_and_first_query(case, walk.pair(place))
                if case.groups_per_kv_head > 1:
                    head = lax.div(head, case.groups_per_kv_head)
                first_block = lax.div(walk.first_token(place), copy_len)
                for name in names:
                    buffer, full, free = buffers[name]

                    # The consumer arrives at `free` when it has read the slot's last tile, and this warp waits
                    # before it overwrites the tile and the note.
                    @pl.when(i >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    if name == "k":
                        # Noted before the copies are issued: their arrival at `full` shows it too.
                        bits = [jnp.where(page < 0, 1 << j, 0) for j, page in enumerate(pages)]
                        notes[consumer, NOTES + lax.rem(i, stages)] = functools.reduce(lax.bitwise_or, bits)
                    for j, page in enumerate(pages):
                        tokens = pl.ds(lax.rem(first_block + j, S // copy_len) * copy_len, copy_len)

                        def part(pool, page=page, tokens=tokens):
                            whole = pool.at[layer, jnp.maximum(page, 0), head]
                            return whole.at[tokens] if copy_len < S else whole

                        target = buffer.at[slot, pl.ds(j * copy_len, copy_len)]
                        if buffer.shape[-1] > D:
                            target = target.at[:, pl.ds(0, D)]
                        # Every copy arrives at `full` with its last byte; the consumer waits for all of a tile's.
                        plgpu.copy_gmem_to_smem(part(refs[name]), target, full.at[slot])
                        if name == "k" and case.token_scales:
                            # Those of values too, which are needed before the values.
                            for scales in ("k_scales", "v_scales"):
                                target = scratch[scales].at[slot, pl.ds(j * copy_len, copy_len)]
                                # A plain bulk copy: boxes may not begin between multiples of 128 bytes.
                                in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
                                plgpu.copy_gmem_to_smem(
                                    part(refs[scales]), target, full.at[slot], oob_mode=in_bounds
                                )
                return walk.move(place, place[2] + 1)

            def step(i, place):
                row, _, _, length, *_ = place
                first_token = walk.first_token(place)
                # Past the end a valid page is read once more; its tokens are masked later. Read before the wait,
                # so that the latency hides behind it.
                last = jnp.minimum(lax.div(length - 1, S), case.max_pages - 1)
                columns = [lax.div(first_token + j, S) for j in range(0, TILE, copy_len)]
                return copy(i, place, [tables[row, jnp.minimum(x, last)] for x in columns])

            @pl.when(num_tiles > 0)
            def _():
                # The first tile's pages stand in the plan: one memory latency less before the stream begins.
                pages = [
                    walk.range_line(OfRange.PAGES + j // case.block_len) for j in range(0, TILE, copy_len)
                ]
                lax.fori_loop(1, num_tiles, step, copy(0, walk.first_place(), pages))
                for name in names:
                    drain(buffers[name][-1], consumer, num_tiles)

        consumers = range(config.consumers)
        streams = [(consumer, name) for consumer in consumers for name in "kv"]
        if len(streams) > WARPS:
            streams = [(consumer, "kv") for consumer in consumers]

        def warp(index):
            for x, (consumer, names) in enumerate(streams):
                pl.when(index == x)(functools.partial(stream, consumer, names))

        plgpu.warp_map(warp)

    @pl.when(thread < config.consumers)
    def _consumer():
        consumer = thread if config.consumers > 1 else 0
        walk = walk_of(consumer)
        program, lane, num_tiles = walk.program, walk.lane, walk.count(OfRange.TILES)
        q_raw, q_s, p_s, o_s, maxima, own_notes = (
            scratch[x].at[consumer] for x in ("q_raw", "q_s", "p_s", "o_s", "maxima", "notes")
        )
        sharing, programs = program, config.num_programs
        if config.beside_prefill:
            blocks = jnp.where(busy_blocks > 0, busy_blocks, case.num_blocks)
            programs = blocks * config.consumers
            sharing = jnp.where(block < blocks, consumer * blocks + block, programs)
        _zero_unowned(sharing, programs, walk.row_line, tables.shape[0], refs["out"], o_s, case)
        scale = refs["scale"][0] * LOG2E
        window = refs["window"][0] if case.windowed else None
        start = _nothing(DP, N, (TILE, N))
        interpreted = {"interpreted": case.interpreted}

        def product(rows, columns, num_rows):
            """Keys or values, in registers where they are quantised, times queries or weights in shared memory."""
            if case.quantized and case.interpreted:  # which knows no products of registers
                return lax.dot(rows.astype(jnp.float32), columns[...].astype(jnp.float32))

            def multiply(acc):
                plgpu.wgmma(acc, rows, columns)
                return acc[...]

            return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((num_rows, N), jnp.float32))

        def product_of_parts(tile, columns, num_rows, *, transposed):
            """float32 keys, or values transposed, times the parts of queries or weights, the small ones first."""
            which = [(i, last - i) for last in reversed(range(case.num_parts)) for i in range(last + 1)]
            starts = range(0, num_rows, 64), range(0, columns.shape[-1], FLOAT_COLUMNS)
            blocks = list(itertools.product(*starts))

            def factors(row, column):
                """The pairs of parts of a block of 64 rows."""
                first, shape = (row, column), (64, FLOAT_COLUMNS)
                if transposed:
                    first, shape = (column, row), (FLOAT_COLUMNS, 64)
                parts = parts_of(
                    load_floats(tile, first, shape, transposed=transposed, **interpreted), case.dtype
                )
                return [(parts[i], columns.at[j, :, pl.ds(column, FLOAT_COLUMNS)].T) for i, j in which]

            def multiply(acc):
                for row, column in blocks:
                    for a, b in factors(row, column):
                        plgpu.wgmma(acc.at[pl.ds(row, 64)] if num_rows > 64 else acc, a, b)
                    plgpu.wgmma_wait(0)  # the registers are free for the next block
                return acc[...]

            if case.interpreted:  # which knows no products of registers
                by_row = {}
                for row, column in blocks:
                    products = [
                        lax.dot(a.astype(jnp.float32), b[...].astype(jnp.float32))
                        for a, b in factors(row, column)
                    ]
                    by_row[row] = by_row.get(row, 0.0) + sum(products)
                return jnp.concatenate(list(by_row.values()))
            return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((num_rows, N), jnp.float32))

        def scores(slot):
            keys, queries = k_s.at[slot], q_s.at[:, :, pl.ds(0, D)] if DP > D else q_s
            if case.num_parts > 1:
                return product_of_parts(keys, queries, TILE, transposed=False)
            if case.quantized:
                keys = load_bytes(keys, case.dtype, transposed=False, **interpreted)
            return product(keys, queries.at[0].T, TILE)

        def values_of(slot):
            """[head dim, tokens]."""
            if not case.quantized:
                return v_s.at[slot].T
            return load_bytes(v_s.at[slot], case.dtype, transposed=True, **interpreted)

        def scales_of(slot):
            """Of a tile of quantised pages the keys' scales, and the logarithms and reciprocals of the values'."""
            if case.token_scales:
                of_keys, of_values = (
                    plgpu.load(scratch[x].at[slot], layout=ROW_OF_MATRIX, optimized=False)
                    for x in ("k_scales", "v_scales")
                )
                # A scale of 0 has only zeros, and any scale is right. NaN is no token's of the row.
                of_values = jnp.where(of_values > 0, of_values, jnp.ones_like(of_values))
                inverse = _per_row(1.0 / of_values, N)
                return _per_row(of_keys * scale, N), _per_row(jnp.log2(of_values), N), inverse
            of_keys, of_values = (refs[x][layer, 0, 0, 0] for x in ("k_scales", "v_scales"))
            of_values = jnp.where(of_values > 0, of_values, 1.0)
            return of_keys * scale, jnp.log2(of_values), 1.0 / of_values

        def clean_values(slot, low, high, holes):
            """Zeros for tokens that are not the row's: 0 * NaN would be NaN."""
            zero_rows(v_s.at[slot], low, high, holes, copy_len, tile_bytes=case.stored_bytes, **interpreted)
            if case.by_registers:
                plgpu.commit_smem()  # all threads' zeros, before others load them

        def fetch_queries(place):
            """Starts the copies of a piece's queries to q_raw, which all threads have read."""
            head, first_query = _head_and_first_query(case, walk.pair(place))
            start, last = place[-1] + first_query, refs["q"].shape[0] - 1
            for j in range(config.block_tokens):
                # Past the row's last token: another row's, whose results are not written.
                source = refs["q"].at[jnp.minimum(start + j, last), pl.ds(head * G, G)]
                # One arrival a token at `q_full`, where this warpgroup waits for all.
                plgpu.copy_gmem_to_smem(source, q_raw.at[pl.ds(j * G, G)], q_full.at[consumer])

        def piece(number, carry):
            tiles_done, place = carry
            row, _, begin, length, low, num_queries, first_token = place
            pair = walk.pair(place)
            base, tiles = walk.base_of(low), walk.tiles_of(place)
            end = walk.piece_end(place, num_tiles - tiles_done)
            next_place = walk.move(place, end)
            _, first_query = _head_and_first_query(case, pair)
            low_columns, high_columns = _limits_of_columns(
                case, length - base, num_queries, first_query, window
            )
            low_any = low - base if case.windowed else None
            whole = jnp.logical_and(begin == 0, end == tiles)
            if config.piece_len is None:  # of a cut pair; read here, so that the tiles hide the latency
                own_join = walk.range_line(OfRange.JOIN)
                own_others = walk.range_line(jnp.where(begin == 0, OfRange.NEXT_PARTS, OfRange.JOIN_PARTS))

            plgpu.barrier_wait(q_full.at[consumer])  # this piece's queries are in q_raw
            if case.quantized:
                store_queries(q_raw, q_s.at[0], tile_bytes=case.tile_bytes, **interpreted)
            else:
                queries = plgpu.load(q_raw.T, layout=MATRIX_T, optimized=False)
                for j, part in enumerate(parts_of(queries, case.dtype)):
                    q_s.at[j].T[...] = part
            plgpu.commit_smem()  # all threads' queries, before the matrix unit reads them; q_raw may be overwritten
            pl.when(number + 1 < num_pieces)(lambda: fetch_queries(next_place))

            def tile(t, carry):
                acc, m, l = carry
                stage = lax.rem(tiles_done + (t - begin), stages)
                slot = consumer * stages + stage
                # This tile's keys and scales, and the note about its holes.
                plgpu.barrier_wait(k_full.at[slot])
                holes = own_notes[NOTES + stage]
                of_keys = scale
                if case.quantized:
                    of_keys, log_of_values, inverse_of_values = scales_of(slot)
                s = scores(slot) * of_keys
                if not case.by_registers:
                    plgpu.barrier_arrive(k_free.at[slot])  # the keys may be overwritten
                if case.soft_cap is not None:
                    s = soft_cap(s, case.soft_cap, **interpreted)
                if case.quantized:
                    s = s + log_of_values
                tokens = plgpu.broadcasted_iota(jnp.int32, (TILE, N), 0, layout=MATRIX)
                visible = _visible(tokens, low_columns, high_columns, holes, t * TILE, copy_len)
                # A select: keys that are not the row's may be NaN.
                s = jnp.where(visible, s, jnp.full_like(s, -jnp.inf))

                # Buffers in turn: while one is read, none can be two tiles ahead.
                m_new = jnp.maximum(m, reduce_columns(s, jnp.max, maxima.at[lax.rem(t, 2)], **interpreted))
                rescale = jnp.exp2(m - m_new)
                p = jnp.exp2(s - _per_column(m_new, TILE))
                weight = p * inverse_of_values if case.quantized else p
                l = l * _per_column(rescale, TILE) + weight  # added up over the tokens once a piece
                acc = acc * _per_column(rescale, DP)
                for j, part in enumerate(parts_of(p, case.dtype)):
                    store_transposed(part, p_s.at[j], tile_bytes=case.tile_bytes, **interpreted)

                plgpu.barrier_wait(v_full.at[slot])  # this tile's values
                foreign = jnp.logical_or(length - base < (t + 1) * TILE, holes != 0)
                if case.windowed:
                    foreign = jnp.logical_or(foreign, low_any > t * TILE)
                if case.may_be_nan:
                    low = 0 if low_any is None else low_any - t * TILE
                    pl.when(foreign)(lambda: clean_values(slot, low, length - base - t * TILE, holes))
                values = values_of(slot)
                # All threads' p_s and values, before the matrix unit reads them; and what threads have read themselves,
                # as they do quantised tiles, before the copy engine writes there.
                plgpu.commit_smem()
                if case.by_registers:
                    plgpu.barrier_arrive(k_free.at[slot])  # keys and scales may be overwritten
                if case.quantized:
                    plgpu.barrier_arrive(v_free.at[slot])  # and the values, which are in registers
                if case.num_parts > 1:
                    acc = acc + product_of_parts(v_s.at[slot], p_s, DP, transposed=True)
                    plgpu.commit_smem()  # what threads have read, before the copy engine writes there
                else:
                    acc = acc + product(values, p_s.at[0].T, DP)
                if not case.quantized:
                    plgpu.barrier_arrive(v_free.at[slot])  # the values may be overwritten
                return acc, m_new, l

            acc, m, l = lax.fori_loop(begin, end, tile, start)
            l = reduce_columns(l, jnp.sum, maxima.at[lax.rem(end, 2)], **interpreted)
            where = row, pair, num_queries, first_token
            finish = functools.partial(
                _finish, case, where=where, sinks=refs.get("sinks"), outs=refs, o_s=o_s
            )
            pl.when(whole)(lambda: finish(acc, m, l))

            @pl.when(jnp.logical_not(whole))
            def _():
                if config.piece_len is None:
                    at = jnp.where(begin == 0, config.num_programs + program, program)
                    after = lax.div(program, config.lanes) + 1
                    join = jnp.where(begin == 0, after, own_join) * config.lanes + lane
                    others = own_others
                else:
                    join = row * case.pairs + pair
                    at = join * case.max_pieces + lax.div(begin, tiles_of_piece(config.piece_len, tiles))
                    others = count_pieces(config.piece_len, tiles) - 1
                # In the accumulator's own order: coalesced without shared memory.
                mine = refs["partials"].at[at], refs["stats"].at[at, 0], refs["stats"].at[at, 1]
                store_arrays(mine, (acc, m, l), (MATRIX, COLUMN, COLUMN), **interpreted)
                if config.fused_join:
                    num_joins = count_joins(config, tables.shape[0], case.pairs)
                    counter = lax.rem(layer, COUNTER_SETS) * num_joins + join
                    line = case.num_ranges + tables.shape[0] + lax.div(counter, plan.shape[1])
                    counter = plan.at[line, lax.rem(counter, plan.shape[1])]
                    arrive(counter, others, own_notes.at[pl.ds(0, NOTES)])

                    @pl.when(own_notes[0] == others)
                    def _():
                        finish(*_join(case, refs["partials"], refs["stats"], *_parts(case, join), others))

            return tiles_done + (end - begin), next_place

        num_pieces, first_place = walk.count(OfRange.PIECES), walk.first_place()
        pl.when(num_pieces > 0)(lambda: fetch_queries(first_place))
        lax.fori_loop(0, num_pieces, piece, (0, first_place))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # shared memory must outlive the last copies


def _join_body(refs: dict[str, Any], case: Case, o_s: Any) -> None:
    """One program of the second kernel: one join."""
    plan, join, o_s = refs["plan"], lax.axis_index("block"), o_s.at[0]
    if case.config.piece_len is None:
        group, lane = lax.div(join, case.config.lanes), lax.rem(join, case.config.lanes)
        columns = OfRange.ROW, OfRange.TURN, OfRange.QUERIES, OfRange.START
        row, turn, queries, start = (plan[group, x] for x in columns)
        pair, others = turn * case.config.lanes + lane, plan[group, OfRange.PARTS]
    else:
        row, pair = lax.div(join, case.pairs), lax.rem(join, case.pairs)
        length, low, queries, start = (
            plan[case.num_ranges + row, x] for x in (OfRow.LEN, OfRow.LOW, OfRow.QUERIES, OfRow.START)
        )
        tiles = lax.div(length - (low - lax.rem(low, case.block_len)) + (TILE - 1), TILE)
        others = count_pieces(case.config.piece_len, tiles) - 1

    @pl.when(others > 0)
    def _():
        total = _join(case, refs["partials"], refs["stats"], *_parts(case, join), others)
        _finish(case, *total, (row, pair, queries, start), refs.get("sinks"), refs, o_s)
        plgpu.wait_smem_to_gmem(0)


def decode(
    q: Float[Array, "T H D"],
    pools: Pools,
    rows: Rows,
    scores: Scores,
    *,
    max_query_len: int = 1,
    plan: Plan | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Float[Array, "T H D"], Float[Array, "T H"] | None]:
    """Attention of each row's few query tokens over the row's pages.

    Semantics are those of `paxcache.ops.paged_attention`. Rows must lie in the packed tokens in order
    (`query_starts` never decreases). The tokens of rows with more than `max_query_len` of them are left unwritten, for
    another kernel to fill.

    Args:
      q: [T, H, D] packed queries. Those of fp8 pages count in float16: what is larger saturates.
      pools, rows, scores: what is asked for; there are values.
      max_query_len: most query tokens of a row that is served, where there is no plan.
      plan: from `decode_plan`, for these rows and this window; None makes one.
      config: the launch configuration, where there is no plan; None takes the default one.
      interpret: `_mosaic.interpreter()` runs the kernel on the CPU.

    Returns:
      out [T, H, D] with zeros for tokens that no row owns; lse f32[T, H] with -inf there, or None.

    Raises:
      NotImplementedError: the case is not supported.
    """
    if plan is None:
        shapes = shapes_of(q, pools, rows, scores, max_query_len)
        shape = plan_shape(
            num_rows=shapes.num_rows,
            num_kv_heads=shapes.num_kv_heads,
            page_size=shapes.page_size,
            max_query_len=max_query_len,
            windowed=shapes.windowed,
            config=default_config(shapes) if config is None else config,
        )
        plan = decode_plan(rows, shape, sliding_window=scores.sliding_window)
    inputs, case = prepare(q, pools, rows, scores, plan=plan, interpret=interpret)
    # A batched grid would share the counters of arrivals: under vmap the launches run one after another.
    return off_mesh(sequential_vmap(functools.partial(_launch, case=case, interpret=interpret)), inputs)


def prepare(
    q: Any, pools: Pools, rows: Rows, scores: Scores, *, plan: Plan, interpret: Any
) -> tuple[dict[str, Any], Case]:
    """The kernel's inputs by name, and what is static; the arguments are those of `decode`."""
    k_pages, v_pages, layer = pools
    (_, H, D), (_, _, K, S, _) = q.shape, k_pages.shape
    check_supported(
        "decode_sm90",
        head_dim=D,
        v_head_dim=v_pages.shape[-1],
        page_size=S,
        q_dtype=q.dtype,
        kv_dtype=k_pages.dtype,
    )
    config = plan.made_for.config
    if interpret is not None:
        config = dataclasses.replace(config, fused_join=False)
    case = Case(
        head_groups=K * config.group_parts,
        groups_per_kv_head=config.group_parts,
        group=H // K // config.group_parts,
        head_dim=D,
        page_size=S,
        max_query_len=plan.made_for.max_query_len,
        max_pages=rows.tables.shape[1],
        dtype=jnp.dtype(k_pages.dtype),
        q_dtype=jnp.dtype(q.dtype),
        token_scales=isinstance(k_pages, QuantizedPages) and k_pages.per_token,
        causal=scores.causal,
        windowed=scores.sliding_window is not None,
        soft_cap=scores.soft_cap,
        has_sinks=scores.sinks is not None,
        return_lse=scores.return_lse,
        config=config,
        interpreted=interpret is not None,
    )
    inputs = {
        "layer": jnp.asarray(layer, jnp.int32).reshape(1),
        "scale": jnp.asarray(scores.sm_scale, jnp.float32).reshape(1),
        "plan": plan.lines,
        "tables": rows.tables,
        "q": jnp.pad(q, ((0, 0), (0, 0), (0, case.padded_dim - D))) if case.padded_dim > D else q,
        "k": k_pages,
        "v": v_pages,
    }
    if isinstance(k_pages, QuantizedPages) and isinstance(v_pages, QuantizedPages):
        inputs |= {"k": k_pages.values, "v": v_pages.values}
        inputs |= {"k_scales": k_pages.scales, "v_scales": v_pages.scales}
    if scores.sliding_window is not None:
        inputs["window"] = jnp.asarray(scores.sliding_window, jnp.int32).reshape(1)
    if scores.sinks is not None:
        by_head = scores.sinks.astype(jnp.float32).reshape(case.head_groups, case.group)
        by_head = jnp.tile(by_head, (1, case.config.block_tokens))
        inputs["sinks"] = jnp.pad(by_head, ((0, 0), (0, case.columns - by_head.shape[1])))
    return inputs, case


def outputs(inputs: dict[str, Any], case: Case) -> dict[str, jax.ShapeDtypeStruct]:
    """What the kernel writes, by name: the results, and partial results of pieces."""
    (T, H, DP), B, N = inputs["q"].shape, inputs["tables"].shape[0], case.columns
    programs, f32 = case.config.num_programs, jnp.float32
    num_partials = 2 * programs if case.config.piece_len is None else B * case.pairs * case.max_pieces
    outs = {
        "out": (case.q_dtype, T, H, DP),
        "partials": (f32, num_partials, DP, N),
        "stats": (f32, num_partials, 2, N),
    }
    if case.return_lse:
        outs["lse"] = (f32, B, case.pairs, N)
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, *shape) in outs.items()}


@functools.partial(jax.jit, static_argnames=("case", "interpret"))  # unrolled layers lower it once
def _launch(inputs: dict[str, Any], case: Case, interpret: Any) -> tuple[Any, Any]:
    outs = outputs(inputs, case)
    names = (*inputs, *outs)

    def body(*refs, **scratch):
        attend_body(dict(zip(names, refs, strict=True)), case, lax.axis_index("block"), **scratch)

    results = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        grid=(case.num_blocks,),
        grid_names=("block",),
        num_threads=case.config.consumers + 1,
        thread_name="thread",
        scratch_types=scratch_of(case),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paxcache_decode",
        interpret=interpret,
    )(*inputs.values())
    return completed(inputs, dict(zip(outs, results, strict=True)), case, interpret)


def completed(inputs: dict[str, Any], results: dict[str, Any], case: Case, interpret: Any) -> tuple[Any, Any]:
    """out and lse of what the kernel has written; joins what it has not joined itself."""
    if not case.config.fused_join:
        given = {x: inputs[x] for x in ("plan", "sinks") if x in inputs}
        given |= {x: results[x] for x in ("partials", "stats")}
        written = {x: jax.new_ref(results[x]) for x in ("out", "lse") if x in results}
        names = (*given, *written)

        def body(*refs, **scratch):
            _join_body(dict(zip(names, refs, strict=True)), case, **scratch)

        plgpu.kernel(
            body,
            out_type=(),
            grid=(
                case.config.num_programs
                if case.config.piece_len is None
                else len(inputs["tables"]) * case.pairs,
            ),
            grid_names=("block",),
            num_threads=1,
            thread_name="thread",
            scratch_types={"o_s": scratch_of(case)["o_s"]},
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name="paxcache_decode_join",
            interpret=interpret,
        )(*given.values(), *written.values())
        results |= {x: ref[...] for x, ref in written.items()}
    out = results["out"]
    lse = _packed_lse(results["lse"], inputs, case, out.shape[0]) if case.return_lse else None
    return out[..., : case.head_dim], lse


def _packed_lse(lse: Any, inputs: dict[str, Any], case: Case, num_tokens: int) -> Any:
    """From [B, pairs, columns] to [T, H]; -inf for tokens that no row owns."""
    B, G, Q, groups = lse.shape[0], case.group, case.max_query_len, case.head_groups
    lse = lse[:, :, : case.config.block_tokens * G].reshape(B, groups, -1, G)[:, :, :Q]
    lse = jnp.moveaxis(lse, 1, 2).reshape(B, Q, groups * G)
    query = jnp.arange(Q, dtype=jnp.int32)
    rows = inputs["plan"][case.num_ranges : case.num_ranges + B]
    token = rows[:, OfRow.START, None] + query
    served = (query < rows[:, OfRow.QUERIES, None]) & (rows[:, OfRow.LEN, None] > 0)
    token = jnp.where(served, token, num_tokens)
    return jnp.full((num_tokens, groups * G), -jnp.inf, jnp.float32).at[token].set(lse, mode="drop")
